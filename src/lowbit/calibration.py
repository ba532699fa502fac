"""Calibration text -> seeded windows of tokens.

.txt     the whole file is tokenized without special tokens; windows start at seeded random positions
.jsonl   one document a line: a `text` field, or chat `messages` rendered by the tokenizer's chat template;
         documents are shuffled by the seed, joined by the end-of-text token and cut into windows
hub:NAME a data set from the hub, by the optional `datasets` package: its `text` or `messages` column
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import InputError


@dataclass(frozen=True)
class Calibration:
    """Token windows (samples, seq_len) int64 and where they came from."""

    tokens: Tensor
    source: str
    digest: str  # SHA-256 of the windows themselves


def load_calibration(source: str, tokenizer: Any, samples: int, seq_len: int, seed: int) -> Calibration:
    """Windows from a .txt or .jsonl file or hub:NAME. Raises InputError with the numbers when there is too little."""
    rng = np.random.default_rng(seed)
    if source.startswith("hub:"):
        ids = _pack(_hub_documents(source[4:], tokenizer, samples * seq_len), tokenizer, rng)
        starts = np.arange(len(ids) // seq_len) * seq_len
    elif source.endswith(".jsonl"):
        ids = _pack(read_documents(Path(source), tokenizer), tokenizer, rng)
        starts = np.arange(len(ids) // seq_len) * seq_len
    else:
        ids = tokenize(read_text(Path(source)), tokenizer)
        starts = rng.integers(0, max(len(ids) - seq_len, 1), samples)
    needed = samples * seq_len
    if len(ids) < needed:
        raise InputError(
            f"{source}: {len(ids)} tokens, but {samples} windows of {seq_len} need {needed}. Give more text, or "
            f"lower --samples (at most {len(ids) // seq_len} here) or --seq-len."
        )
    windows = np.stack([ids[s : s + seq_len] for s in starts[:samples]]).astype(np.int64)
    return Calibration(torch.from_numpy(windows), source, hashlib.sha256(windows.tobytes()).hexdigest())


def read_text(path: Path) -> str:
    """The file as UTF-8. Raises InputError for a missing, empty or differently encoded file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file.") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: this is a directory; give a .txt or .jsonl file.") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 at byte {error.start} (0x{error.object[error.start]:02x}). Convert it, for example "
            "with: iconv -f WINDOWS-1252 -t UTF-8."
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
    if not text.strip():
        raise InputError(f"{path}: the file has no text ({len(text)} characters, all white space).")
    return text


def read_documents(path: Path, tokenizer: Any) -> list[str]:
    """The documents of a .jsonl file, or a .txt file as a single one. Lines that are no documents are an InputError."""
    text = read_text(path)
    if path.suffix != ".jsonl":
        return [text]
    lines = text.split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    empty = [n for n, line in enumerate(lines, 1) if not line.strip()]
    if empty:
        raise InputError(f"{path}: {len(empty)} empty lines, the first is line {empty[0]}. One JSON object a line.")
    return [_document(f"{path}:{n}", line, tokenizer) for n, line in enumerate(lines, 1)]


def _document(where: str, line: str, tokenizer: Any) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}).") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object with 'text' or 'messages', got {type(row).__name__}.")
    if "\\ud" in line.lower():
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: has half a surrogate pair, which is no character ({error.reason}).") from error
    if isinstance(row.get("text"), str):
        if not row["text"].strip():
            raise InputError(f"{where}: the text is empty.")
        return str(row["text"])
    if isinstance(row.get("messages"), list):
        return _chat(where, row["messages"], tokenizer)
    raise InputError(f"{where}: expected a string field 'text' or a list 'messages', got the fields {sorted(row)}.")


def _chat(where: str, messages: list[Any], tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{where}: has chat messages, but this model's tokenizer has no chat template. Give documents with 'text'."
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program of the model's author and may raise anything
        raise InputError(f"{where}: the chat template refuses these messages: {error}.") from error


def _hub_documents(name: str, tokenizer: Any, tokens: int) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(f"hub:{name}: needs the extra 'datasets': pip install 'lowbit[datasets]'.") from error
    try:
        rows = load_dataset(name, split="train", streaming=True)
        documents, size = [], 0
        for n, row in enumerate(rows):
            documents.append(_document(f"hub:{name}, row {n}", json.dumps(row, default=str), tokenizer))
            size += len(documents[-1])
            if size > tokens * 8:  # characters; more than enough for any tokenizer
                break
    except InputError:
        raise
    except Exception as error:  # the hub's client raises many unrelated types
        raise InputError(f"hub:{name}: cannot be fetched: {str(error).splitlines()[0][:300]}.") from error
    return documents


def _pack(documents: list[str], tokenizer: Any, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    order = rng.permutation(len(documents))
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [np.array([*tokenize(documents[i], tokenizer), *end], dtype=np.int64) for i in order]
    return np.concatenate(ids)


def tokenize(text: str, tokenizer: Any) -> np.ndarray[Any, Any]:
    """Token ids of text, without special tokens, int64."""
    return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
