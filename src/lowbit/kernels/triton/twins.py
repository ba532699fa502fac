"""The torch twins of the GPU kernels: what each computes, said in plain torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.kernels import reference
from lowbit.kernels.triton.layout import TiledWeight, unpack_words


def weight_of(w: TiledWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The float32 matrix (rows, cols) that a tiled weight stands for, under activations of type `dtype`."""
    code = unpack_words(w.words, w.high, w.bits, w.rows, w.cols)
    group = torch.arange(w.cols, device=code.device) // w.group
    scale = w.scales.float()[group, : w.rows].T
    if w.table is not None:
        return torch.gather(w.table.to(dtype).float()[: w.rows], 1, code.long()) * scale
    zero = 2.0 ** (w.bits - 1) if w.zeros is None else w.zeros.float()[group, : w.rows].T
    return (code.float() - zero) * scale


def linear(x: Tensor, w: TiledWeight) -> Tensor:
    """x (..., cols) -> (..., rows) in x's type."""
    y = x.double() @ weight_of(w, x.dtype).double().T
    return (y if w.bias is None else y + w.bias).to(x.dtype)


def quantize(
    x: Tensor, weight: Tensor | None, eps: float, group: int, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    """RMSNorm (none without a weight), then codes (m, n) and scales (m, ceil(n / group)); group 0: a scale a row."""
    x = reference.rms_norm(x.float(), weight, eps)
    if dtype == torch.int8:
        return reference.quantize_rows(x, group)
    m, n = x.shape
    group = group or n
    padded = torch.nn.functional.pad(x, (0, -n % group)).view(m, -1, group)
    top = padded.abs().amax(-1, keepdim=True)
    live = top >= 1e-30
    multiplier = torch.where(live, torch.full_like(top, 448.0) / top, torch.zeros_like(top))
    codes = (padded * multiplier).clamp(-448, 448).to(dtype)
    scale = torch.where(live, top * torch.tensor(1 / 448, dtype=torch.float32), torch.zeros_like(top))
    return codes.view(m, -1)[:, :n].contiguous(), scale.squeeze(-1)


def int8_linear(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """int8 codes x (m, cols), w (rows, cols); scales (m,), (rows,) -> (m, rows)."""
    y = (x.double() @ w.double().T).float() * w_scale * x_scale[:, None]
    return (y if bias is None else y + bias).to(dtype)


def fp8_linear(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """E4M3 codes x (m, cols), w (rows, cols); scales per tensor, row or block of 128 -> (m, rows)."""
    (m, cols), rows = x.shape, len(w)
    xs = x_scale if x_scale.shape[1] == 1 else x_scale.repeat_interleave(128, 1)[:, :cols]
    ws = w_scale
    if tuple(ws.shape) not in ((1, 1), (rows, 1)):
        ws = ws.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
    y = (x.double() * xs.double()) @ (w.double() * ws.double()).T
    return (y if bias is None else y + bias).to(dtype).view(m, rows)


def store(k: Tensor, v: Tensor, cache: tuple[Tensor, Tensor, Tensor, Tensor], slots: Tensor) -> None:
    """k and v (tokens, kv_heads, dim) into the cache, in place; negative slots store nothing."""
    page, kept = cache[0].shape[2], slots >= 0
    if not kept.any():
        return
    number, place = slots[kept] // page, slots[kept] % page
    for x, codes, scales in ((k, cache[0], cache[2]), (v, cache[1], cache[3])):
        tokens, heads, dim = x[kept].shape
        code, scale = quantize(x[kept].reshape(-1, dim), None, 0.0, 0, codes.dtype)
        # index_put_ knows no float8: bytes are bytes
        codes.view(torch.uint8)[number, :, place] = code.view(torch.uint8).view(tokens, heads, dim)
        scales[number, :, place] = scale.view(tokens, heads)


def attention(
    q: Tensor, cache: tuple[Tensor, Tensor, Tensor, Tensor], pages: Tensor, lengths: Tensor, scale: float,
    softcap: float, window: int,
) -> Tensor:  # fmt: skip
    """Attention of the last token of each context: q (batch, heads, dim) over a paged cache."""
    out = torch.zeros_like(q)
    for b, length in enumerate(lengths.tolist()):
        first = max(0, length - window) if window else 0
        if length == first:
            continue
        numbers = pages[b, : -(-length // cache[0].shape[2])].long()
        k, v = (
            (codes.view(torch.uint8)[numbers].view(codes.dtype).double() * scales[numbers].double()[..., None])
            .transpose(1, 2)
            .flatten(0, 1)[first:length]
            .repeat_interleave(q.shape[1] // cache[0].shape[1], 1)
            for codes, scales in ((cache[0], cache[2]), (cache[1], cache[3]))
        )
        scores = torch.einsum("hd,thd->ht", q[b].double(), k) * scale
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        out[b] = torch.einsum("ht,thd->hd", scores.softmax(-1), v).to(q.dtype)
    return out
