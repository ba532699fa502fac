"""int8 x int8 products: y = (codes_x codes_wᵀ) * scale_x[token] * scale_w[output] + bias.

With one scale a token and one an output (SmoothQuant, Xiao et al., 2023, section 3, "O1"), the scales leave the sum
over columns, and the sum is of integers: exact in int32 up to 133 thousand columns, whatever the order. Tensor cores
multiply int8 at twice the rate of bf16, and the weight is half of bf16's bytes.

Both matrices keep columns contiguous, which is the order the tensor cores want for 8-bit operands. The weight is the
left operand, as in `w4a16.py`: a token or 16 occupy the short side of the product. A tile is at least 32 columns deep
(the least for 8 bits); here 128, one line of memory a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.triton import require


@triton.jit
def int8_kernel(x, x_scale, w, w_scale, bias, out, m, rows, cols, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """out (m, rows) of x int8 (m, cols), w int8 (rows, cols), scales float32 (m,) and (rows,)."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)[:, None]
    r = tl.program_id(1) * BM + tl.arange(0, BM)[None, :]
    k = tl.arange(0, BK)
    w_row, x_row = w + n.to(tl.int64) * cols, x + r.to(tl.int64) * cols
    acc = tl.zeros([BN, BM], tl.int32)
    for start in range(0, cols, BK):
        at = start + k
        a = tl.load(w_row + at[None, :], mask=(n < rows) & (at < cols)[None, :], other=0)
        b = tl.load(x_row + at[:, None], mask=(r < m) & (at < cols)[:, None], other=0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    y = acc.to(tl.float32) * tl.load(w_scale + n, mask=n < rows, other=0.0)
    y = y * tl.load(x_scale + r, mask=r < m, other=0.0)
    if bias is not None:
        y += tl.load(bias + n, mask=n < rows, other=0.0)
    tl.store(out + r.to(tl.int64) * rows + n, y.to(out.dtype.element_ty), mask=(n < rows) & (r < m))


def tile_of(m: int) -> dict[str, int]:
    """Tile and warps of an 8-bit product of m rows: chosen by shared memory and registers, not yet by timings."""
    bm = min(128, max(16, triton.next_power_of_2(m)))
    wide = bm > 32
    return {"BM": bm, "BN": 128 if wide else 32, "BK": 128, "num_warps": 8 if wide else 4, "num_stages": 3}


def linear(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """x int8 (m, cols), x_scale (m,), w int8 (rows, cols), w_scale (rows,), bias (rows,) float32 -> (m, rows)."""
    require(x, w)
    if x.dtype != torch.int8 or w.dtype != torch.int8 or x.shape[1] != w.shape[1]:
        raise ValueError(
            f"expected int8 codes with equal columns, got {x.dtype} {tuple(x.shape)}, {w.dtype} {tuple(w.shape)}"
        )
    (m, cols), rows = x.shape, len(w)
    out = torch.empty(m, rows, dtype=dtype, device=x.device)
    if m:
        tile = tile_of(m)
        grid = (triton.cdiv(rows, tile["BN"]), triton.cdiv(m, tile["BM"]))
        int8_kernel[grid](
            x.contiguous(), x_scale.contiguous(), w.contiguous(), w_scale.contiguous(), bias, out, m, rows, cols,
            **tile, enable_fp_fusion=True,
        )  # fmt: skip
    return out
