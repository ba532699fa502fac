"""A paged key-value cache in int8 or FP8, and decoding attention over it.

*Storage.* Pages of `page` tokens (PagedAttention, Kwon et al., 2023, section 4.1), found through a table of page
numbers for each sequence. Every vector of a token and head has one float32 scale, max / 127 or max / 448:

    codes   (pages, kv_heads, page, dim) int8 or float8_e4m3fn         scales  (pages, kv_heads, page) float32

*Attention* of one new token a sequence, as flash-decoding (Dao et al., 2023): the context is split among programs,
since a batch of a few sequences would leave most multiprocessors idle; each keeps a running maximum and sum (the online
softmax of Milakov and Gimelshein, 2018) and writes its part, and a second kernel joins the parts. The queries that
share a key head are the rows of one tl.dot, padded to 16, so a key is read once for all of them.

*Scales never touch the codes.* A key's scale multiplies its score; a value's scale multiplies its probability, after
division by the largest scale of the tile so that the product fits fp16. int8 and E4M3 codes are exact in fp16 and bf16,
so the tensor cores multiply exactly what is stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.triton import INTERPRETED, require
from lowbit.kernels.triton.activations import LIMITS, encode

_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
TOKENS = 64  # of a tile of the context


@triton.jit
def _store_vector(
    source, codes, scales, at, d, DIM: tl.constexpr, LIMIT: tl.constexpr, INVERSE: tl.constexpr, FP8: tl.constexpr
):
    v = tl.load(source + d, mask=d < DIM, other=0.0).to(tl.float32)
    top = tl.max(tl.abs(v), 0)
    tl.store(codes + at * DIM + d, encode(v, top, LIMIT, FP8), mask=d < DIM)
    tl.store(scales + at, tl.where(top >= 1e-30, top * INVERSE, 0.0))


@triton.jit
def store_kernel(
    k, v, k_codes, v_codes, k_scales, v_scales, slots, kv_heads, page,
    DIM: tl.constexpr, BD: tl.constexpr, LIMIT: tl.constexpr, INVERSE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Key and value of one token and head into slot page number * page + place; a negative slot stores nothing."""
    token, head, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BD)
    slot = tl.load(slots + token)
    if slot >= 0:
        at = (slot // page * kv_heads + head) * page + slot % page
        source = (token * kv_heads + head) * DIM
        _store_vector(k + source, k_codes, k_scales, at, d, DIM, LIMIT, INVERSE, FP8)
        _store_vector(v + source, v_codes, v_scales, at, d, DIM, LIMIT, INVERSE, FP8)


@triton.jit
def attention_kernel(
    q, k_codes, v_codes, k_scales, v_scales, pages, lengths, parts, tops, sums,
    heads, kv_heads, page, max_pages, scale, softcap, window,
    DIM: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr, BG: tl.constexpr, BT: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """One split of the context for the GROUP queries of a key head: parts (batch, heads, splits, DIM), not divided."""
    b, head, split, splits = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    g, d, t = tl.arange(0, BG), tl.arange(0, BD), tl.arange(0, BT)
    length = tl.load(lengths + b)
    first = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    start = first // BT * BT
    each = tl.cdiv(tl.cdiv(length - start, BT), splits) * BT
    begin = start + split * each
    query = head * GROUP + g
    qs = tl.load(
        q + ((b * heads + query) * DIM)[:, None] + d[None, :], mask=(g < GROUP)[:, None] & (d < DIM)[None, :], other=0.0
    )
    top = tl.full([BG], float("-inf"), tl.float32)
    total = tl.zeros([BG], tl.float32)
    acc = tl.zeros([BG, BD], tl.float32)
    for base in range(begin, tl.minimum(begin + each, length), BT):
        at = base + t
        known = (at >= first) & (at < length)
        number = tl.load(pages + b * max_pages + at // page, mask=known, other=0).to(tl.int64)
        slot = (number * kv_heads + head) * page + at % page
        both = known[:, None] & (d < DIM)[None, :]
        ks = tl.load(k_codes + slot[:, None] * DIM + d[None, :], mask=both, other=0.0).to(tl.float32).to(qs.dtype)
        if UPCAST:
            score = tl.dot(qs.to(tl.float32), tl.trans(ks.to(tl.float32)))
        else:
            score = tl.dot(qs, tl.trans(ks))
        score = score * (tl.load(k_scales + slot, mask=known, other=0.0) * scale)[None, :]
        if softcap > 0:
            score = (2.0 / (1.0 + tl.exp2(score * (-2.0 * _LOG2E / softcap))) - 1.0) * softcap
        score = tl.where(known[None, :], score * _LOG2E, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))  # finite: a tile has a known token
        p = tl.exp2(score - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(p, 1)
        v_scale = tl.load(v_scales + slot, mask=known, other=0.0)
        largest = tl.maximum(tl.max(v_scale, 0), 1e-30)
        vs = tl.load(v_codes + slot[:, None] * DIM + d[None, :], mask=both, other=0.0).to(tl.float16)
        weight = (p * (v_scale / largest)[None, :]).to(tl.float16)
        if UPCAST:
            mixed = tl.dot(weight.to(tl.float32), vs.to(tl.float32))
        else:
            mixed = tl.dot(weight, vs)
        acc = acc * fade[:, None] + mixed * largest
        top = higher
    part = (b * heads + query) * splits + split
    tl.store(parts + part[:, None] * DIM + d[None, :], acc, mask=(g < GROUP)[:, None] & (d < DIM)[None, :])
    tl.store(tops + part, top, mask=g < GROUP)
    tl.store(sums + part, total, mask=g < GROUP)


@triton.jit
def join_kernel(parts, tops, sums, out, splits, DIM: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr):
    """out (batch * heads, DIM) from the splits; an empty context gives zeros."""
    row, s, d = tl.program_id(0), tl.arange(0, BS), tl.arange(0, BD)
    top = tl.load(tops + row * splits + s, mask=s < splits, other=float("-inf"))
    highest = tl.max(top, 0)
    weight = tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(weight * tl.load(sums + row * splits + s, mask=s < splits, other=0.0), 0)
    inside = (s < splits)[:, None] & (d < DIM)[None, :]
    part = tl.load(parts + (row * splits + s)[:, None] * DIM + d[None, :], mask=inside, other=0.0)
    y = tl.sum(part * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + row * DIM + d, y.to(out.dtype.element_ty), mask=d < DIM)


def store(k: Tensor, v: Tensor, cache: tuple[Tensor, Tensor, Tensor, Tensor], slots: Tensor) -> None:
    """k and v (tokens, kv_heads, dim) into `cache` (k_codes, v_codes, k_scales, v_scales) at slots (tokens,) int64."""
    require(k, *cache)
    tokens, kv_heads, dim = k.shape
    dtype, page = cache[0].dtype, cache[0].shape[2]
    if tokens:
        store_kernel[(tokens, kv_heads)](
            k.contiguous(), v.contiguous(), *cache, slots, kv_heads, page, DIM=dim, BD=triton.next_power_of_2(dim),
            LIMIT=LIMITS[dtype], INVERSE=1 / LIMITS[dtype], FP8=dtype == torch.float8_e4m3fn, num_warps=1,
            enable_fp_fusion=False,
        )  # fmt: skip


def attention(
    q: Tensor, cache: tuple[Tensor, Tensor, Tensor, Tensor], pages: Tensor, lengths: Tensor, scale: float,
    softcap: float = 0.0, window: int = 0, splits: int | None = None, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """q (batch, heads, dim) fp16 or bf16, the last token of each context -> the same shape in `dtype` (default: q's).

    pages (batch, max_pages) int32: the numbers of a sequence's pages in order; lengths (batch,) int32: tokens of its
    context, this one included.
    """
    require(q, *cache)
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"queries are fp16 or bf16, got {q.dtype}")
    (batch, heads, dim), (kv_heads, page) = q.shape, cache[0].shape[1:3]
    if heads % kv_heads:
        raise ValueError(f"{heads} heads are no multiple of {kv_heads} key heads")
    if splits is None:  # from shapes alone, never from lengths: the same launch for every step of a CUDA graph
        busy = 2 * torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 8
        splits = max(1, min(64, busy // max(1, batch * kv_heads), -(-pages.shape[1] * page // (4 * TOKENS))))
    parts = torch.empty(batch, heads, splits, dim, dtype=torch.float32, device=q.device)
    tops, sums = torch.empty(2, batch, heads, splits, dtype=torch.float32, device=q.device)
    out, wide, group = (
        torch.empty(q.shape, dtype=dtype or q.dtype, device=q.device),
        triton.next_power_of_2(dim),
        heads // kv_heads,
    )
    if batch:
        attention_kernel[(batch, kv_heads, splits)](
            q.contiguous(), *cache, pages, lengths, parts, tops, sums, heads, kv_heads, page, pages.shape[1],
            float(scale), float(softcap), window, DIM=dim, BD=wide, GROUP=group,
            BG=max(16, triton.next_power_of_2(group)), BT=TOKENS, UPCAST=INTERPRETED, num_warps=4, num_stages=2,
            enable_fp_fusion=True,
        )  # fmt: skip
        join_kernel[(batch * heads,)](
            parts, tops, sums, out, splits, DIM=dim, BD=wide, BS=triton.next_power_of_2(splits), num_warps=2,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out
