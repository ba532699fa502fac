"""A user's text, split so that no text both shapes a candidate, selects it and reports on it.

Documents are shuffled by the seed and dealt out 3 : 1 : 1 by size. A single text is cut into fifths (each a
contiguous stretch, at line ends), and the fifths are dealt out the same way.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lowbit.artifact import write_bytes
from lowbit.errors import InputError

_SHARES = (("calibration", 3), ("selection", 1), ("confirmation", 1))


@dataclass(frozen=True)
class Split:
    """Three files, written once: what candidates are calibrated on, chosen by and reported on."""

    calibration: Path
    selection: Path
    confirmation: Path


def split_documents(documents: list[str], seed: int) -> dict[str, list[str]]:
    """name -> documents. Raises InputError if there is too little to split."""
    pieces = documents if len(documents) >= 5 else _fifths("\n".join(documents))
    order = np.random.default_rng(seed).permutation(len(pieces))
    total = sum(len(p) for p in pieces)
    split: dict[str, list[str]] = {name: [] for name, _ in _SHARES}
    for i in order:
        # the part that is furthest from its share gets the next piece
        name = min(_SHARES, key=lambda part: sum(map(len, split[part[0]])) / (part[1] / 5 * total))[0]
        split[name].append(pieces[i])
    return split


def _fifths(text: str) -> list[str]:
    cuts = [0]
    for i in range(1, 5):
        at = text.find("\n", len(text) * i // 5) + 1
        cuts.append(at if 0 < at < len(text) else len(text) * i // 5)
    pieces = [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]
    if not all(p.strip() for p in pieces):
        raise InputError(f"the text is too short to split into fifths: {len(text)} characters.")
    return pieces


def write_split(documents: list[str], seed: int, folder: Path) -> Split:
    """Write the three parts under `folder` as .jsonl (one document a line)."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, part in split_documents(documents, seed).items():
        files[name] = folder / f"{name}.jsonl"
        write_bytes(files[name], "".join(json.dumps({"text": d}) + "\n" for d in part).encode())
    return Split(**files)
