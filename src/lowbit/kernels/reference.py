"""The torch twins: what every kernel computes, said in plain torch.

They are the oracle of the tests, and the implementation on machines where the extension could not be built. Each
follows its kernel's order of rounding: activations become int8 codes in the same way, sums of codes are exact, so a
twin and its kernel differ only in the order of a few float additions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PANEL, BLOCK = 16, 32
INT, TABLE, BF16, LATTICE = 0, 1, 2, 3
_STRIP = 256  # columns of xᵀ x made at once


def _pad_to(t: Tensor, rows: int, cols: int, value: int = 0) -> Tensor:
    return torch.nn.functional.pad(t, (0, cols - t.shape[1], 0, rows - t.shape[0]), value=value)


def _up(n: int, m: int) -> int:
    return -(-n // m) * m


def pack_codes(codes: Tensor, bits: int, pad: int) -> Tensor:
    """uint8 codes (rows, cols) -> the bytes of `cpu/kernels.h`, (panels * blocks * 64 * bits,)."""
    rows, cols = codes.shape
    x = _pad_to(codes, _up(rows, PANEL), _up(cols, BLOCK), pad)
    x = x.view(-1, PANEL, x.shape[1] // BLOCK, 8, 4).permute(0, 2, 3, 1, 4).reshape(-1, 8, 64)  # (block, j, lane byte)
    if bits == 8:
        out = x
    elif bits == 4:
        out = x[:, 0::2] | x[:, 1::2] << 4
    elif bits == 3:  # three vectors of two codes; the last two codes in the bits that are left
        out = x[:, 0:6:2] | x[:, 1:6:2] << 3
        out[:, :2] |= (x[:, 6:] >> 1) << 6
        out[:, 2] |= (x[:, 6] & 1) << 6 | (x[:, 7] & 1) << 7
    else:
        low = x.view(-1, 2, 4, 64)
        out = low[:, :, 0] | low[:, :, 1] << 2 | low[:, :, 2] << 4 | low[:, :, 3] << 6
    return out.reshape(-1).contiguous()


def unpack_codes(data: Tensor, bits: int, rows: int, cols: int) -> Tensor:
    """The inverse of `pack_codes`: uint8 codes (rows, cols)."""
    panels, blocks = _up(rows, PANEL) // PANEL, _up(cols, BLOCK) // BLOCK
    x = data.view(panels * blocks, bits, 64)
    if bits == 4:
        x = torch.stack([x & 15, x >> 4], 2).view(-1, 8, 64)
    elif bits == 3:
        whole = torch.stack([x & 7, x >> 3 & 7], 2).view(-1, 6, 64)
        shared = (x[:, :2] >> 6) << 1 | torch.stack([x[:, 2] >> 6 & 1, x[:, 2] >> 7], 1)
        x = torch.cat([whole, shared], 1)
    elif bits == 2:
        x = torch.stack([x >> s & 3 for s in (0, 2, 4, 6)], 2).reshape(-1, 8, 64)
    x = x.view(panels, blocks, 8, PANEL, 4).permute(0, 3, 1, 2, 4).reshape(panels * PANEL, blocks * BLOCK)
    return x[:rows, :cols].contiguous()


def pack_table_codes(codes: Tensor) -> Tensor:
    """4-bit indices (rows, cols) -> the bytes of `cpu/lut.h`: a row per 16 bytes, columns 16 apart share a byte."""
    rows, cols = codes.shape
    x = _pad_to(codes, _up(rows, PANEL), _up(cols, BLOCK))
    x = x.view(-1, PANEL, x.shape[1] // BLOCK, 2, 16).permute(0, 2, 3, 1, 4)  # (panel, block, half, row, 16)
    return (x[:, :, 0] | x[:, :, 1] << 4).reshape(-1).contiguous()


def unpack_table_codes(data: Tensor, rows: int, cols: int) -> Tensor:
    """The inverse of `pack_table_codes`."""
    panels, blocks = _up(rows, PANEL) // PANEL, _up(cols, BLOCK) // BLOCK
    x = data.view(panels, blocks, PANEL, 16)
    x = torch.stack([x & 15, x >> 4], 3).permute(0, 2, 1, 3, 4).reshape(panels * PANEL, blocks * BLOCK)
    return x[:rows, :cols].contiguous()


def pack_octets(codes: Tensor) -> Tensor:
    """uint8 (rows, octets, n), n bytes for 8 columns -> the bytes of `cpu/lattice.h`; padding is 0."""
    rows, octets, n = codes.shape
    x = torch.nn.functional.pad(codes, (0, 0, 0, -octets % 4, 0, -rows % PANEL))
    x = x.view(-1, 2, 4, 2, x.shape[1] // 4, 4, n)  # panel, row / 8, row % 8 / 2, row % 2, block, octet, byte
    return x.permute(0, 4, 6, 2, 5, 3, 1).reshape(-1).contiguous()


def unpack_octets(data: Tensor, rows: int, octets: int, n: int) -> Tensor:
    """The inverse of `pack_octets`."""
    x = data.view(_up(rows, PANEL) // PANEL, -1, n, 4, 4, 2, 2).permute(0, 6, 3, 5, 1, 4, 2)
    return x.reshape(_up(rows, PANEL), -1, n)[:rows, :octets].contiguous()


def lattice_values(codes: Tensor, table: Tensor) -> Tensor:
    """uint8 codes (rows, octets, 1 or 2) -> int (rows, columns): halves of the short vectors, quarters of E8P."""
    rows, n = codes.shape[0], codes.shape[2]
    index = codes[..., 0].long()
    entry = table[: 256 * 8].view(256, 8)[index].int()
    if n == 1:
        return (entry - 8).view(rows, -1)
    bit = torch.arange(8)
    sixes = (table[2048:2304][index][..., None] >> bit & 1).sum(-1)
    negative = codes[..., 1, None] >> bit & 1
    shifted = (negative.sum(-1) + sixes) % 2  # the last sign's place holds that sign xor the shift
    negative[..., 7] ^= shifted.to(negative.dtype)
    return (entry * (1 - 2 * negative.int()) + 1 - 2 * shifted[..., None].int()).view(rows, -1)


def pack_bf16_codes(weight: Tensor) -> Tensor:
    """bf16 (rows, cols) -> bytes, pairs of panels with pairs of columns together."""
    rows, cols = weight.shape
    x = _pad_to(weight, _up(rows, 2 * PANEL), _up(cols, BLOCK))
    x = x.view(-1, 2 * PANEL, x.shape[1] // 2, 2).transpose(1, 2).contiguous()
    return x.view(-1).view(torch.uint8)


def unpack_bf16_codes(data: Tensor, rows: int, cols: int) -> Tensor:
    """The inverse of `pack_bf16_codes`."""
    x = data.view(torch.bfloat16).view(_up(rows, 2 * PANEL) // (2 * PANEL), _up(cols, BLOCK) // 2, 2 * PANEL, 2)
    return x.transpose(1, 2).reshape(_up(rows, 2 * PANEL), -1)[:rows, :cols].contiguous()


def quantize_rows(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """x (m, n) float -> int8 codes (m, n) and float scales (m, ceil(n / group)); group 0: one scale a row.

    code = round(x * (127 / max|x|)), scale = max|x| / 127; a group below 1e-30 is zeros.
    """
    m, n = x.shape
    group = group or n
    padded = torch.nn.functional.pad(x.float(), (0, -n % group)).view(m, -1, group)
    top = padded.abs().amax(-1, keepdim=True)
    live = top >= 1e-30
    # A tensor divided by a tensor: torch turns scalar / tensor into a reciprocal and a product, which rounds twice.
    multiplier = torch.where(live, torch.full_like(top, 127.0) / top, torch.zeros_like(top))
    scale = torch.where(live, top * torch.tensor(1 / 127, dtype=torch.float32), torch.zeros_like(top))
    codes = torch.round(padded * multiplier).clamp(-127, 127).to(torch.int8)
    return codes.view(m, -1)[:, :n].contiguous(), scale.squeeze(-1)


def dequantize_rows(codes: Tensor, scale: Tensor, group: int) -> Tensor:
    """The inverse of `quantize_rows`, float (m, n)."""
    n = codes.shape[1]
    group = group or n
    return codes.float() * scale.repeat_interleave(group, 1)[:, :n]


def quantize_groups(x: Tensor, group: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """x (m, n) float -> codes 0 to 15 uint8 (m, n), scale and low float16 (m, ceil(n / group)): an int4 cache.

    value = code * scale + low, with low = min and scale = (max - low) / 15 as halves.
    """
    m, n = x.shape
    rows = torch.nn.functional.pad(x.float(), (0, -n % group), value=float("nan")).view(m, -1, group)
    top, bottom = rows.nan_to_num(-torch.inf).amax(-1), rows.nan_to_num(torch.inf).amin(-1)
    low = bottom.clamp(-65504, 65504).half()
    scale = ((top - low.float()) * torch.tensor(1 / 15, dtype=torch.float32)).clamp(max=65504).half()
    kept = scale.float()
    multiplier = torch.where(kept > 0, torch.ones_like(kept) / kept, torch.zeros_like(kept))
    codes = ((rows - low.float()[..., None]) * multiplier[..., None]).clamp(0, 15).round().nan_to_num(0)
    return codes.to(torch.uint8).view(m, -1)[:, :n].contiguous(), scale, low


def dequantize_groups(codes: Tensor, scale: Tensor, low: Tensor, group: int = 32) -> Tensor:
    """The inverse of `quantize_groups`, float (m, n)."""
    n = codes.shape[1]
    spread = [t.float().repeat_interleave(group, 1)[:, :n] for t in (scale, low)]
    return codes.float() * spread[0] + spread[1]


def weight_of(
    codes: Tensor, scales: Tensor | None, zeros: Tensor | None, table: Tensor | None, kind: int, bits: int, rows: int,
    cols: int, group: int, zero: int,
) -> Tensor:  # fmt: skip
    """The float matrix (rows, cols) that packed tensors stand for."""
    if kind == BF16:
        return unpack_bf16_codes(codes, rows, cols).float()
    assert scales is not None
    scale = scales.float().transpose(1, 2).reshape(-1, scales.shape[1])[:rows].repeat_interleave(group, 1)[:, :cols]
    if kind == TABLE:
        assert table is not None
        index = unpack_table_codes(codes, rows, cols).long()
        return (torch.gather(table.view(-1, 16)[:rows].float() - 128, 1, index)) * scale
    if kind == LATTICE:
        assert table is not None
        return lattice_values(unpack_octets(codes, rows, -(-cols // 8), bits), table)[:, :cols].float() * scale
    value = unpack_codes(codes, bits, rows, cols).float()
    if zeros is None:
        return (value - zero) * scale
    offset = zeros.float().transpose(1, 2).reshape(-1, zeros.shape[1])[:rows].repeat_interleave(group, 1)[:, :cols]
    return (value - offset) * scale


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, kind: int, act_group: int) -> Tensor:
    """x (m, cols) float, weight (rows, cols) float -> (m, rows), activations rounded as the kernels round them."""
    if act_group >= 0:
        if kind == BF16:
            x = x.to(torch.bfloat16)
        else:
            x = dequantize_rows(*quantize_rows(x, act_group), act_group)
    y = x.double() @ weight.double().T
    return (y if bias is None else y + bias.double()).float()


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; x itself without a weight."""
    if weight is None:
        return x.float()
    x = x.float()
    inverse: Tensor = 1 / torch.sqrt(x.double().pow(2).mean(-1, keepdim=True) + eps)
    return x * inverse.float() * weight.float()


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up; activation "silu" or "gelu" (tanh form)."""
    act = torch.nn.functional.silu(gate) if activation == "silu" else torch.nn.functional.gelu(gate, approximate="tanh")
    return act * up


def rope(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2 * cos.shape[1] values of a head: x (tokens, heads, dim), cos and sin (positions, rot / 2)."""
    half = cos.shape[1]
    c, s = cos[positions.long()][:, None], sin[positions.long()][:, None]
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat([a * c - b * s, b * c + a * s, x[..., 2 * half :]], -1)


def add_gram(total: Tensor, x: Tensor) -> None:
    """total (n, n) += xᵀ x, blocks on and below the diagonal; x (rows, n) of any float dtype."""
    rows, block = x.float(), 256 if x.shape[1] >= 4096 else 128  # few and large, with little above the diagonal
    for i in range(0, x.shape[1], block):
        total[i : i + block, : i + block].addmm_(rows[:, i : i + block].T, rows[:, : i + block])


def quadratic_forms(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Σ over rows of x H xᵀ = ⟨xᵀ x, H⟩ for each symmetric H, a strip of xᵀ x at a time: (matrices,) float64."""
    X, width = x.float(), x.shape[1]
    totals = torch.zeros(len(matrices), dtype=torch.float64)
    grams, products = torch.empty(2, _STRIP * width)  # one room for all strips
    for i in range(0, width, _STRIP):
        end = min(i + _STRIP, width)
        shape = (end - i, end)
        gram = torch.mm(X[:, i:end].T, X[:, :end], out=grams[: (end - i) * end].view(shape))
        for k, H in enumerate(matrices):
            product = torch.mul(gram, H[i:end, :end], out=products[: (end - i) * end].view(shape))
            by_column = product.sum(0).double()
            totals[k] += 2 * by_column[:i].sum() + by_column[i:].sum()  # what is left of the diagonal twice
    return totals


def hadamard(x: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of the last dimension, in blocks of its largest power of two."""
    n = x.shape[-1]
    block, h = n & -n, 1
    y = x.float().reshape(-1, block)
    while h < block:
        y = y.view(-1, block // (2 * h), 2, h)
        y = torch.stack([y[:, :, 0] + y[:, :, 1], y[:, :, 0] - y[:, :, 1]], 2).reshape(-1, block)
        h *= 2
    out: Tensor = (y * float(block) ** -0.5).view(x.shape)
    return out


def round_kv(x: Tensor, kv: str, *, fixed: bool = False) -> Tensor:
    """x (tokens, heads, dim) as the cache gives it back. `fixed`: integers at scale 1."""
    if fixed and kv in ("int8", "int4"):
        limit = 128 if kv == "int8" else 8
        return x.float().round().clamp(-limit, limit - 1)
    if kv == "int4":
        return dequantize_groups(*quantize_groups(x.reshape(-1, x.shape[-1]))).view(x.shape)
    if kv == "int8":
        shape = x.shape
        codes, scale = quantize_rows(x.reshape(-1, shape[-1]), 0)
        return dequantize_rows(codes, scale, 0).view(shape)
    if kv == "fp8":
        return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    return x.to(torch.float16 if kv == "fp16" else torch.bfloat16).float()


def attention(
    q: Tensor, k: Tensor, v: Tensor, kv: str, first: int, scale: float, softcap: float = 0.0, window: int = 0,
    *, fixed: bool = False,
) -> Tensor:  # fmt: skip
    """Causal grouped attention of q (tokens, heads, dim), at positions first.., over k and v (all, kv_heads, dim)."""
    tokens, heads, _ = q.shape
    total, kv_heads, _ = k.shape
    k, v = (round_kv(t, kv, fixed=fixed).repeat_interleave(heads // kv_heads, 1).double() for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    at = first + torch.arange(tokens, device=q.device)[:, None]
    to = torch.arange(total, device=q.device)[None]
    hidden = to > at
    if window:
        hidden |= to <= at - window
    p = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", p, v).float()
