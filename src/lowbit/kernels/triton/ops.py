# ruff: noqa: ARG001  (a fake takes every argument of its operator)
"""The GPU kernels as torch operators, `torch.ops.lowbit.gpu_*`.

An operator is its torch twin (`twins.py`) on every device but CUDA, where the Triton kernel answers if Triton is
installed and the GPU can run it. The kernels' modules, and Triton with them, are imported at the first such call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.kernels.triton import available, twins
from lowbit.kernels.triton.layout import TiledWeight

# ---- weight-only products ----


@torch.library.custom_op("lowbit::gpu_linear", mutates_args=())
def linear_op(
    x: Tensor, words: Tensor, high: Tensor | None, scales: Tensor, zeros: Tensor | None, table: Tensor | None,
    bias: Tensor | None, bits: int, rows: int, cols: int, group: int,
) -> Tensor:  # fmt: skip
    """x (..., cols) -> (..., rows) in x's type, by the TiledWeight that the other arguments describe."""
    return twins.linear(x, TiledWeight(bits, rows, cols, group, words, high, scales, zeros, table, bias))


@linear_op.register_fake
def _(
    x: Tensor, words: Tensor, high: Tensor | None, scales: Tensor, zeros: Tensor | None, table: Tensor | None,
    bias: Tensor | None, bits: int, rows: int, cols: int, group: int,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], rows))


@linear_op.register_kernel("cuda")
def _linear_cuda(
    x: Tensor, words: Tensor, high: Tensor | None, scales: Tensor, zeros: Tensor | None, table: Tensor | None,
    bias: Tensor | None, bits: int, rows: int, cols: int, group: int,
) -> Tensor:  # fmt: skip
    w = TiledWeight(bits, rows, cols, group, words, high, scales, zeros, table, bias)
    if not available() or x.dtype not in (torch.float16, torch.bfloat16):
        return twins.linear(x, w)
    from lowbit.kernels.triton import w4a16

    return w4a16.linear(x, w)


def linear(x: Tensor, w: TiledWeight) -> Tensor:
    """x (..., cols) times a tiled weight -> (..., rows) in x's type."""
    out: Tensor = linear_op(x, *w.tensors(), w.bits, w.rows, w.cols, w.group)
    return out


# ---- 8-bit products ----


@torch.library.custom_op("lowbit::gpu_quantize", mutates_args=())
def quantize(x: Tensor, weight: Tensor | None, eps: float, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (m, n) -> RMSNorm (none without a weight) -> codes of `dtype` (m, n), scales (m, ceil(n / group)); 0: a row."""
    return twins.quantize(x, weight, eps, group, dtype)


@quantize.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    m, n = x.shape
    groups = -(-n // group) if group else 1
    return x.new_empty((m, n), dtype=dtype), x.new_empty((m, groups), dtype=torch.float32)


@quantize.register_kernel("cuda")
def _quantize_cuda(
    x: Tensor, weight: Tensor | None, eps: float, group: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if not available() or group & (group - 1) or x.shape[1] > 65536 or not _has(x, dtype):
        return twins.quantize(x, weight, eps, group, dtype)
    from lowbit.kernels.triton import activations

    codes, scales = activations.quantize(x, weight, eps, group, dtype)
    return codes, scales


@torch.library.custom_op("lowbit::gpu_scaled_linear", mutates_args=())
def scaled_linear(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Codes x (m, cols) by w (rows, cols), both int8 or both float8_e4m3fn, with their scales -> (m, rows).

    x_scale (m, groups) and w_scale as `fp8.linear` has them; int8: (m, 1) and (rows, 1) or (1, 1).
    """
    if w.dtype == torch.int8:
        return twins.int8_linear(x, x_scale[:, 0], w, w_scale.expand(len(w), 1)[:, 0], bias, dtype)
    return twins.fp8_linear(x, x_scale, w, w_scale, bias, dtype)


@scaled_linear.register_fake
def _(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[0]), dtype=dtype)


@scaled_linear.register_kernel("cuda")
def _scaled_linear_cuda(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if w.dtype == torch.int8 and available():
        from lowbit.kernels.triton import w8a8

        return w8a8.linear(x, x_scale[:, 0], w, w_scale.expand(len(w), 1)[:, 0], bias, dtype)
    if w.dtype == torch.float8_e4m3fn and available() and _has(x, w.dtype):
        from lowbit.kernels.triton import fp8

        return fp8.linear(x, x_scale, w, w_scale, bias, dtype)
    if w.dtype == torch.int8:
        return twins.int8_linear(x, x_scale[:, 0], w, w_scale.expand(len(w), 1)[:, 0], bias, dtype)
    return twins.fp8_linear(x, x_scale, w, w_scale, bias, dtype)


def _has(x: Tensor, dtype: torch.dtype) -> bool:
    """Can x's GPU compute with codes of `dtype`?"""
    return dtype != torch.float8_e4m3fn or torch.cuda.get_device_capability(x.device) >= (8, 9)


# ---- the cache ----


@torch.library.custom_op("lowbit::gpu_kv_store", mutates_args=("k_codes", "v_codes", "k_scales", "v_scales"))
def kv_store(
    k: Tensor, v: Tensor, k_codes: Tensor, v_codes: Tensor, k_scales: Tensor, v_scales: Tensor, slots: Tensor
) -> None:
    """k and v (tokens, kv_heads, dim), quantized into a paged cache at slots (tokens,) int64; see `kv.py`."""
    twins.store(k, v, (k_codes, v_codes, k_scales, v_scales), slots)


@kv_store.register_kernel("cuda")
def _kv_store_cuda(
    k: Tensor, v: Tensor, k_codes: Tensor, v_codes: Tensor, k_scales: Tensor, v_scales: Tensor, slots: Tensor
) -> None:
    cache = (k_codes, v_codes, k_scales, v_scales)
    if not available() or not _has(k, k_codes.dtype):
        return twins.store(k, v, cache, slots)
    from lowbit.kernels.triton import kv

    return kv.store(k, v, cache, slots)


@torch.library.custom_op("lowbit::gpu_paged_attention", mutates_args=())
def paged_attention(
    q: Tensor, k_codes: Tensor, v_codes: Tensor, k_scales: Tensor, v_scales: Tensor, pages: Tensor, lengths: Tensor,
    scale: float, softcap: float, window: int,
) -> Tensor:  # fmt: skip
    """q (batch, heads, dim), the last token of each context, over a paged cache -> the same shape and type."""
    return twins.attention(q, (k_codes, v_codes, k_scales, v_scales), pages, lengths, scale, softcap, window)


@paged_attention.register_fake
def _(
    q: Tensor, k_codes: Tensor, v_codes: Tensor, k_scales: Tensor, v_scales: Tensor, pages: Tensor, lengths: Tensor,
    scale: float, softcap: float, window: int,
) -> Tensor:  # fmt: skip
    return q.new_empty(q.shape)


@paged_attention.register_kernel("cuda")
def _paged_attention_cuda(
    q: Tensor, k_codes: Tensor, v_codes: Tensor, k_scales: Tensor, v_scales: Tensor, pages: Tensor, lengths: Tensor,
    scale: float, softcap: float, window: int,
) -> Tensor:  # fmt: skip
    cache = (k_codes, v_codes, k_scales, v_scales)
    if not available() or q.dtype not in (torch.float16, torch.bfloat16) or not _has(q, k_codes.dtype):
        return twins.attention(q, cache, pages, lengths, scale, softcap, window)
    from lowbit.kernels.triton import kv

    return kv.attention(q, cache, pages, lengths, scale, softcap, window)
