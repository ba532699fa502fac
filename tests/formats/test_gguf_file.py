"""The GGUF container: exact round trips, the gguf package as second reader, and hostile files."""

import contextlib
import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lowbit.algorithms.ggml_search import search_blocks
from lowbit.errors import InputError
from lowbit.formats.gguf_file import GGUFFile, read_gguf
from lowbit.formats.gguf_write import write_gguf
from lowbit.ggml import BF16, F16, F32, Q4_K, Q8_0, BlockTensor

METADATA: dict[str, tuple[str, Any]] = {
    "general.architecture": ("str", "llama"),
    "general.alignment": ("u32", 32),
    "llama.block_count": ("u32", 2),
    "llama.rope.freq_base": ("f32", 10000.0),
    "tokenizer.ggml.tokens": ("array:str", ["a", "ü", "Ġ"]),
    "tokenizer.ggml.token_type": ("array:i32", [1, 1, 3]),
    "tokenizer.ggml.add_bos_token": ("bool", True),
}


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor | BlockTensor]:
    torch.manual_seed(0)
    return {
        "norm.weight": torch.randn(7),
        "half.weight": torch.randn(3, 5).half(),
        "brain.weight": torch.randn(2, 33).bfloat16(),
        "blk.0.attn_q.weight": search_blocks(torch.randn(4, 512), Q4_K, None),
        "blk.0.attn_k.weight": search_blocks(torch.randn(3, 64), Q8_0, None),
    }


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor | BlockTensor]) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    layout = {
        "norm.weight": ((7,), F32),
        "half.weight": ((3, 5), F16),
        "brain.weight": ((2, 33), BF16),
        "blk.0.attn_q.weight": ((4, 512), Q4_K),
        "blk.0.attn_k.weight": ((3, 64), Q8_0),
    }
    write_gguf(path, METADATA, layout, reversed(tensors.items()))
    return path


def full(tensor: torch.Tensor | BlockTensor) -> torch.Tensor:
    return tensor.dequantize() if isinstance(tensor, BlockTensor) else tensor.float()


def test_what_was_written_is_read(file: Path, tensors: dict[str, torch.Tensor | BlockTensor]) -> None:
    read = read_gguf(file)
    assert set(read.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(read.values(name), full(tensor))
    for key, (_, value) in METADATA.items():
        got = read.metadata[key]
        assert (got.tolist() if isinstance(got, np.ndarray) else got) == value


def test_the_gguf_package_reads_the_same(file: Path, tensors: dict[str, torch.Tensor | BlockTensor]) -> None:
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(file)
    assert {t.name for t in reader.tensors} == set(tensors)
    for t in reader.tensors:
        values = gguf.quants.dequantize(t.data, t.tensor_type)
        shape = tuple(int(n) for n in reversed(t.shape))
        assert np.array_equal(values.reshape(shape), full(tensors[t.name]).numpy()), t.name
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "ü", "Ġ"]
    assert reader.fields["llama.block_count"].contents() == 2


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no data"):
        write_gguf(tmp_path / "x.gguf", {}, {"a": ((4,), F32), "b": ((4,), F32)}, [("a", torch.ones(4))])
    with pytest.raises(ValueError, match="bytes"):
        write_gguf(tmp_path / "x.gguf", {}, {"a": ((4,), F32)}, [("a", torch.ones(5))])
    assert not (tmp_path / "x.gguf").exists()


# Hostile files


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def header(tensors: int, keys: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def entry(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0, dims: int | None = None) -> bytes:
    sizes = b"".join(struct.pack("<Q", s) for s in shape)
    return (
        string(name)
        + struct.pack("<I", len(shape) if dims is None else dims)
        + sizes
        + struct.pack("<IQ", kind, offset)
    )


def key(name: str, kind: int, raw: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + raw


HUGE = 2**62
HOSTILE = {
    "empty": (b"", "no GGUF"),
    "other magic": (b"GGML" + bytes(60), "does not begin"),
    "big-endian or future version": (header(0, 0, 0x03000000), "version"),
    "cut in the header": (header(1, 1)[:12], "left"),
    "huge tensor count": (header(HUGE, 0) + bytes(100), "tensors"),
    "huge key count": (header(0, HUGE) + bytes(100), "keys"),
    "huge string": (header(0, 1) + struct.pack("<Q", HUGE) + bytes(40), "bytes of a key"),
    "empty key": (header(0, 1) + string("") + bytes(20), "characters"),
    "name not utf-8": (header(0, 1) + struct.pack("<Q", 2) + b"\xff\xfe" + bytes(20), "UTF-8"),
    "unknown value type": (header(0, 1) + key("k", 77, bytes(16)), "unknown value type"),
    "huge array": (header(0, 1) + key("k", 9, struct.pack("<IQ", 4, HUGE)) + bytes(20), "items"),
    "huge string array": (header(0, 1) + key("k", 9, struct.pack("<IQ", 8, HUGE)) + bytes(20), "items"),
    "array of arrays": (header(0, 1) + key("k", 9, struct.pack("<IQ", 9, 1)) + bytes(20), "array of type 9"),
    "key twice": (header(0, 2) + key("k", 0, b"\1") * 2, "twice"),
    "alignment 0": (header(0, 1) + key("general.alignment", 4, struct.pack("<I", 0)) + bytes(64), "alignment"),
    "alignment 24": (header(0, 1) + key("general.alignment", 4, struct.pack("<I", 24)) + bytes(64), "alignment"),
    "alignment text": (header(0, 1) + key("general.alignment", 8, string("32")) + bytes(64), "alignment"),
    "no dimensions": (header(1, 0) + entry("t", ()) + bytes(64), "dimensions"),
    "many dimensions": (header(1, 0) + entry("t", (1,), dims=2**31) + bytes(64), "dimensions"),
    "overflowing shape": (header(1, 0) + entry("t", (2**40, 2**40)) + bytes(64), "cut short"),
    "beyond the end": (header(1, 0) + entry("t", (64,)) + bytes(64), "cut short"),
    "offset beyond": (header(1, 0) + entry("t", (4,), offset=2**40) + bytes(64), "cut short"),
    "odd offset": (header(1, 0) + entry("t", (4,), offset=5) + bytes(64), "multiple"),
    "overlap": (header(2, 0) + entry("a", (16,)) + entry("b", (16,), offset=32) + bytes(256), "overlap"),
    "tensor twice": (header(2, 0) + entry("a", (4,)) + entry("a", (4,), offset=32) + bytes(256), "twice"),
    "row of no whole block": (header(1, 0) + entry("t", (33,), kind=2) + bytes(256), "whole"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_in_little_memory(tmp_path: Path, case: str) -> None:
    data, word = HOSTILE[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(InputError, match=word) as caught:
        read_gguf(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6
    assert str(path) in str(caught.value)


def test_unknown_tensor_types_are_named_when_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "iq.gguf"
    path.write_bytes(header(1, 0) + entry("t", (256,), kind=16) + bytes(512))
    with pytest.raises(InputError, match="ggml type 16"):
        read_gguf(path).get("t")


def read_all(path: Path) -> GGUFFile:
    read = read_gguf(path)
    for name in read.tensors:
        read.values(name)
    return read


@example(seed=33342, cut=False)  # a tensor with a dimension of 0
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), cut=st.booleans())
def test_damaged_files_are_read_or_refused(file: Path, tmp_path: Path, seed: int, cut: bool) -> None:
    """Bytes changed, chunks moved, the end cut off: values or a clear error, nothing else."""
    rng = random.Random(seed)
    data = bytearray(file.read_bytes())
    if cut:
        del data[rng.randrange(len(data)) :]
    else:
        for _ in range(rng.randint(1, 8)):
            at = rng.randrange(min(len(data), 700))
            data[at] = rng.choice((0, 1, 255, rng.randrange(256)))
        if rng.random() < 0.3:
            a, b = sorted(rng.sample(range(len(data)), 2))
            data[a:b] = data[a:b][::-1]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    with contextlib.suppress(InputError):  # any other exception fails the test
        read_all(path)
