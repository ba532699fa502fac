"""A method is one rounding, or parts joined with `+` in the order in which they are applied:

    rotate (hadamard)  ->  equalize (awq, smoothquant)  ->  round (rtn, gptq, ...)

`awq`, `smoothquant` or `hadamard` without a rounding round to nearest. One part of each kind: a second one would undo
or repeat the first.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lowbit.algorithms import EQUALIZATIONS, METHODS, ROTATIONS, make_settings, settings_class
from lowbit.errors import InputError, nearest

_KINDS: dict[str, Mapping[str, Any]] = {"rotation": ROTATIONS, "equalization": EQUALIZATIONS, "rounding": METHODS}
_TWICE = {
    "rotation": "the second rotation would turn the axes that the first has chosen",
    "equalization": "both choose the scale of the same channels, so the second would undo the first",
    "rounding": "a weight is rounded once",
}


@dataclass(frozen=True)
class Composition:
    """The parts of a method by name; `text` is what the user wrote."""

    text: str
    rotation: str | None
    equalization: str | None
    rounding: str

    @property
    def needs_calibration(self) -> bool:
        return self.equalization is not None or METHODS[self.rounding].needs_calibration

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(p for p in (self.rotation, self.equalization, self.rounding) if p is not None)


def parse_method(text: str) -> Composition:
    """Raises InputError for an unknown part, two of a kind, or the wrong order."""
    found: dict[str, str] = {}
    known = [name for registry in _KINDS.values() for name in registry]
    for part in text.split("+"):
        kind = next((k for k, registry in _KINDS.items() if part in registry), None)
        if kind is None:
            raise InputError(f"unknown method {part!r}. {nearest(part, known)}")
        if kind in found:
            raise InputError(f"method {text!r}: {found[kind]} and {part}: {_TWICE[kind]}. Keep one.")
        found[kind] = part
    right = "+".join(found[kind] for kind in _KINDS if kind in found)
    if right != text:
        raise InputError(f"method {text!r}: the order is rotate, equalize, round: write {right!r}.")
    return Composition(text, found.get("rotation"), found.get("equalization"), found.get("rounding", "rtn"))


def settings_of(method: Composition, values: dict[str, str]) -> dict[str, Any]:
    """Each part's settings, by the part's name, with the user's `values` put in wherever a part has that setting.

    Raises InputError for a setting that no part has.
    """
    names = {part: {f.name for f in fields(settings_class(part))} for part in method.parts}
    for key in values:
        if not any(key in own for own in names.values()):
            every = sorted(set().union(*names.values()))
            raise InputError(f"method {method.text!r} has no setting {key!r}. {nearest(key, every)}")
    return {part: make_settings(part, {k: v for k, v in values.items() if k in own}) for part, own in names.items()}
