"""The command line: each command parses, calls one function of the package, and prints.

Exit codes: 0 done; 1 internal error; 2 the user's input is at fault; 3 a quality gate was not met.
"""

import os
import sys
from typing import NoReturn

import typer

from lowbit.cli import chat, export, measure, quantize, serve, tune
from lowbit.cli import inspect as inspection
from lowbit.errors import LowbitError

_HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # of torch, read when it allocates for the first time: a tenth of quantize's time
_INTERRUPTED = 130  # what typer makes of Ctrl-C

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
    chat.chat,
    serve.serve,
    export.export,
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
    os.environ.setdefault(_HUGE_PAGES, "1")
    try:
        app()
    except LowbitError as error:
        print(f"lowbit: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            kept = " What is finished is kept; --resume goes on there." if "quantize" in sys.argv[1:2] else ""
            print(f"lowbit: interrupted.{kept}", file=sys.stderr)
        raise
    sys.exit(0)
