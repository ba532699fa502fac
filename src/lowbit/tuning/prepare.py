"""What must be there before `tune` makes its first candidate: an output directory of this job, and the text, split.

Everything that can be refused is refused here, before anything takes long.
"""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lowbit
from lowbit.accuracy.domain import domain_distance, warning
from lowbit.artifact import disk_errors
from lowbit.calibration import read_documents, tokenize
from lowbit.console import note
from lowbit.errors import InputError
from lowbit.model.checkpoint import DEMO, Checkpoint
from lowbit.model.load import load_tokenizer
from lowbit.tuning.run import Notebook
from lowbit.tuning.split import Split, write_split

SEQ_LEN = 512


@dataclass(frozen=True)
class Ground:
    """What all candidates are made and measured on: `tokens` of each part of the text, `window` in tokens, and how far
    the calibration text is from the evaluation text."""

    notebook: Notebook
    tokenizer: Any
    split: Split
    tokens: dict[str, int]
    window: int
    domain: dict[str, Any]


def prepare_ground(
    output: Path,
    checkpoint: Checkpoint,
    text: str | Path | None,
    calibration: str | Path | None,
    seed: int,
    resume: bool,
) -> Ground:
    """Raises InputError for text that cannot be read or split, and for an output of another job."""
    if text is None and checkpoint.path != DEMO / "model":
        raise InputError("tune measures on your own text: --text FILE (.txt or .jsonl).")
    text = DEMO / "evaluation.txt" if text is None else Path(text)
    tokenizer = load_tokenizer(checkpoint)
    notebook = _begin(output, checkpoint, text, seed, resume)
    return Ground(notebook, tokenizer, *_texts(output, text, calibration, tokenizer, checkpoint, seed))


def check_output(output: Path, *, resume: bool, force: bool) -> None:
    if resume and force:
        raise InputError("--resume goes on with what is there and --force throws it away: give one of them.")
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: is a file; give the name of a directory to make.")
    if output.exists() and any(output.iterdir()) and not (resume or force):
        raise InputError(
            f"{output}: exists and is not empty. Go on with an interrupted run with --resume, replace it with --force, "
            "or give another name."
        )


def _begin(output: Path, checkpoint: Checkpoint, text: Path, seed: int, resume: bool) -> Notebook:
    """An empty output directory, or with `resume` the one that is there, if it is of the same job."""
    try:
        digest = hashlib.sha256(text.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{text}: cannot be read ({error.strerror}).") from error
    identity = {"model": checkpoint.digest, "text": digest, "seed": seed, "lowbit": lowbit.__version__}
    with disk_errors(output):
        if output.exists() and not resume:
            shutil.rmtree(output)
        output.mkdir(parents=True, exist_ok=True)
        return Notebook.open(output / "progress.json", identity)


def _texts(
    output: Path, text: Path, calibration: str | Path | None, tokenizer: Any, checkpoint: Checkpoint, seed: int
) -> tuple[Split, dict[str, int], int, dict[str, Any]]:
    """The split, its sizes in tokens, the window, and how far the calibration text is from the evaluation text."""
    documents = read_documents(text, tokenizer)
    with disk_errors(output):
        split = write_split(documents, seed, output / "data")
    parts = ("calibration", "selection", "confirmation")
    files = {part: Path(getattr(split, part)) for part in parts}
    if calibration is not None:
        files["calibration"] = Path(calibration)
    ids = {p: tokenize("\n".join(read_documents(file, tokenizer)), tokenizer) for p, file in files.items()}
    tokens = {part: len(ids[part]) for part in parts}
    window = min(SEQ_LEN, int(checkpoint.config.get("max_position_embeddings") or SEQ_LEN))
    if min(tokens.values()) < 2 * window:
        raise InputError(
            f"{text}: too short to split: {tokens} tokens, and each part needs two windows of {window} at least."
        )
    domain = domain_distance(ids["calibration"], ids["selection"], seed)
    if said := warning(domain):
        note(f"warning: {said}")
    return split, tokens, window, domain
