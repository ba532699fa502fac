"""The output directory: written piece by piece beside its final name, closed by one rename, provable afterwards.

    OUT.partial/    work in progress: one shard per finished block, its report, and what the work belongs to
    OUT/            config.json, model-*.safetensors, the tokenizer, lowbit.json (manifest), README.md (model card)

Every file is written under a temporary name, flushed to disk, then renamed, so a killed process leaves whole files
only, and OUT appears complete or not at all.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from torch import Tensor

from lowbit.errors import InputError
from lowbit.shards import Later, write_safetensors

MANIFEST = "lowbit.json"
_WORK = ".work"  # inside OUT.partial: what only the work itself needs
_IDENTITY = "identity.json"
_REPLACE = "replace"  # the job was started with --force: resuming may replace OUT


def replaces(output: Path) -> bool:
    """Whether an interrupted run was told to replace OUT, so that --resume may go on doing so."""
    return (output.with_name(output.name + ".partial") / _WORK / _REPLACE).exists()


def clean(output: Path) -> None:
    """Remove what a finished job needs no more, also after a kill between its last steps."""
    shutil.rmtree(output / _WORK, ignore_errors=True)
    shutil.rmtree(output.with_name(output.name + ".replaced"), ignore_errors=True)


class Work:
    """OUT.partial of one quantization job. `identity` says which job: model, data, recipe, versions."""

    def __init__(self, output: Path, identity: Mapping[str, Any], *, resume: bool, force: bool) -> None:
        self.output = output
        self.path = output.with_name(output.name + ".partial")
        self.force = force
        check_output(output, resume=resume, force=force)
        with disk_errors(self.path):
            if self.path.exists() and not resume:
                shutil.rmtree(self.path)
            if (self._state / _IDENTITY).exists():
                check_same(self.path, json.loads((self._state / _IDENTITY).read_text()), identity)
            else:
                self._state.mkdir(parents=True, exist_ok=True)
                if force:
                    write_bytes(self._state / _REPLACE, b"")
                write_json(self._state / _IDENTITY, identity)

    @property
    def _state(self) -> Path:
        return self.path / _WORK

    def write_shard(self, name: str, tensors: Mapping[str, Tensor | Later]) -> None:
        """One safetensors file; a tensor that comes Later is in memory only while it is written."""
        with disk_errors(self.path), whole_file(self.path / name) as stream:
            write_safetensors(stream, tensors)

    @property
    def activations(self) -> Path:
        """Where hidden states may be kept while the work goes on."""
        return self._state / "activations"

    def write_report(self, name: str, report: Any) -> None:
        """What is to be remembered of a shard; its existence means that the shard is whole and proved."""
        with disk_errors(self.path):
            write_json(self._state / f"{name}.json", report)

    def report(self, name: str) -> Any | None:
        """What was reported with a finished shard, or None if it is not finished."""
        file = self._state / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else None

    def close(self) -> None:
        """Give the directory its final name and remove what only the work needed."""
        with disk_errors(self.path):
            if self.output.exists() and any(self.output.iterdir()):
                replaced = self.output.with_name(self.output.name + ".replaced")
                shutil.rmtree(replaced, ignore_errors=True)
                self.output.rename(replaced)
            self.path.rename(self.output)
            _sync_directory(self.output.parent)
            clean(self.output)


@contextlib.contextmanager
def whole_or_nothing(output: Path, identity: Mapping[str, Any], *, force: bool) -> Iterator[Work]:
    """Work that cannot be resumed: it ends as OUT, or in an error that leaves nothing behind."""
    work = Work(output, identity, resume=False, force=force)
    try:
        yield work
        work.close()
    except BaseException:
        shutil.rmtree(work.path, ignore_errors=True)
        raise


def check_output(output: Path, *, resume: bool, force: bool) -> None:
    """Raise InputError if something is in the way of `output` that neither --resume nor --force settles."""
    partial = output.with_name(output.name + ".partial")
    with disk_errors(output):
        output.exists()
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: is a file; give the name of a directory to make.")
    resumable = resume and ((output / MANIFEST).exists() or replaces(output))
    if output.exists() and any(output.iterdir()) and not force and not resumable:
        raise InputError(f"{output}: exists and is not empty. Give another name, or replace it with --force.")
    if partial.exists() and not (resume or force):
        raise InputError(
            f"{partial}: an earlier run was interrupted. Finish it with --resume, or throw it away with --force."
        )


def check_same(path: Path, before: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raise InputError, naming what differs, if `path` holds another job than `identity`."""
    now = json.loads(json.dumps(identity))
    changed = [k for k in now if before.get(k) != now[k]]
    if changed:
        details = "; ".join(f"{k}: was {_short(before.get(k))}, is {_short(now[k])}" for k in changed)
        raise InputError(
            f"{path}: belongs to another job, so it cannot be resumed ({details}). Repeat the original command with "
            "--resume, or start over with --force."
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 120 else text[:117] + "..."


@contextlib.contextmanager
def whole_file(file: Path) -> Iterator[BinaryIO]:
    """A file to write, that appears whole or not at all, and is on the disk at the end."""
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def write_bytes(file: Path, data: bytes) -> None:
    """Whole or not at all, and on the disk when this returns."""
    with whole_file(file) as stream:
        stream.write(data)


def write_json(file: Path, value: Any) -> None:
    write_bytes(file, (json.dumps(value, indent=2) + "\n").encode())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn 'no space left', 'read-only' and the like into one clear InputError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None)
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InputError(
                f"{path}: the disk is full ({os.strerror(code)}). What is finished is kept: free some space and "
                "repeat the command with --resume."
            ) from error
        if code in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise InputError(f"{path}: cannot be written ({os.strerror(code)}).") from error
        raise


def file_hashes(path: Path) -> dict[str, str]:
    """SHA-256 of the files that make the model: weights, config, tokenizer."""
    hashes = {}
    for file in sorted(path.iterdir()):
        if file.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt") and file.name not in UNHASHED:
            with file.open("rb") as stream:
                hashes[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


# the manifest holds the hashes; measurements are added to a finished directory later
UNHASHED = {MANIFEST, "evaluate.json", "bench.json"}


def read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.exists():
        raise InputError(f"{path}: there is no {MANIFEST}, so this is not a lowbit output directory.")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not readable as JSON ({error}).") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise InputError(f"{file}: not a manifest: expected an object with 'files'.")
    return manifest
