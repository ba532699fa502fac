"""The command line: each command parses, calls one function of the package, and prints.

Exit codes: 0 done; 1 internal error; 2 the user's input is at fault; 3 a quality gate was not met.
"""

import sys
from typing import NoReturn

import click
import typer

from lowbit.cli import inspect as inspection
from lowbit.cli import measure, quantize, tune
from lowbit.errors import LowbitError

app = typer.Typer(
    name="lowbit",
    help="Make a language model answer faster with fewer bits, and measure what that cost.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (
    quantize.quantize,
    measure.evaluate,
    measure.bench,
    tune.tune,
    inspection.inspect,
    inspection.verify,
    inspection.doctor,
):
    app.command()(command)


@app.callback(invoke_without_command=True)
def version(
    show: bool = typer.Option(False, "--version", is_eager=True, help="Print the version and stop."),
) -> None:
    if show:
        import lowbit

        print(lowbit.__version__)
        raise typer.Exit


def main() -> NoReturn:
    """The `lowbit` program."""
    try:
        code = app(standalone_mode=False)
    except LowbitError as error:
        print(f"lowbit: {error}", file=sys.stderr)
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        print("lowbit: interrupted. What is finished is kept; --resume goes on where it stopped.", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        code = 1
    sys.exit(code if isinstance(code, int) else 0)
