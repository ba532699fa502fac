"""What readers of the what-if page chose, one JSON document a line.

The file only grows: a line is on the disk before its writer hears that it is kept, and a line that a crash cut short is
left out when the file is read.
"""

import json
import math
import os
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lowbit.errors import InputError

MOST_BYTES = 16 << 20  # of the file
Value = float | str


class Costs(BaseModel):
    model_config = ConfigDict(extra="forbid")
    choice: float
    compared_with: float


class Selection(BaseModel):
    """As whatif.js makes it; the history that it also has is what earlier lines say."""

    user_selections: dict[str, Value] = Field(max_length=32)
    calculated_monthly_cost: Costs
    comparison_delta: dict[str, float] = Field(max_length=32)


class Full(Exception):
    """The file takes no more."""


class Selections:
    """The file at `path`, made when something is added."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def add(self, body: bytes) -> dict[str, Any]:
        """Keep one; returns it with its time. Raises InputError for what is no selection, Full, or OSError."""
        try:
            selection = Selection.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise InputError(f"{'.'.join(map(str, first['loc'])) or 'the body'}: {first['msg']}") from error
        kept = {"at": datetime.now(UTC).isoformat(timespec="milliseconds"), **selection.model_dump()}
        if not _finite(kept):
            raise InputError("a selection has a number that is not finite.")
        if any(len(word) > 200 for values in kept.values() if isinstance(values, dict) for word in _words(values)):
            raise InputError("a selection has a word of more than 200 characters.")
        line = json.dumps(kept, allow_nan=False).encode() + b"\n"
        with self._lock, self.path.open("ab") as stream:
            if stream.tell() + len(line) > MOST_BYTES:
                raise Full(f"{self.path.name} has {stream.tell()} bytes, and {MOST_BYTES} is the most.")
            if stream.tell() and not self._ends_whole():
                line = b"\n" + line  # after a line that a crash cut short
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())
        return kept

    def _ends_whole(self) -> bool:
        with self.path.open("rb") as stream:
            stream.seek(-1, os.SEEK_END)
            return stream.read(1) == b"\n"

    def all(self) -> list[dict[str, Any]]:
        """What was kept, oldest first."""
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        return [kept for line in lines if isinstance(kept := _parsed(line), dict)]


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _words(values: dict[str, Any]) -> list[str]:
    return [word for pair in values.items() for word in pair if isinstance(word, str)]


def _finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    return not isinstance(value, float) or math.isfinite(value)
