"""Safetensors files one tensor at a time, by plain reads and writes.

The library's own reader maps a whole file into the process privately, which counts as the process's memory where that
is limited, and its writer wants all tensors at once and copies them.
"""

import ctypes
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor


def read_tensor(file: Path, start: int, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor that begins at byte `start` of a file. Raises OSError if it is not all there, KeyError for a dtype
    that torch lacks."""
    words = DTYPES_OF[dtype]
    tensor = torch.empty(math.prod(shape) * words.itemsize, dtype=torch.uint8)
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        view, done = bytes_of(tensor), 0
        while done < len(view):
            got = stream.readinto(view[done:])
            if not got:
                raise OSError(f"the file ends {len(view) - done} bytes too early")
            done += got
    return tensor.view(words).reshape(shape)


def bytes_of(values: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, where they lie. (A tensor that NumPy has once looked at can give no
    memory back.)"""
    if not values.nbytes:
        return memoryview(b"")
    return memoryview((ctypes.c_char * values.nbytes).from_address(values.data_ptr())).cast("B")


@dataclass(frozen=True)
class Later:
    """A tensor that is read when it is written: its dtype (safetensors' word), its shape, and how to get it."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def write_safetensors(stream: BinaryIO, tensors: Mapping[str, Tensor | Later]) -> None:
    """The safetensors format: length of the header, JSON header padded to 8 bytes, the tensors' bytes, wide types
    first so that all lie aligned."""
    given = {n: t if isinstance(t, Later) else Later(DTYPES[t.dtype], tuple(t.shape), partial(_given, t))
             for n, t in tensors.items()}  # fmt: skip
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    order = sorted(given, key=lambda n: (-_WIDTHS[given[n].dtype], n))
    for name in order:
        start, end = end, end + math.prod(given[name].shape) * _WIDTHS[given[name].dtype]
        header[name] = {"dtype": given[name].dtype, "shape": list(given[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text = text.ljust(len(text) + -len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        stream.write(given[name].read().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _given(tensor: Tensor) -> Tensor:
    return tensor


DTYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
    torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.uint8: "U8",
    torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
DTYPES_OF = {word: dtype for dtype, word in DTYPES.items()}
_WIDTHS = {word: dtype.itemsize for dtype, word in DTYPES.items()}
