"""RMSNorm and dynamic quantization of its result in one pass: x (m, n) -> int8 or FP8 codes and scales.

Per token (one scale a row), as LLM.int8() and ZeroQuant do, or per group of columns of a row (DeepSeek-V3, section
3.3.2, 128 columns for FP8). Done alone, the norm writes n values that the quantization reads again; together, a row is
read once and leaves as bytes. Steps as in `kernels/reference.py`, to the bit: code = round(x * (L / max|x|)), ties to
even, scale = max|x| * (1 / L), L = 127 or 448, and a group whose largest value is below 1e-30 is zeros.

Products must not be fused into the rounding's additions here, or ties would fall otherwise than in the twin: the
kernel is compiled without fused multiply-adds. It is bound by memory, so they would not make it faster.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.triton import require

_ROUND: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it drops the fraction, ties to even
_E4M3_LEAST: tl.constexpr = tl.constexpr(121)  # float32's exponent field at 2^-6, below which E4M3 steps stay 2^-9
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@triton.jit
def round_integer(v):
    """The nearest integer, ties to even, of |v| < 2^22."""
    return (v + _ROUND) - _ROUND


@triton.jit
def round_e4m3(v):
    """The nearest E4M3 value, ties to even, of |v| <= 448, still as float32.

    As round_integer, with 1.5 * 2^(e + 20) for a v in [2^e, 2^(e + 1)): its last place is E4M3's step there. The cast
    that follows is then exact: Triton's interpreter casts float32 to FP8 without carrying into the exponent.
    """
    exponent = tl.maximum((v.to(tl.int32, bitcast=True) >> 23) & 255, _E4M3_LEAST)
    big = (((exponent + 20) << 23) | 0x400000).to(tl.float32, bitcast=True)
    return (v + big) - big


@triton.jit
def encode(v, top, LIMIT: tl.constexpr, FP8: tl.constexpr):
    """Codes of v, float32, whose largest magnitude is `top` (which broadcasts to v)."""
    live = top >= 1e-30
    multiplier = tl.where(live, tl.div_rn(tl.zeros_like(top) + LIMIT, tl.where(live, top, 1.0)), 0.0)
    v = tl.minimum(tl.maximum(v * multiplier, -LIMIT), LIMIT)
    return round_e4m3(v).to(tl.float8e4nv) if FP8 else round_integer(v).to(tl.int8)


@triton.jit
def quantize_kernel(
    x, weight, codes, scales, n, eps, LIMIT: tl.constexpr, INVERSE: tl.constexpr, FP8: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of x in a program of BLOCK >= n columns; GROUP a power of two that divides BLOCK."""
    row, k = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    v = tl.load(x + row * n + k, mask=k < n, other=0.0).to(tl.float32)
    if weight is not None:
        inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(v * v, 0) / n + eps))
        v = v * inverse * tl.load(weight + k, mask=k < n, other=0.0).to(tl.float32)
    v = tl.reshape(v, [BLOCK // GROUP, GROUP])
    top = tl.max(tl.abs(v), 1)
    code = encode(v, top[:, None], LIMIT, FP8)
    tl.store(codes + row * n + k, tl.reshape(code, [BLOCK]), mask=k < n)
    g, groups = tl.arange(0, BLOCK // GROUP), tl.cdiv(n, GROUP)
    tl.store(scales + row * groups + g, tl.where(top >= 1e-30, top * INVERSE, 0.0), mask=g < groups)


def quantize(
    x: Tensor, weight: Tensor | None = None, eps: float = 0.0, group: int = 0, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    """x (m, n) -> RMSNorm (none without a weight) -> codes (m, n), float32 scales (m, ceil(n / group)).

    `group` 0: a scale a row; else a power of two. `dtype` int8 or float8_e4m3fn (from compute capability 8.9 on).
    """
    require(x)
    m, n = x.shape
    block = triton.next_power_of_2(max(n, 1))
    if group & (group - 1) or (not group and n > 65536):
        raise ValueError(f"groups are powers of two and rows at most 65536 columns, got group {group} and {n} columns")
    width = min(group, block) or block
    codes = torch.empty(m, n, dtype=dtype, device=x.device)
    scales = torch.empty(m, -(-n // group) if group else 1, dtype=torch.float32, device=x.device)
    if m and n:
        limit = LIMITS[dtype]
        quantize_kernel[(m,)](
            x.contiguous(), weight, codes, scales, n, eps, LIMIT=limit, INVERSE=1 / limit,
            FP8=dtype == torch.float8_e4m3fn, GROUP=width, BLOCK=block,
            num_warps=min(16, max(1, block // 512)), enable_fp_fusion=False,
        )  # fmt: skip
    return codes, scales
