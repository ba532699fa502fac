"""The bytes of ggml's block types.

Codes of one width are folded: byte l of a run holds code l in its lowest bits, code l + n in the next ones, and so on.
With `fold(x (..., k, n), b)` = sum_j x[..., j, :] << (b j), every layout is a reshape and a fold:

    type   fields in order (bytes)                                           codes seen as
    Q4_0   d 2 | low 16                                                      (2, 16) by 4 bits
    Q5_0   d 2 | fifth bits 4 | low 16                                       the fifth bits: bit j of one 32-bit word
    Q4_1   d 2 | offset 2 | low 16          Q5_1  d 2 | offset 2 | fifth 4 | low 16          Q8_0  d 2 | codes 32
    Q2_K   (s | m << 4) 16 | low 64 | d 2 | dmin 2                           (2, 4, 32) by 2 bits
    Q3_K   third bits 32 | low 64 | s 12 | d 2                               third bits (8, 32) by 1 bit
    Q4_K   d 2 | dmin 2 | s and m 12 | low 128                               (4, 2, 32) by 4 bits
    Q5_K   d 2 | dmin 2 | s and m 12 | fifth bits 32 | low 128               fifth bits (8, 32) by 1 bit
    Q6_K   low 128 | high 64 | s 16 | d 2                                    low (2, 2, 64) by 4, high (2, 4, 32) by 2
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.ggml import Q3_K, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, BlockTensor, BlockType

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def fold(fields: Bytes, bits: int) -> Bytes:
    """(..., k, n) -> (..., n)"""
    shifts = np.arange(fields.shape[-2], dtype=np.uint8) * np.uint8(bits)
    folded: Bytes = np.bitwise_or.reduce(fields << shifts[:, None], axis=-2)
    return folded


def unfold(packed: Bytes, bits: int, k: int) -> Bytes:
    """(..., n) -> (..., k, n): the inverse of `fold`."""
    shifts = np.arange(k, dtype=np.uint8) * np.uint8(bits)
    fields: Bytes = (packed[..., None, :] >> shifts[:, None]) & np.uint8(2**bits - 1)
    return fields


def pack(tensor: BlockTensor) -> Bytes:
    """(out, in / block * nbytes) uint8: the rows as they lie in a GGUF file."""
    kind = tensor.type
    blocks = tensor.d.numel()
    raw = (tensor.codes - kind.q[0]).to(torch.uint8).numpy().reshape(blocks, kind.block)
    if kind is Q8_0:
        raw = tensor.codes.to(torch.int8).numpy().view(np.uint8).reshape(blocks, kind.block)
    d = _half_bytes(tensor.d)
    dmin = np.empty((blocks, 0), np.uint8)
    if tensor.dmin is not None:
        dmin = _half_bytes(-tensor.dmin if kind in (Q4_1, Q5_1) else tensor.dmin)  # those two add their offset
    s = tensor.s.numpy().reshape(blocks, -1)
    m = np.zeros_like(s) if tensor.m is None else tensor.m.numpy().reshape(blocks, -1)
    rows: Bytes = np.concatenate(_PACK[kind.name](raw, d, dmin, s, m), axis=1)
    return rows.reshape(len(tensor.codes), -1)


def unpack(rows: Bytes, kind: BlockType) -> BlockTensor:
    """The inverse of `pack`: (out, bytes) uint8."""
    out = len(rows)
    data = np.ascontiguousarray(rows).reshape(-1, kind.nbytes)
    raw, d, dmin, s, m = _UNPACK[kind.name](data)
    codes = torch.from_numpy(raw.astype(np.int16)).reshape(out, -1)
    codes = torch.from_numpy(raw.view(np.int8).astype(np.int16)).reshape(out, -1) if kind is Q8_0 else codes + kind.q[0]
    scale = torch.from_numpy(s.astype(np.int16)).reshape(out, -1)
    if kind.m is None:
        return BlockTensor(kind, codes, _halves(d, out), scale)
    offset = _halves(dmin, out)
    mins = torch.from_numpy(m.astype(np.int16)).reshape(out, -1)
    return BlockTensor(kind, codes, _halves(d, out), scale, -offset if kind in (Q4_1, Q5_1) else offset, mins)


def _half_bytes(x: Tensor) -> Bytes:
    return x.to(torch.float16).contiguous().numpy().view(np.uint8).reshape(-1, 2)


def _halves(data: Bytes, rows: int) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(data).view(np.float16).reshape(rows, -1).copy())


def _bit_plane(raw: Bytes, bit: int, k: int) -> Bytes:
    """One bit of every code, folded: (blocks, 256) -> (blocks, 32) for k = 8."""
    return fold(((raw >> np.uint8(bit)) & np.uint8(1)).reshape(len(raw), k, -1), 1)


def _fifth_bits(raw: Bytes) -> Bytes:
    packed: Bytes = np.packbits((raw >> np.uint8(4)) & np.uint8(1), axis=1, bitorder="little")
    return packed


def _nibbles(raw: Bytes, runs: int) -> Bytes:
    return fold((raw & np.uint8(15)).reshape(len(raw), runs, 2, -1), 4).reshape(len(raw), -1)


def _from_nibbles(packed: Bytes, runs: int) -> Bytes:
    return unfold(packed.reshape(len(packed), runs, -1), 4, 2).reshape(len(packed), -1)


def _pack_simple(raw: Bytes, d: Bytes, dmin: Bytes, _s: Any, _m: Any) -> list[Bytes]:
    return [d, dmin, _nibbles(raw, 1)]


def _pack_five(raw: Bytes, d: Bytes, dmin: Bytes, _s: Any, _m: Any) -> list[Bytes]:
    return [d, dmin, _fifth_bits(raw), _nibbles(raw, 1)]


def _pack_scales(s: Any, m: Any) -> Bytes:
    """Eight 6-bit s and m in 12 bytes: the last four lend their upper two bits to the bytes of the first four."""
    s, m = s.astype(np.uint8), m.astype(np.uint8)
    first = [x[:, :4] | ((x[:, 4:] >> np.uint8(4)) << np.uint8(6)) for x in (s, m)]
    last = (s[:, 4:] & np.uint8(15)) | ((m[:, 4:] & np.uint8(15)) << np.uint8(4))
    packed: Bytes = np.concatenate([*first, last], axis=1)
    return packed


def _unpack_scales(b: Bytes) -> tuple[Bytes, Bytes]:
    low, high = b[:, 8:] & np.uint8(15), b[:, 8:] >> np.uint8(4)
    s = np.concatenate([b[:, :4] & np.uint8(63), low | ((b[:, :4] >> np.uint8(6)) << np.uint8(4))], axis=1)
    m = np.concatenate([b[:, 4:8] & np.uint8(63), high | ((b[:, 4:8] >> np.uint8(6)) << np.uint8(4))], axis=1)
    return s, m


def _pack_q2_k(raw: Bytes, d: Bytes, dmin: Bytes, s: Any, m: Any) -> list[Bytes]:
    scales = s.astype(np.uint8) | (m.astype(np.uint8) << np.uint8(4))
    return [scales, fold(raw.reshape(len(raw), 2, 4, 32), 2).reshape(len(raw), -1), d, dmin]


def _pack_q3_k(raw: Bytes, d: Bytes, _dmin: Bytes, s: Any, _m: Any) -> list[Bytes]:
    u = (s - Q3_K.s[0]).astype(np.uint8)
    scales = [
        fold((u & np.uint8(15)).reshape(len(u), 2, 8), 4),
        fold((u >> np.uint8(4)).reshape(len(u), 4, 4), 2),
    ]
    low = fold((raw & np.uint8(3)).reshape(len(raw), 2, 4, 32), 2).reshape(len(raw), -1)
    return [_bit_plane(raw, 2, 8), low, *scales, d]


def _pack_q4_k(raw: Bytes, d: Bytes, dmin: Bytes, s: Any, m: Any) -> list[Bytes]:
    return [d, dmin, _pack_scales(s, m), _nibbles(raw, 4)]


def _pack_q5_k(raw: Bytes, d: Bytes, dmin: Bytes, s: Any, m: Any) -> list[Bytes]:
    return [d, dmin, _pack_scales(s, m), _bit_plane(raw, 4, 8), _nibbles(raw, 4)]


def _pack_q6_k(raw: Bytes, d: Bytes, _dmin: Bytes, s: Any, _m: Any) -> list[Bytes]:
    high = fold((raw >> np.uint8(4)).reshape(len(raw), 2, 4, 32), 2).reshape(len(raw), -1)
    return [_nibbles(raw, 2), high, s.astype(np.int8).view(np.uint8), d]


_Fields = tuple[Bytes, Bytes, Bytes, Any, Any]
_NONE = np.empty((0, 2), np.uint8)


def _ones(blocks: Bytes) -> Any:
    return np.ones((len(blocks), 1), np.int16)


def _unpack_simple(b: Bytes) -> _Fields:
    return _from_nibbles(b[:, -16:], 1), b[:, :2], b[:, 2:4], _ones(b), _ones(b)


def _unpack_five(b: Bytes) -> _Fields:
    fifth = np.unpackbits(b[:, -20:-16], axis=1, bitorder="little")
    return _from_nibbles(b[:, -16:], 1) | (fifth << np.uint8(4)), b[:, :2], b[:, 2:4], _ones(b), _ones(b)


def _unpack_q2_k(b: Bytes) -> _Fields:
    raw = unfold(b[:, 16:80].reshape(-1, 2, 32), 2, 4).reshape(len(b), -1)
    return raw, b[:, 80:82], b[:, 82:84], b[:, :16] & np.uint8(15), b[:, :16] >> np.uint8(4)


def _unpack_q3_k(b: Bytes) -> _Fields:
    third = unfold(b[:, :32], 1, 8).reshape(len(b), -1)
    raw = unfold(b[:, 32:96].reshape(-1, 2, 32), 2, 4).reshape(len(b), -1) | (third << np.uint8(2))
    low = unfold(b[:, 96:104], 4, 2).reshape(len(b), -1)
    high = unfold(b[:, 104:108], 2, 4).reshape(len(b), -1)
    return raw, b[:, 108:110], _NONE, (low | (high << np.uint8(4))).astype(np.int16) + Q3_K.s[0], _NONE


def _unpack_q4_k(b: Bytes) -> _Fields:
    return _from_nibbles(b[:, 16:], 4), b[:, :2], b[:, 2:4], *_unpack_scales(b[:, 4:16])


def _unpack_q5_k(b: Bytes) -> _Fields:
    fifth = unfold(b[:, 16:48], 1, 8).reshape(len(b), -1)
    raw = _from_nibbles(b[:, 48:], 4) | (fifth << np.uint8(4))
    return raw, b[:, :2], b[:, 2:4], *_unpack_scales(b[:, 4:16])


def _unpack_q6_k(b: Bytes) -> _Fields:
    high = unfold(b[:, 128:192].reshape(-1, 2, 32), 2, 4).reshape(len(b), -1)
    s = np.ascontiguousarray(b[:, 192:208]).view(np.int8)
    return _from_nibbles(b[:, :128], 2) | (high << np.uint8(4)), b[:, 208:210], _NONE, s, _NONE


_PACK: dict[str, Callable[..., list[Bytes]]] = {
    Q4_0.name: _pack_simple, Q4_1.name: _pack_simple, Q5_0.name: _pack_five, Q5_1.name: _pack_five,
    Q8_0.name: lambda raw, d, *_: [d, raw],
    "q2_k": _pack_q2_k, "q3_k": _pack_q3_k, "q4_k": _pack_q4_k, "q5_k": _pack_q5_k, "q6_k": _pack_q6_k,
}  # fmt: skip
_UNPACK: dict[str, Callable[[Bytes], _Fields]] = {
    Q4_0.name: _unpack_simple, Q4_1.name: _unpack_simple, Q5_0.name: _unpack_five, Q5_1.name: _unpack_five,
    Q8_0.name: lambda b: (np.ascontiguousarray(b[:, 2:]), b[:, :2], _NONE, _ones(b), _NONE),
    "q2_k": _unpack_q2_k, "q3_k": _unpack_q3_k, "q4_k": _unpack_q4_k, "q5_k": _unpack_q5_k, "q6_k": _unpack_q6_k,
}  # fmt: skip
