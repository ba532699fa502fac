"""Parameters of ggml blocks with the least weighted error.

For w ~ (d s) q - dmin m (lowbit/ggml.py) we minimize  sum_j h_j (w_j - ŵ_j)²  per block, h the diagonal of the layer's
Hessian. All five unknowns enter linearly when the others are held, so descent is exact in each:

    s   = round( sum h q (w + o) / (d sum h q²) )        m    = round( sum h (d s q - w) / (dmin sum h) )
    d   = half ( sum h (s q)(w + o) / sum h (s q)² )     dmin = half ( sum h m (d s q - w) / sum h m² )
    q   = the nearest code                               o = dmin m

It starts from the best continuous scale and offset of each group (a grid of clipped ranges, each followed by the
least-squares fit for its codes) and from several guesses of d, since rounding s and m has many local minima; the best
of all is kept block by block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.ggml import BlockTensor, BlockType

_CHUNK = 2**22  # weights worked on at once
_SWEEPS = 3


@dataclass
class Fit:
    """Parameters of blocks, shaped to broadcast over weights (rows, blocks, groups, group): q is full, s and m end in
    1, d and dmin in 1, 1. float32, d and dmin rounded to half precision. dmin = m = 0 where the type is symmetric."""

    q: Tensor
    d: Tensor
    s: Tensor
    dmin: Tensor
    m: Tensor

    def values(self) -> Tensor:
        return self.d * self.s * self.q - self.dmin * self.m


def search_blocks(weight: Tensor, kind: BlockType, importance: Tensor | None) -> BlockTensor:
    """weight (out, in) in blocks of `kind`, with the least error weighted by importance (in,), or (1 for all).

    `in` must be a multiple of kind.block.
    """
    h = torch.ones(weight.shape[1]) if importance is None else importance.float()
    h = (h / h.mean().clamp(min=1e-30)).clamp(min=1e-6)  # a column that nothing reached still wants a value
    shape = (-1, weight.shape[1] // kind.block, kind.block // kind.group, kind.group)
    chunks = weight.float().split(max(_CHUNK // weight.shape[1], 1))
    return join([to_tensor(_search(w.reshape(shape), kind, h.reshape(1, *shape[1:])), kind) for w in chunks])


def join(parts: list[BlockTensor]) -> BlockTensor:
    """Rows one below the other."""
    fields = zip(*((p.codes, p.d, p.s, p.dmin, p.m) for p in parts), strict=True)
    codes, d, s, dmin, m = (None if f[0] is None else torch.cat(f) for f in fields)
    assert codes is not None
    assert d is not None
    assert s is not None
    return BlockTensor(parts[0].type, codes, d, s, dmin, m)


def to_tensor(fit: Fit, kind: BlockType) -> BlockTensor:
    rows = len(fit.q)
    codes, s, m = (x.reshape(rows, -1).to(torch.int16) for x in (fit.q, fit.s, fit.m))
    d, dmin = (x.reshape(rows, -1).to(torch.float16) for x in (fit.d, fit.dmin))
    return BlockTensor(kind, codes, d, s) if kind.m is None else BlockTensor(kind, codes, d, s, dmin, m)


def _search(w: Tensor, kind: BlockType, h: Tensor) -> Fit:
    """w (rows, blocks, groups, group), h broadcasts to it."""
    scale, offset = best_steps(w, kind, h)
    best: Fit | None = None
    least = torch.full((*w.shape[:2], 1, 1), torch.inf)
    for shrink in _guesses(kind):
        fit = _first(w, kind, scale, offset, shrink)
        for _ in range(_SWEEPS + 1):
            error = (h * (w - fit.values()).square()).sum((2, 3), keepdim=True)
            better = error < least
            least = torch.where(better, error, least)
            best = fit if best is None else _pick(better, fit, best)
            fit = _descend(w, kind, h, fit)
    assert best is not None
    return best


def _pick(mine: Tensor, a: Fit, b: Fit) -> Fit:
    """a's blocks where `mine`, else b's."""
    return Fit(*(torch.where(mine, x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True)))


def half(x: Tensor) -> Tensor:
    """x rounded to half precision, kept in float32, never infinite."""
    return x.clamp(-65504, 65504).to(torch.float16).float()


def nearest(w: Tensor, scale: Tensor, offset: Tensor, kind: BlockType) -> Tensor:
    """The codes, as float32, nearest to w; 0 or the range's end nearest to it where the scale is 0."""
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    return ((w + offset) * inverse).round().clamp(*kind.q)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b.clamp(min=1e-30), 0.0)


def best_steps(w: Tensor, kind: BlockType, h: Tensor) -> tuple[Tensor, Tensor]:
    """The best continuous (scale, offset) of each group, (rows, blocks, groups, 1): w ~ scale * q - offset."""
    if kind.m is None:
        return _best_scale(w, kind, h), torch.zeros(*w.shape[:-1], 1)
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    if kind.s != (1, 1):  # the K types' offset is not negative: their grid begins at or below 0
        low, high = low.clamp(max=0), high.clamp(min=0)
    least = torch.full_like(low, torch.inf)
    best = (high - low, -low)
    fine = kind.q[1] > 16
    for a in (1.0, 0.9) if fine else (1.0, 0.9, 0.8, 0.65):
        for b in (1.0, 0.9) if fine else (1.0, 0.9, 0.8, 0.65):
            scale, offset = (b * high - a * low) / kind.q[1], -a * low
            for _ in range(2):
                q = nearest(w, scale, offset, kind)
                scale, offset = _fit_line(w, h, q, kind)
            error = (h * (w - scale * nearest(w, scale, offset, kind) + offset).square()).sum(-1, keepdim=True)
            better = error < least
            least = torch.where(better, error, least)
            best = (torch.where(better, scale, best[0]), torch.where(better, offset, best[1]))
    return best


def _fit_line(w: Tensor, h: Tensor, q: Tensor, kind: BlockType) -> tuple[Tensor, Tensor]:
    """Weighted least squares of w on q: w ~ scale q - offset, offset >= 0 for the K types."""

    def total(x: Tensor) -> Tensor:
        return x.sum(-1, keepdim=True)

    hq = h * q
    n, sq, sqq, sw, swq = total(h.expand_as(w)), total(hq), total(hq * q), total(h * w), total(hq * w)
    spread = n * sqq - sq.square()
    solid = spread > 1e-12 * n * sqq
    scale = torch.where(solid, (n * swq - sq * sw) / spread.clamp(min=1e-30), _ratio(swq, sqq))
    offset = torch.where(solid, (sq * swq - sqq * sw) / spread.clamp(min=1e-30), 0.0)
    if kind.s == (1, 1):
        return scale, offset
    below = offset < 0
    return torch.where(below, _ratio(swq, sqq), scale).clamp(min=0), offset.clamp(min=0)


def _best_scale(w: Tensor, kind: BlockType, h: Tensor) -> Tensor:
    """Symmetric: the scale, of either sign, whose codes leave least error after the least-squares fit."""
    absmax = w.abs().amax(-1, keepdim=True)
    ends = -float(kind.q[0])
    coarse = kind.q[1] <= 15
    steps = [ends * (0.7 + 0.025 * i) for i in range(19)] if coarse else [ends * (0.95 + 0.01 * i) for i in range(8)]
    signs = (1.0, -1.0) if coarse else (1.0,)
    most = torch.full_like(absmax, -1.0)
    best = torch.ones_like(absmax)
    hw = h * w
    for sign in signs:
        for step in steps:
            q = nearest(w, absmax / (sign * step), torch.zeros(()), kind)
            product, square = (hw * q).sum(-1, keepdim=True), (h * q * q).sum(-1, keepdim=True)
            gain = _ratio(product.square(), square)  # sum h w² minus the error left
            better = gain > most
            most = torch.where(better, gain, most)
            best = torch.where(better, _ratio(product, square), best)
    return best


def _guesses(kind: BlockType) -> tuple[float, ...]:
    """How many of the s levels the largest group scale is put on, as shares of all levels."""
    if kind.s == (1, 1):
        return (1.0,)
    return (1.0, 0.97, 0.93, 0.88, 0.8, 1.1) if kind.s[1] < 127 else (1.0, 0.97, 0.93, 0.88)


def _first(w: Tensor, kind: BlockType, scale: Tensor, offset: Tensor, share: float) -> Fit:
    """Round each group's scale and offset to integers times a guess of d and dmin."""
    if kind.s == (1, 1):
        d, s = half(scale), torch.ones_like(scale)
    else:
        index = scale.abs().argmax(2, keepdim=True)
        largest = scale.gather(2, index)
        end = -kind.s[0] if kind.s[0] < 0 else kind.s[1]  # a signed range is longer below: largest goes there
        d = half(largest / (share * (-end if kind.s[0] < 0 else end)))
        s = (scale * torch.where(d == 0, 0.0, 1 / d)).round().clamp(*kind.s)
    if kind.m is None:
        dmin = torch.zeros_like(d)
        m = torch.zeros_like(s)
    elif kind.m == (1, 1):
        dmin, m = half(offset), torch.ones_like(offset)
    else:
        dmin = half(offset.amax(2, keepdim=True) / (share * kind.m[1]))
        m = (offset * torch.where(dmin == 0, 0.0, 1 / dmin)).round().clamp(*kind.m)
    return Fit(nearest(w, d * s, dmin * m, kind), d, s, dmin, m)


def _descend(w: Tensor, kind: BlockType, h: Tensor, fit: Fit) -> Fit:
    """One sweep of the module docstring's updates."""
    q, d, s, dmin, m = fit.q, fit.d, fit.s, fit.dmin, fit.m
    two_level = kind.s != (1, 1)
    hq = h * q
    if two_level:
        numerator = (hq * (w + dmin * m)).sum(-1, keepdim=True)
        s = _round_ratio(numerator, d * (hq * q).sum(-1, keepdim=True), s, kind.s)
    if kind.m is not None and kind.m != (1, 1):
        numerator = (h * (d * s * q - w)).sum(-1, keepdim=True)
        m = _round_ratio(numerator, dmin * h.expand_as(w).sum(-1, keepdim=True), m, kind.m)
    x = s * q
    d_new = _ratio((h * x * (w + dmin * m)).sum((2, 3), keepdim=True), (h * x * x).sum((2, 3), keepdim=True))
    d = torch.where(d_new == 0, d, half(d_new))
    if kind.m is not None:
        low = (h * m * (d * x - w)).sum((2, 3), keepdim=True)
        dmin = half(_ratio(low, (h * m * m).sum((2, 3), keepdim=True)))
    return Fit(nearest(w, d * s, dmin * m, kind), d, s, dmin, m)


def _round_ratio(a: Tensor, b: Tensor, old: Tensor, limits: tuple[int, int]) -> Tensor:
    return torch.where(b == 0, old, (a / torch.where(b == 0, 1.0, b)).round().clamp(*limits))
