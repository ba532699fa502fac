"""Writing the GGUF container (formats/gguf_file.py tells its layout): tensors come one at a time, in any order."""

import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.formats.gguf_blocks import Bytes, pack
from lowbit.formats.gguf_file import ALIGNMENT, ARRAY, MAGIC, NUMBERS, VERSION, stored_bytes
from lowbit.ggml import BlockTensor, FloatType, GgmlType

_CODES = {"u8": 0, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "str": 8, "u64": 10}

Typed = tuple[str, Any]  # ("u32", 5), ("str", "llama"), ("array:i32", [1, 2])


def write_gguf(
    path: Path,
    metadata: Mapping[str, Typed],
    layout: Mapping[str, tuple[tuple[int, ...], GgmlType]],
    data: Iterable[tuple[str, Tensor | BlockTensor]],
) -> None:
    """Write a file whose tensors (name -> shape with out first, type) come one at a time, in any order.

    The file gets its name when it is whole and on the disk. Raises ValueError if `data` and `layout` disagree.
    """
    head = _header(metadata, layout)
    offsets, end = {}, 0
    for name, (shape, kind) in layout.items():
        offsets[name] = len(head) + end
        end += -(-stored_bytes(shape, kind) // ALIGNMENT) * ALIGNMENT
    temporary = path.with_name(path.name + ".partial")
    missing = set(layout)
    with temporary.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + end)
        for name, tensor in data:
            shape, kind = layout[name]
            raw = encode(tensor, kind)
            if name not in missing or raw.nbytes != stored_bytes(shape, kind):
                raise ValueError(f"{name}: {raw.nbytes} bytes for {kind.name} {shape}")
            missing.remove(name)
            file.seek(offsets[name])
            file.write(raw.data)
        if missing:
            raise ValueError(f"no data for {sorted(missing)[:3]}")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def encode(tensor: Tensor | BlockTensor, kind: GgmlType) -> Bytes:
    """The bytes of a tensor as `kind`, flat."""
    if isinstance(tensor, BlockTensor):
        if tensor.type is not kind:
            raise ValueError(f"{tensor.type.name} where {kind.name} was announced")
        return pack(tensor).reshape(-1)
    if not isinstance(kind, FloatType):
        raise ValueError(f"floats where {kind.name} was announced")
    raw: Bytes = tensor.to(kind.dtype).contiguous().reshape(-1).view(torch.uint8).numpy()
    return raw


def _header(metadata: Mapping[str, Typed], layout: Mapping[str, tuple[tuple[int, ...], GgmlType]]) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(layout), len(metadata))]
    for key, (kind, value) in metadata.items():
        parts += [_string(key), _typed(kind, value)]
    end = 0
    for name, (shape, ggml_type) in layout.items():
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts += [_string(name), sizes, struct.pack("<IQ", ggml_type.id, end)]
        end += -(-stored_bytes(shape, ggml_type) // ALIGNMENT) * ALIGNMENT
    head = b"".join(parts)
    return head + bytes(-len(head) % ALIGNMENT)


def _string(text: str | bytes) -> bytes:
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def _typed(kind: str, value: Any) -> bytes:
    if kind.startswith("array:"):
        item = kind.removeprefix("array:")
        head = struct.pack("<IIQ", ARRAY, _CODES[item], len(value))
        if item == "str":
            return head + b"".join(map(_string, value))
        return head + np.asarray(value, dtype=NUMBERS[_CODES[item]]).tobytes()
    head = struct.pack("<I", _CODES[kind])
    if kind == "str":
        return head + _string(value)
    if kind == "bool":
        return head + struct.pack("<?", value)
    return head + np.asarray(value, dtype=NUMBERS[_CODES[kind]]).tobytes()
