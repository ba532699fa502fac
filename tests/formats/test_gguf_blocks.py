"""The bytes of ggml's block types, against a second decoder written weight by weight from the specification."""

import struct

import numpy as np
import pytest
import torch

from lowbit.formats.gguf_blocks import pack, unpack
from lowbit.ggml import TYPES, BlockTensor, BlockType

BLOCK_TYPES = [t for t in TYPES.values() if isinstance(t, BlockType)]


def half(data: bytes) -> float:
    return float(np.frombuffer(data, "<f2")[0])


def k_scale(b: bytes, j: int) -> tuple[int, int]:
    """The j-th 6-bit (scale, min) of twelve bytes."""
    if j < 4:
        return b[j] & 63, b[j + 4] & 63
    return (b[j + 4] & 15) | (b[j - 4] >> 6) << 4, (b[j + 4] >> 4) | (b[j] >> 6) << 4


def naive_small(name: str, b: bytes) -> list[float]:
    d, f = np.float32(half(b[:2])), np.float32
    if name == "q8_0":
        return [f(d * f(q)) for q in struct.unpack("<32b", b[2:])]
    offset = f(half(b[2:4])) if name.endswith("1") else None
    five = name.startswith("q5")
    start = 2 + (2 if offset is not None else 0)
    high = int.from_bytes(b[start : start + 4], "little") if five else 0
    codes = b[start + (4 if five else 0) :]
    values = []
    for j in range(32):
        q = codes[j % 16] >> (4 if j >= 16 else 0) & 15
        q |= (high >> j & 1) << 4
        values.append(f(d * f(q) + offset) if offset is not None else f(d * f(q - (16 if five else 8))))
    return values


def naive_k(name: str, b: bytes) -> list[float]:
    f, values = np.float32, []
    for e in range(256):
        if name == "q2_k":
            scales, codes, d, low = b[:16], b[16:80], f(half(b[80:82])), f(half(b[82:84]))
            q = codes[e // 128 * 32 + e % 32] >> (2 * (e % 128 // 32)) & 3
            s, m = scales[e // 16] & 15, scales[e // 16] >> 4
        elif name == "q3_k":
            masks, codes, sc, d = b[:32], b[32:96], b[96:108], f(half(b[108:110]))
            q = codes[e // 128 * 32 + e % 32] >> (2 * (e % 128 // 32)) & 3
            q -= 0 if masks[e % 32] >> (e // 32) & 1 else 4
            g = e // 16
            s = (sc[g % 8] >> (4 * (g // 8)) & 15 | (sc[8 + g % 4] >> (2 * (g // 4)) & 3) << 4) - 32
            low, m = f(0), 0
        elif name == "q6_k":
            lows, highs, d = b[:128], b[128:192], f(half(b[208:210]))
            part, k, i = e // 128, e % 128 // 32, e % 32
            q = lows[part * 64 + k % 2 * 32 + i] >> (4 * (k // 2)) & 15 | (highs[part * 32 + i] >> (2 * k) & 3) << 4
            q -= 32
            s = struct.unpack("<16b", b[192:208])[e // 16]
            low, m = f(0), 0
        else:
            d, low = f(half(b[:2])), f(half(b[2:4]))
            codes = b[16:] if name == "q4_k" else b[48:]
            q = codes[e // 64 * 32 + e % 32] >> (4 * (e % 64 // 32)) & 15
            if name == "q5_k":
                q |= (b[16 + e % 32] >> (e // 32) & 1) << 4
            s, m = k_scale(b[4:16], e // 32)
        values.append(f(f(f(d * f(s)) * f(q)) - f(low * f(m))))
    return values


def random_rows(kind: BlockType, rows: int, blocks: int) -> np.ndarray:
    """Random blocks whose half-precision fields are finite."""
    rng = np.random.default_rng(kind.id)
    raw = rng.integers(0, 256, (rows * blocks, kind.nbytes), dtype=np.uint8)
    fields = {"q2_k": (80, 82), "q3_k": (108,), "q6_k": (208,), "q4_1": (0, 2), "q5_1": (0, 2), "q4_k": (0, 2)}
    for at in fields.get(kind.name, (0, 2) if kind.name == "q5_k" else (0,)):
        halves = rng.normal(0, 0.02, len(raw)).astype("<f2")
        raw[:, at : at + 2] = halves[:, None].view(np.uint8)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda t: t.name)
def test_the_naive_decoder_reads_the_same_values(kind: BlockType) -> None:
    rows = random_rows(kind, 3, 2)
    naive = naive_small if kind.block == 32 else naive_k
    expected = [naive(kind.name, bytes(block)) for block in rows.reshape(-1, kind.nbytes)]
    assert torch.equal(unpack(rows, kind).dequantize(), torch.tensor(np.array(expected, np.float32)).reshape(3, -1))


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda t: t.name)
def test_every_block_survives_unpacking_and_packing_to_the_last_bit(kind: BlockType) -> None:
    rows = random_rows(kind, 4, 3)
    assert np.array_equal(pack(unpack(rows, kind)), rows)


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda t: t.name)
def test_extreme_fields_keep_their_place(kind: BlockType) -> None:
    """All codes, scales and mins at either end: neighbours must not see each other's bits."""
    width, groups = 2 * kind.block, 2 * kind.block // kind.group
    for c, s in ((0, 0), (0, 1), (1, 0), (1, 1)):
        codes = torch.full((1, width), kind.q[c], dtype=torch.int16)
        codes[0, ::3] = kind.q[1 - c]
        scale = torch.full((1, groups), kind.s[s], dtype=torch.int16)
        scale[0, ::2] = kind.s[1 - s]
        d = torch.full((1, 2), 0.5, dtype=torch.float16)
        mins = None if kind.m is None else torch.full((1, groups), kind.m[1 - s], dtype=torch.int16)
        tensor = BlockTensor(kind, codes, d, scale, None if mins is None else d * 2, mins)
        back = unpack(pack(tensor), kind)
        assert torch.equal(back.codes, codes)
        assert torch.equal(back.s, scale)
        assert mins is None or (back.m is not None and torch.equal(back.m, mins))
        assert torch.equal(back.dequantize(), tensor.dequantize())


def test_bits_per_weight_are_the_published_ones() -> None:
    published = {"q4_0": 4.5, "q4_1": 5.0, "q5_0": 5.5, "q5_1": 6.0, "q8_0": 8.5, "q2_k": 2.625, "q3_k": 3.4375}
    published |= {"q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625}
    assert {t.name: t.bits_per_weight for t in BLOCK_TYPES} == published
