"""Prices of hosted models and of hardware: model-catalog.json beside this file, and the user's own in the same form.

    {"models": [{"provider", "model", "use", "input_per_million", "output_per_million", "context", "updated"}],
     "hardware": [{"name", "usd_per_hour", "bandwidth_bytes_per_s", "note"}]}

US dollars per million tokens and per hour. An entry of the user's replaces the built-in one of the same name. Prices
change: `updated` says when an entry was true.
"""

import json
import math
from pathlib import Path
from typing import Any

from lowbit.errors import InputError, nearest

BUILT_IN = Path(__file__).parent / "model-catalog.json"
_MODEL = {"provider": str, "model": str, "input_per_million": float, "output_per_million": float}
_HARDWARE = {"name": str, "usd_per_hour": float}


def read_catalog(own: Path | None = None) -> dict[str, list[dict[str, Any]]]:
    """{models, hardware}, the built-in catalog with the user's entries. Raises InputError naming what is wrong."""
    catalog = _checked(BUILT_IN)
    if own is None:
        return catalog
    added = _checked(own)
    return {
        "models": _merged(catalog["models"], added["models"], ("provider", "model")),
        "hardware": _merged(catalog["hardware"], added["hardware"], ("name",)),
    }


def usd_per_hour(catalog: dict[str, list[dict[str, Any]]], hardware: str) -> float:
    """What an hour of it costs. Raises InputError for hardware that the catalog does not have."""
    prices = {str(h["name"]): float(h["usd_per_hour"]) for h in catalog["hardware"]}
    if hardware not in prices:
        raise InputError(f"--hardware {hardware}: {nearest(hardware, prices)} Add yours with --catalog FILE.")
    return prices[hardware]


def _checked(path: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}).") from error
    if not isinstance(value, dict) or not set(value) <= {"models", "hardware"}:
        raise InputError(f'{path}: expected {{"models": [...], "hardware": [...]}}.')
    found: dict[str, list[dict[str, Any]]] = {}
    for part, needed in (("models", _MODEL), ("hardware", _HARDWARE)):
        rows = value.get(part, [])
        if not isinstance(rows, list):
            raise InputError(f"{path}: {part!r} must be a list, got {type(rows).__name__}.")
        for n, row in enumerate(rows):
            _check_row(f"{path}: {part}[{n}]", row, needed)
        found[part] = rows
    return found


def _check_row(where: str, row: Any, needed: dict[str, type]) -> None:
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object, got {type(row).__name__}.")
    for key, kind in needed.items():
        value = row.get(key)
        if kind is str and not (isinstance(value, str) and value):
            raise InputError(f"{where}: {key!r} must be a name, got {value!r}.")
        price = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
        if kind is float and not price:
            raise InputError(f"{where}: {key!r} must be a price in US dollars from 0 up, got {value!r}.")


def _merged(rows: list[dict[str, Any]], own: list[dict[str, Any]], keys: tuple[str, ...]) -> list[dict[str, Any]]:
    by_name = {tuple(r[k] for k in keys): r for r in rows}
    return list((by_name | {tuple(r[k] for k in keys): r for r in own}).values())
