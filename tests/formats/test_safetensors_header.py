"""safetensors files that lie: refused by their headers, in little memory, or read as what they hold."""

import json
import random
import struct
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from lowbit.errors import InputError
from lowbit.model.checkpoint import read_header
from lowbit.shards import read_tensor

ROUNDS = 400


def tensor(shape: list[Any], start: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def file_of(header: Any, body: int = 64, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(body)


GOOD = {"a": tensor([8], 0, 32), "b": tensor([2, 4], 32, 64)}
HOSTILE = {
    "empty": b"",
    "no whole length": b"\1\0\0",
    "huge header": file_of(GOOD, length=2**63),
    "header beyond the end": file_of(GOOD, length=10**6),
    "header of no JSON": file_of(b"{" * 100),
    "deep JSON": file_of(b'{"a":' + b"[" * 50_000),
    "a list": file_of([1]),
    "entry of no object": file_of({"a": 3}),
    "overlap": file_of({"a": tensor([8], 0, 32), "b": tensor([8], 16, 48)}),
    "the same bytes twice": file_of({"a": tensor([8], 0, 32), "b": tensor([8], 0, 32)}),
    "a gap": file_of({"a": tensor([8], 0, 32), "b": tensor([4], 48, 64)}),
    "bytes after the last": file_of(GOOD, body=80),
    "cut short": file_of(GOOD, body=60),
    "offsets in reverse": file_of({"a": tensor([8], 32, 0)}, body=32),
    "negative offset": file_of({"a": tensor([8], -32, 0)}, body=32),
    "huge offset": file_of({"a": tensor([8], 2**62, 2**62 + 32)}),
    "huge shape": file_of({"a": tensor([2**62], 0, 64)}),
    "overflowing shape": file_of({"a": tensor([2**33, 2**33], 0, 64)}),
    "shape that is not its bytes": file_of({"a": tensor([9], 0, 64)}),
    "negative shape": file_of({"a": tensor([-16], 0, 64)}),
    "unknown dtype": file_of({"a": tensor([16], 0, 64, "Q99")}),
    "dtype that is a number": file_of({"a": tensor([16], 0, 64, 7)}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_in_little_memory(tmp_path: Path, case: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(HOSTILE[case])
    tracemalloc.start()
    with pytest.raises(InputError) as caught:
        read_header(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.skipif(sys.platform != "linux", reason="sparse files are not everywhere")
def test_a_header_as_large_as_its_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", 2**33))
        stream.truncate(2**33 + 8)
    tracemalloc.start()
    with pytest.raises(InputError):
        read_header(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6


def test_damaged_headers_are_read_or_refused(tmp_path: Path) -> None:
    """Bytes of the header changed, entries reordered, the end cut off: tensors of their shapes, or a clear error."""
    path, outcomes = tmp_path / "damaged.safetensors", {"read": 0, "refused": 0}
    for seed in range(ROUNDS):
        rng = random.Random(seed)
        entries = list(GOOD.items())
        rng.shuffle(entries)  # the order of the header's entries means nothing
        data = bytearray(file_of(dict(entries)))
        for _ in range(rng.choice((0, 1, 1, 2, 8))):
            data[rng.randrange(len(data) - 64)] = rng.choice((0, 0x30, 0x39, 0x7B, 0xFF, rng.randrange(256)))
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            for info in read_header(path).values():
                if info.dtype == "F32":
                    assert read_tensor(path, info.start, info.dtype, info.shape).shape == info.shape
            outcomes["read"] += 1
        except InputError:  # any other exception fails the test
            outcomes["refused"] += 1
    assert min(outcomes.values()) > ROUNDS / 20
