"""Weight-only products: int2/3/4/8 or table weights times fp16 or bf16 activations, y = x Wᵀ + bias.

Two kernels over one layout (`layout.py`), because one row and many have different bottlenecks:

*gemv*, a row of x: bound by the bytes of W. Every weight becomes a float and is multiplied on the ordinary cores.

*gemm*, more rows: a slice of 32 columns is one tl.dot. The *weight* is the left operand, y is computed transposed: its
many rows fill the tensor core's tall side (64 for Hopper's wgmma, 16 before) straight from registers, and x's few rows
the short side, so 16 rows waste nothing.

Both split the columns among several programs (split-K) when the rows alone would leave multiprocessors idle. Each
writes its partial sums, which are added afterwards in a fixed order: no atomics, the same bits every time.

*Codes to floats.* Converting integers is slow (a quarter of the rate or less), so a code is put into the low bits of
the float 2^23, whose last place is 1: masked where it stands, at bit p of the word, bits(2^23) | word & mask is the
float 2^23 + code 2^p. One fused multiply-add with 2^-p and -(2^(23-p) + zero) leaves code - zero, exactly: two
instructions a weight. (The idea is old; Kim et al., "Who Says Elephants Can't Run", 2022, use it for fp16.) code - zero
is exact in fp16 and bf16 too, and scales multiply float32 sums of a whole group: W itself is never rounded.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.triton import INTERPRETED, require
from lowbit.kernels.triton.layout import WORDS, TiledWeight, slices
from lowbit.kernels.triton.lookup import table_value

_MAGIC_BITS: tl.constexpr = tl.constexpr(0x4B000000)  # of the float 2^23


@triton.jit
def integer_value(words, high, zero, SLICE: tl.constexpr, BITS: tl.constexpr):
    """The codes of slice SLICE less their zero: words, high (BN, 32), zero (BN, 1) -> float32 (BN, 32)."""
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    AT: tl.constexpr = (SLICE * LOW) % 16
    half = words if SLICE * LOW < 16 else words >> 16
    code = half & (((1 << LOW) - 1) << AT)
    if BITS == 3:
        code |= ((high.to(tl.int32) >> SLICE) & 1) << (AT + 2)
    return (code | _MAGIC_BITS).to(tl.float32, bitcast=True) * (1.0 / (1 << AT)) - (zero + (1 << (23 - AT)))


@triton.jit
def group_of(scales, zeros, column, group, n_groups, panel_rows, n, BITS: tl.constexpr):
    """Scale and zero (BN, 1), float32, of the rows n in the group that `column` is in."""
    at = tl.minimum(column // group, n_groups - 1) * panel_rows + n[:, None]
    scale = tl.load(scales + at, mask=n[:, None] < panel_rows, other=0.0).to(tl.float32)
    zero = tl.zeros_like(scale) + (1 << (BITS - 1))
    if zeros is not None:
        zero = tl.load(zeros + at, mask=n[:, None] < panel_rows, other=0).to(tl.float32)
    return scale, zero


@triton.jit
def gemv_kernel(
    x, words, high, scales, zeros, table, out, m, rows, cols, panel_rows, tiles, tiles_each, group, n_groups,
    BITS: tl.constexpr, RUN: tl.constexpr, EVEN: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Partial sums out[split] (m, rows), float32, of x (m, cols).

    A program has BN rows, some tiles of columns and one row of x. RUN slices share a scale; EVEN: tiles fill cols.
    """
    COUNT: tl.constexpr = 16 if BITS == 3 else 32 // BITS
    n, j, r = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, 32)[None, :], tl.program_id(2)
    inside = n[:, None] < panel_rows
    at = ((n // 16) * tiles * 512 + (n % 16) * 32)[:, None] + j
    if table is not None:
        entries = tl.load(table + n[:, None] * 16 + tl.arange(0, 16)[None, :], mask=inside, other=0.0)
        entries = entries.to(x.dtype.element_ty)
    row = x + r.to(tl.int64) * cols
    acc = tl.zeros([BN, 32], tl.float32)
    first = tl.program_id(1) * tiles_each
    for tile in range(first, tl.minimum(first + tiles_each, tiles)):
        word = tl.load(words + at + tile * 512, mask=inside, other=0, eviction_policy="evict_first")
        bit = word
        if high is not None:
            bit = tl.load(high + at + tile * 512, mask=inside, other=0, eviction_policy="evict_first")
        for run in tl.static_range(COUNT // RUN):
            column = (tile * COUNT + run * RUN) * 32
            scale, zero = group_of(scales, zeros, column, group, n_groups, panel_rows, n, BITS)
            part = tl.zeros([BN, 32], tl.float32)
            for s in tl.static_range(RUN):
                if table is not None:
                    value = table_value(word, entries, run * RUN + s).to(tl.float32)
                else:
                    value = integer_value(word, bit, zero, run * RUN + s, BITS)
                k = column + s * 32 + j
                if EVEN:
                    xs = tl.load(row + k)
                else:
                    xs = tl.load(row + k, mask=k < cols, other=0.0)
                part += xs.to(tl.float32) * value
            acc += part * scale
    place = (tl.program_id(1) * m + r).to(tl.int64) * rows + n
    tl.store(out + place, tl.sum(acc, 1), mask=n < rows)


@triton.jit
def gemm_kernel(
    x, words, high, scales, zeros, table, out, m, rows, cols, panel_rows, tiles, tiles_each, group, n_groups,
    BITS: tl.constexpr, RUN: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """As gemv_kernel, for BM rows of x with tl.dot. UPCAST: for the interpreter, whose tl.dot cannot multiply bf16."""
    COUNT: tl.constexpr = 16 if BITS == 3 else 32 // BITS
    n, j = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, 32)
    r = tl.program_id(2) * BM + tl.arange(0, BM)[None, :]
    inside = n[:, None] < panel_rows
    at = ((n // 16) * tiles * 512 + (n % 16) * 32)[:, None] + j[None, :]
    if table is not None:
        entries = tl.load(table + n[:, None] * 16 + tl.arange(0, 16)[None, :], mask=inside, other=0.0)
        entries = entries.to(x.dtype.element_ty)
    acc = tl.zeros([BN, BM], tl.float32)
    first = tl.program_id(1) * tiles_each
    for tile in range(first, tl.minimum(first + tiles_each, tiles)):
        word = tl.load(words + at + tile * 512, mask=inside, other=0)
        bit = word
        if high is not None:
            bit = tl.load(high + at + tile * 512, mask=inside, other=0)
        for run in tl.static_range(COUNT // RUN):
            column = (tile * COUNT + run * RUN) * 32
            scale, zero = group_of(scales, zeros, column, group, n_groups, panel_rows, n, BITS)
            part = tl.zeros([BN, BM], tl.float32)
            for s in tl.static_range(RUN):
                if table is not None:
                    value = table_value(word, entries, run * RUN + s)
                else:
                    value = integer_value(word, bit, zero, run * RUN + s, BITS).to(x.dtype.element_ty)
                k = column + s * 32 + j[:, None]
                known = (r < m) if EVEN else (r < m) & (k < cols)
                xs = tl.load(x + r.to(tl.int64) * cols + k, mask=known, other=0.0)
                if UPCAST:
                    part = tl.dot(value.to(tl.float32), xs.to(tl.float32), part)
                else:
                    part = tl.dot(value, xs, part)
            acc += part * scale
    place = (tl.program_id(1) * m + r).to(tl.int64) * rows + n[:, None]
    tl.store(out + place, acc, mask=(r < m) & (n < rows)[:, None])


def multiprocessors(x: Tensor) -> int:
    """How many programs the device runs at least at once; a small number in the interpreter."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 8


def split_of(programs: int, tiles: int, want: int) -> tuple[int, int]:
    """(splits, tiles each) so that programs * splits is about `want`; no split is empty."""
    each = -(-tiles // max(1, min(tiles, -(-want // programs))))
    return -(-tiles // each), each


def linear(x: Tensor, w: TiledWeight, kernel: str | None = None) -> Tensor:
    """x (..., cols) in fp16 or bf16 -> (..., rows) in the same type.

    `kernel` "gemv" (any number of rows, W read once for each) or "gemm"; by default "gemv" for one row.
    """
    require(x, w.words)
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"the GPU kernels multiply fp16 or bf16 activations, got {x.dtype}")
    if x.shape[-1] != w.cols:
        raise ValueError(f"expected {w.cols} columns, got {x.shape[-1]}")
    flat = x.reshape(-1, w.cols).contiguous()
    if not len(flat):
        return x.new_empty((*x.shape[:-1], w.rows))
    y = _product(flat, w, kernel or ("gemv" if len(flat) == 1 else "gemm"))
    if w.bias is not None:
        y = y + w.bias
    return y.to(x.dtype).view(*x.shape[:-1], w.rows)


def _product(x: Tensor, w: TiledWeight, kernel: str) -> Tensor:
    """x (m, cols) -> float32 (m, rows) without bias: launch, then add the splits."""
    m, tiles, count = len(x), w.words.shape[1], slices(w.bits)
    run = count if w.group >= w.cols else math.gcd(w.group // WORDS, count)
    bm = 1 if kernel == "gemv" else min(64, max(16, triton.next_power_of_2(m)))
    # Rows of W of a program: fewer where a tile has 16 slices, whose floats would not fit the registers otherwise.
    bn = 32 if bm == 1 and count == 16 else 64 if bm <= 16 or count == 16 else 128
    programs, rows_of_x = triton.cdiv(w.rows, bn), triton.cdiv(m, bm)
    splits, each = split_of(programs * rows_of_x, tiles, 4 * multiprocessors(x))
    out = torch.empty(splits, m, w.rows, dtype=torch.float32, device=x.device)
    arguments = (
        x, w.words, w.high, w.scales, w.zeros, w.table, out, m, w.rows, w.cols, w.scales.shape[1], tiles, each,
        w.group, len(w.scales),
    )  # fmt: skip
    constants = {"BITS": w.bits, "RUN": run, "EVEN": w.cols % (count * WORDS) == 0, "BN": bn, "enable_fp_fusion": True}
    grid = (programs, splits, rows_of_x)
    if kernel == "gemv":
        gemv_kernel[grid](*arguments, **constants, num_warps=4)
    else:
        stages = 3 if count * bm <= 256 else 2  # copies of a tile's columns of x in shared memory, 99 KB on sm_86
        gemm_kernel[grid](
            *arguments, **constants, BM=bm, UPCAST=INTERPRETED, num_warps=4 if bn == 64 else 8, num_stages=stages
        )
    return out.sum(0) if splits > 1 else out[0]
