"""The GGUF container, version 3: metadata and tensors in one file.

    "GGUF" | u32 version | u64 tensors | u64 keys
    each key:     string, u32 value type, value           (string: u64 length, UTF-8; array: u32 type, u64 count, items)
    each tensor:  string, u32 dimensions, u64 each (the innermost, in_features, first), u32 type, u64 offset
    padding to general.alignment (32 unless said), then the data; offsets count from there

The reader trusts nothing: every count is checked against the bytes that are left before anything is allocated, so a
hostile file costs no more memory than a small multiple of its own size.
"""

import itertools
import mmap
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.formats.gguf_blocks import unpack
from lowbit.ggml import BY_ID, BlockTensor, FloatType, GgmlType

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_MAX_NAME = 64 * 1024
STRING, ARRAY, BOOL = 8, 9, 7
NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's place: shape with the outermost dimension first (out, in), bytes from the file's start."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int

    @property
    def type(self) -> GgmlType:
        if self.type_id not in BY_ID:
            known = ", ".join(sorted(t.name for t in BY_ID.values()))
            raise InputError(
                f"tensor {self.name!r} is of ggml type {self.type_id}, which lowbit cannot read ({known})."
            )
        return BY_ID[self.type_id]

    @property
    def nbytes(self) -> int:
        return stored_bytes(self.shape, self.type)


@dataclass(frozen=True)
class GGUFFile:
    """An opened file: metadata and the tensors' places. Data is read when asked for."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry] = field(repr=False)

    def get(self, name: str) -> Tensor | BlockTensor:
        """One tensor: a float tensor as stored, or a BlockTensor (out, in)."""
        entry = self.tensors[name]
        data = np.fromfile(self.path, np.uint8, entry.nbytes, offset=entry.offset)
        if len(data) != entry.nbytes:
            raise InputError(f"{self.path}: tensor {name!r} ends beyond the file. Cut short; fetch it again.")
        kind = entry.type
        if isinstance(kind, FloatType):
            return torch.frombuffer(bytearray(data), dtype=kind.dtype).reshape(entry.shape)
        return unpack(data.reshape(int(np.prod(entry.shape[:-1])), -1), kind)

    def values(self, name: str) -> Tensor:
        """One tensor in float32, (out, in) or as it is shaped."""
        tensor = self.get(name)
        full = tensor.dequantize() if isinstance(tensor, BlockTensor) else tensor.float()
        if not bool(torch.isfinite(full).all()):
            raise InputError(f"{self.path}: tensor {name!r} has NaN or infinite values. The file is damaged.")
        return full.reshape(self.tensors[name].shape)


def stored_bytes(shape: tuple[int, ...], kind: GgmlType) -> int:
    """Bytes of a tensor. Raises InputError if its rows are not whole blocks."""
    count = 1
    for size in shape:
        count *= size
    if isinstance(kind, FloatType):
        return count * kind.dtype.itemsize
    if not shape or shape[-1] % kind.block:
        raise InputError(f"rows of {shape[-1] if shape else 0} are not whole {kind.name} blocks of {kind.block}.")
    return count // kind.block * kind.nbytes


class _Cursor:
    """A position in the file's bytes that cannot leave them."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, count: int, what: str) -> bytes:
        if count > self.left:
            raise InputError(
                f"{self.path}: {what} needs {count} bytes at {self.at}, but only {self.left} are left. The file is cut "
                "short or damaged; fetch it again."
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, dtype: str, what: str) -> Any:
        return np.frombuffer(self.take(np.dtype(dtype).itemsize, what), dtype)[0].item()

    def count(self, each: int, what: str) -> int:
        """A u64 count of items that take at least `each` bytes."""
        count = int(self.number("<u8", what))
        if count * each > self.left:
            raise InputError(
                f"{self.path}: says it has {count} {what}, which its {self.left} remaining bytes cannot hold."
            )
        return count

    def string(self, what: str) -> str:
        raw = self.take(self.count(1, f"bytes of {what}"), what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path}: {what} is not UTF-8 ({error.reason} at byte {error.start}).") from error

    def value(self, key: str) -> Any:
        kind = self.number("<u4", f"the type of {key!r}")
        if kind == STRING:
            return self.string(f"the value of {key!r}")
        if kind == BOOL:
            return bool(self.number("<u1", key))
        if kind == ARRAY:
            return self.array(key)
        if kind not in NUMBERS:
            raise InputError(f"{self.path}: {key!r} has the unknown value type {kind}.")
        return self.number(NUMBERS[kind], f"the value of {key!r}")

    def array(self, key: str) -> Any:
        kind = self.number("<u4", f"the item type of {key!r}")
        if kind == STRING:
            return [self.text(key) for _ in range(self.count(8, f"items in {key!r}"))]
        if kind == BOOL or kind in NUMBERS:
            dtype = np.dtype(NUMBERS.get(kind, "?"))
            count = self.count(dtype.itemsize, f"items in {key!r}")
            return np.frombuffer(self.take(count * dtype.itemsize, key), dtype)
        raise InputError(f"{self.path}: {key!r} is an array of type {kind}; only numbers and strings are read.")

    def text(self, key: str) -> str:
        """An item of a string array; tokens of some vocabularies are not UTF-8."""
        return self.take(self.count(1, f"bytes of an item of {key!r}"), key).decode(errors="surrogateescape")


def read_gguf(path: Path) -> GGUFFile:
    """Open a GGUF file and check all of it but the data. Raises InputError for everything wrong with it."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < len(MAGIC):
                raise InputError(f"{path}: {os.fstat(file.fileno()).st_size} bytes are no GGUF file.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read(path, _Cursor(path, data))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error


def _read(path: Path, cursor: _Cursor) -> GGUFFile:
    if cursor.take(4, "the magic") != MAGIC:
        raise InputError(f"{path}: does not begin with 'GGUF', so it is not a GGUF file.")
    version = cursor.number("<u4", "the version")
    if version not in (2, VERSION):
        raise InputError(f"{path}: GGUF version {version}; lowbit reads 2 and 3, little-endian.")
    tensors = cursor.number("<u8", "the tensor count")
    keys = cursor.number("<u8", "the key count")
    for count, each, what in ((tensors, 28, "tensors"), (keys, 13, "keys")):
        if count * each > cursor.left:
            raise InputError(f"{path}: says it has {count} {what}, which its {cursor.left} bytes cannot hold.")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = _name(cursor, "a key")
        if key in metadata:
            raise InputError(f"{path}: the key {key!r} is there twice.")
        metadata[key] = cursor.value(key)
    entries = [_entry(cursor) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1) or alignment > 2**20:
        raise InputError(f"{path}: general.alignment is {alignment!r}; expected a power of two from 8 to 2^20.")
    start = -(-cursor.at // alignment) * alignment
    return GGUFFile(path, metadata, _placed(path, entries, start, alignment, len(cursor.data)))


def _name(cursor: _Cursor, what: str) -> str:
    name = cursor.string(what)
    if not 0 < len(name) <= _MAX_NAME:
        raise InputError(f"{cursor.path}: {what} is {len(name)} characters long; expected 1 to {_MAX_NAME}.")
    return name


def _entry(cursor: _Cursor) -> TensorEntry:
    name = _name(cursor, "a tensor's name")
    dimensions = cursor.number("<u4", f"the dimensions of {name!r}")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise InputError(
            f"{cursor.path}: tensor {name!r} has {dimensions} dimensions; expected 1 to {_MAX_DIMENSIONS}."
        )
    sizes = [int(cursor.number("<u8", f"the shape of {name!r}")) for _ in range(dimensions)]
    if 0 in sizes:
        raise InputError(
            f"{cursor.path}: tensor {name!r} of shape {sizes[::-1]} holds no values. Fetch the file again."
        )
    type_id = cursor.number("<u4", f"the type of {name!r}")
    return TensorEntry(name, tuple(reversed(sizes)), type_id, int(cursor.number("<u8", f"the offset of {name!r}")))


def _placed(path: Path, entries: list[TensorEntry], start: int, alignment: int, size: int) -> dict[str, TensorEntry]:
    """The entries with offsets from the file's start. Raises InputError for one outside the file or over another."""
    placed: dict[str, TensorEntry] = {}
    spans = []
    for e in entries:
        if e.name in placed:
            raise InputError(f"{path}: tensor {e.name!r} is there twice.")
        if e.offset % alignment:
            raise InputError(
                f"{path}: tensor {e.name!r} is at {e.offset}, not a multiple of the alignment {alignment}."
            )
        at = start + e.offset
        placed[e.name] = TensorEntry(e.name, e.shape, e.type_id, at)
        if e.type_id in BY_ID:  # the size of an unknown type is unknown; reading it is refused
            try:
                nbytes = e.nbytes
            except InputError as error:
                raise InputError(f"{path}: tensor {e.name!r} {list(e.shape)}: {error}") from error
            if at + nbytes > size:
                raise InputError(
                    f"{path}: tensor {e.name!r} {list(e.shape)} ends at byte {at + nbytes} of {size}: cut short."
                )
            spans.append((at, at + nbytes, e.name))
    spans.sort()
    for (_, end, first), (begin, _, second) in itertools.pairwise(spans):
        if begin < end:
            raise InputError(f"{path}: tensors {first!r} and {second!r} overlap.")
    return placed
