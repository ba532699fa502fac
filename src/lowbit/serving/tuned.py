"""What `lowbit tune` made, to be served: the recommended model, and the report with a way to keep selections."""

import json
from pathlib import Path
from typing import Any

from lowbit.errors import InputError
from lowbit.report import render
from lowbit.serving.app import Page
from lowbit.serving.selections import Selections


def recommended(directory: Path) -> str:
    """Where the model is that tune.json recommends: a candidate, or the original. Raises InputError if none is."""
    document = _document(directory)
    name = (document.get("recommendation") or {}).get("name")
    if not name:
        raise InputError(
            f"{directory}: tune recommended no model; serve one of {directory / 'candidates'} by its path."
        )
    if name == "original":
        return str(document.get("model"))
    candidates = directory / "candidates"
    place = candidates / str(name)
    if place.parent != candidates or not (place / "config.json").exists():
        raise InputError(f"{place}: the recommended model is not there any more. Serve another, or tune again.")
    return str(place)


def page_of(directory: Path) -> Page:
    """The report as it is now rendered, and the file that selections go to."""
    html, policy = render(_document(directory), keeps=True)
    return Page(html, policy, Selections(directory / "selections.jsonl"))


def _document(directory: Path) -> dict[str, Any]:
    path = directory / "tune.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}).") from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: expected the document that `lowbit tune` writes.")
    return document
