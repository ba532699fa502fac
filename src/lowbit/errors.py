"""What can go wrong, as a tree.

    LowbitError
    ├── InputError        the user's input is at fault: one clear paragraph, exit code 2, nothing lost
    └── QualityGateError  a limit the user set was not met: exit code 3, what was made stays

Anything else that escapes is a bug of ours: exit code 1.
"""

import difflib
from collections.abc import Iterable


class LowbitError(Exception):
    exit_code = 1


class InputError(LowbitError, ValueError):
    exit_code = 2


class QualityGateError(LowbitError):
    exit_code = 3


def nearest(word: str, known: Iterable[str]) -> str:
    """A sentence naming the known words, the ones that look like `word` first: for 'unknown ...' errors."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(close)}? Known: {', '.join(known)}."
    return f"Known: {', '.join(known)}."
