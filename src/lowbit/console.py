"""What a person sees while work goes on: a progress bar on a terminal, plain lines elsewhere, nothing when quiet."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
screen = Console(stderr=True, highlight=False)
_level = {"verbosity": 1}


def set_verbosity(level: int) -> None:
    """0 quiet, 1 normal, 2 everything."""
    _level["verbosity"] = level


def verbosity() -> int:
    return _level["verbosity"]


def note(text: str, level: int = 1) -> None:
    """One line for the user on standard error."""
    if _level["verbosity"] >= level:
        screen.print(text, markup=False, soft_wrap=True)


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Iterate with progress shown: a bar on a terminal, elsewhere a line at most every 15 seconds."""
    if _level["verbosity"] < 1:
        yield from items
    elif sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=screen, transient=True) as progress:
            yield from progress.track(items, total=total, description=description)
    else:
        last = start = time.monotonic()
        for n, item in enumerate(items, 1):
            yield item
            now = time.monotonic()
            if n < total and now - last > 15:
                last = now
                note(f"{description}: {n}/{total}, about {(now - start) / n * (total - n):.0f} s left")
