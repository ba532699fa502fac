"""FP8 E4M3 x E4M3 products, scaled per tensor, per channel or per 128 x 128 block of the weight.

FP8 formats: Micikevicius et al., 2022. Products of two E4M3 values are exact in float32, but Hopper's tensor cores keep
only about 14 bits of a running sum of them (DeepSeek-V3, 2024, section 3.3.2). So a sum leaves the tensor core after
every 128 columns and is added in float32 on the ordinary cores; `max_num_imprecise_acc` keeps the compiler from
folding that addition back into the tensor core. With block scales the addition is needed anyway: the sum of 128 columns
is multiplied by its block's scale (and by the token's scale of that group of columns) first.

Needs compute capability 8.9 (Ada) or newer: older tensor cores have no FP8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.errors import InputError
from lowbit.kernels.triton import require
from lowbit.kernels.triton.w8a8 import tile_of

BLOCK = 128


@triton.jit
def fp8_kernel(
    x, x_scale, w, w_scale, bias, out, m, rows, cols, x_groups, w_groups,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BLOCKED: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """out (m, rows) of x (m, cols), w (rows, cols); scales (m, x_groups) and (rows / 128 or rows, w_groups)."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)[:, None]
    r = tl.program_id(1) * BM + tl.arange(0, BM)[None, :]
    k = tl.arange(0, BK)
    w_row, x_row = w + n.to(tl.int64) * cols, x + r.to(tl.int64) * cols
    acc = tl.zeros([BN, BM], tl.float32)
    for step in range(tl.cdiv(cols, BK)):
        at = step * BK + k
        a = tl.load(w_row + at[None, :], mask=(n < rows) & (at < cols)[None, :], other=0.0)
        b = tl.load(x_row + at[:, None], mask=(r < m) & (at < cols)[:, None], other=0.0)
        part = tl.dot(a, b, max_num_imprecise_acc=BK)
        if BLOCKED:
            part = part * tl.load(w_scale + n // 128 * w_groups + step, mask=n < rows, other=0.0)
        if GROUPED:
            part = part * tl.load(x_scale + r * x_groups + step, mask=r < m, other=0.0)
        acc += part
    if not BLOCKED:
        acc = acc * tl.load(w_scale + n, mask=n < rows, other=0.0)
    if not GROUPED:
        acc = acc * tl.load(x_scale + r, mask=r < m, other=0.0)
    if bias is not None:
        acc += tl.load(bias + n, mask=n < rows, other=0.0)
    tl.store(out + r.to(tl.int64) * rows + n, acc.to(out.dtype.element_ty), mask=(n < rows) & (r < m))


def supported(device: torch.device) -> bool:
    """Has this device tensor cores for FP8? (The interpreter has everything.)"""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def linear(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """x and w float8_e4m3fn (m, cols) and (rows, cols) -> (m, rows).

    x_scale float32 (m, 1), or (m, ceil(cols / 128)); w_scale float32 (1, 1) tensor, (rows, 1) channel, or
    (ceil(rows / 128), ceil(cols / 128)) block.
    """
    require(x, w)
    if not supported(x.device):
        raise InputError("FP8 products need a GPU of compute capability 8.9 or newer; use w8a8 on this one.")
    (m, cols), rows = x.shape, len(w)
    k_blocks, n_blocks = triton.cdiv(cols, BLOCK), triton.cdiv(rows, BLOCK)
    grouped, blocked = x_scale.shape[1] > 1, tuple(w_scale.shape) not in ((1, 1), (rows, 1))
    if (grouped and x_scale.shape[1] != k_blocks) or (blocked and tuple(w_scale.shape) != (n_blocks, k_blocks)):
        raise ValueError(
            f"scales {tuple(x_scale.shape)} and {tuple(w_scale.shape)} fit neither a tensor, rows nor blocks of 128 "
            f"of {m} x {cols} and {rows} x {cols}"
        )
    if not blocked:
        w_scale = w_scale.expand(rows, 1)
    out = torch.empty(m, rows, dtype=dtype, device=x.device)
    if m:
        tile = tile_of(m)
        grid = (triton.cdiv(rows, tile["BN"]), triton.cdiv(m, tile["BM"]))
        fp8_kernel[grid](
            x.contiguous(), x_scale.contiguous(), w.contiguous(), w_scale.contiguous(), bias, out, m, rows, cols,
            x_scale.shape[1], w_scale.shape[1], **tile, BLOCKED=blocked, GROUPED=grouped, enable_fp_fusion=True,
        )  # fmt: skip
    return out
