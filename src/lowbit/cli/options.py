"""Options that several commands share, and how a document is handed over."""

import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.console import set_verbosity
from lowbit.errors import InputError, nearest

Json = Annotated[
    str | None, typer.Option("--json", metavar="FILE|-", help="Write the numbers as one JSON document ('-': stdout).")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results only, no progress.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print more on the way.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.", min=0, max=2**32 - 1)]
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with a model. Read it first."),
]
RUNTIMES = ("auto", "transformers", "bfloat16", "float32", "onnx", "llama.cpp", "vllm")
Runtime = Annotated[
    str,
    typer.Option(
        help="What computes: auto, transformers, bfloat16 and float32 (weights dequantized), onnx (ONNX Runtime), "
        "llama.cpp or vllm (their servers, started and stopped)."
    ),
]
Program = Annotated[
    str | None, typer.Option(metavar="PATH", help="For llama.cpp and vllm: the server's program (default: on PATH).")
]

Kv = Annotated[
    str | None,
    typer.Option(
        "--kv", metavar="int8|int4|fp8|none", help="How keys and values are cached (default: as the model says)."
    ),
]


def begin(quiet: bool, verbose: bool, trust_remote_code: bool = False) -> None:
    set_verbosity(0 if quiet else 2 if verbose else 1)
    if trust_remote_code:
        os.environ["LOWBIT_TRUST_REMOTE_CODE"] = "1"  # seen by processes started from here as well


def check_runtime(value: str) -> Any:
    if value not in RUNTIMES:
        raise InputError(f"unknown runtime {value!r}. {nearest(value, RUNTIMES)}")
    return value


def finish(command: str, document: dict[str, Any], target: str | None, text: str, seed: int = 0) -> None:
    """Print `text` for the person and write `document` for programs."""
    print(text, file=sys.stderr if target == "-" else sys.stdout)
    write_document(command, document, target, seed)


def write_document(command: str, document: dict[str, Any], target: str | None, seed: int = 0) -> None:
    """The JSON document to a file, to stdout for '-', nowhere for None."""
    if target == "-":
        print(as_json(command, document, seed))
    elif target is not None:
        try:
            Path(target).write_text(as_json(command, document, seed) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"--json {target}: cannot be written ({error.strerror}).") from error


def as_json(command: str, document: dict[str, Any], seed: int) -> str:
    import lowbit
    from lowbit.environment import environment

    head = {"lowbit_version": lowbit.__version__, "command": command, "environment": environment(), "seed": seed}
    return json.dumps(_finite(head | document), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    """NaN and infinity, which JSON lacks, become null; NumPy scalars become Python's."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(headers: list[str], rows: list[list[str]]) -> str:
    """Plain aligned columns: the first left, the others right."""
    widths = [max(len(r[i]) for r in [headers, *rows]) for i in range(len(headers))]
    lines = []
    for row in [headers, *rows]:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def percent(text: str | None, option: str) -> float | None:
    """'1%' or '0.01' -> 0.01."""
    if text is None:
        return None
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError as error:
        raise InputError(f"{option} {text}: expected a share such as 1% or 0.01.") from error
    if not 0 <= value < math.inf:
        raise InputError(f"{option} {text}: expected a share from 0 up.")
    return value


def numbers(text: str, option: str) -> list[int]:
    """'128,512' -> [128, 512]."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option} {text}: expected whole numbers separated by commas, such as 128,512.") from error
    return values


def reals(text: str, option: str) -> list[float]:
    """'3.5,4.25' -> [3.5, 4.25]."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option} {text}: expected numbers separated by commas, such as 3.5,4.25.") from error


def words(text: str | None) -> list[str]:
    """'rtn,gptq' -> ['rtn', 'gptq']."""
    return [part.strip() for part in text.split(",")] if text else []


def seconds(text: str | None, option: str) -> float | None:
    """'200ms', '1.5s', '30min', '2h' or plain seconds -> seconds."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)(us|ms|s|min|h|)", text.strip())
    if not found or float(found[1]) <= 0:
        raise InputError(f"{option} {text}: expected a time above 0 such as 20ms, 1.5s or 30min.")
    return float(found[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0, "min": 60.0, "h": 3600.0}[found[2]]


def pairs(items: list[str], option: str, form: str) -> tuple[tuple[str, str], ...]:
    """['a=b', ...] -> (('a', 'b'), ...)."""
    found = []
    for item in items:
        key, equals, value = item.partition("=")
        if not (key and equals and value):
            raise InputError(f"{option} {item}: expected {form}.")
        found.append((key, value))
    return tuple(found)


def size(text: str | None, option: str) -> int | None:
    """'4GB', '500MB', '2GiB' or plain bytes -> bytes."""
    if text is None:
        return None
    units = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1, "": 1}
    number = text.upper().rstrip("KMGIB")
    unit = text.upper()[len(number) :]
    try:
        value = float(number) * units[unit]
    except (ValueError, KeyError) as error:
        raise InputError(f"{option} {text}: expected a size such as 500MB or 4GB.") from error
    if not 0 < value < 2**60:
        raise InputError(f"{option} {text}: expected a size above 0.")
    return int(value)


def megabytes(n: float) -> str:
    return f"{n / 1e6:.1f} MB" if n < 1e9 else f"{n / 1e9:.2f} GB"
