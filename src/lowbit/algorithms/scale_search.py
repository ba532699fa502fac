"""Weighted search for scales.

Min-max scales waste codes on the largest entry. For each tile we try scales a little smaller and larger and keep the
one with the least weighted squared error  Σ_j h_j (w_j - ŵ_j)²,  h = the diagonal of the layer's Hessian (what an
error in column j costs at the output). Two things are more than the usual shrink grid:

* A symmetric grid of b bits has one more negative code than positive ones, so a *negative* scale puts that extra code
  on the positive side. Both signs are tried; at 2 and 3 bits this matters.
* Scales max|w| / k for every integer k up to the grid's end are among the candidates, so weights that are exactly on
  such a grid come back exactly.
"""

import torch
from torch import Tensor

from lowbit.numerics import _tiles, choose_qparams, nearest_value, qparams_from_range, scale_dtype_of, storable
from lowbit.scheme import TensorScheme


def search_qparams(
    x: Tensor, scheme: TensorScheme, importance: Tensor | None, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Scale (and zero point) of x (out, in) with the least error weighted by importance (in,) or (1 for all).

    Never worse than min-max under that weighting: min-max is the first candidate. A lattice keeps its first scale.
    """
    scale_dtype = scale_dtype_of(scheme, scale_dtype)
    if scheme.kind == "e8p":
        return choose_qparams(x, scheme, scale_dtype)
    tiles = _tiles(x.float(), scheme)  # (R, r, C, c)
    weight = torch.ones(x.shape[1]) if importance is None else importance.float()
    weight = weight.reshape(1, 1, tiles.shape[2], tiles.shape[3])
    best_scale, best_zero = choose_qparams(x, scheme, scale_dtype)
    best_scale = best_scale.float()
    best_error = _error(tiles, best_scale, best_zero, weight, scheme)
    low, high = tiles.amin((1, 3)), tiles.amax((1, 3))
    absmax = torch.maximum(-low, high)
    for steps, sign in _candidates(scheme):
        if scheme.symmetric:
            scale, zero = storable(absmax / (sign * steps), scale_dtype), None
        else:
            shrink = (scheme.qmax - scheme.qmin) / steps
            scale, zero = qparams_from_range(low * shrink, high * shrink, scheme, scale_dtype)
        error = _error(tiles, scale, zero, weight, scheme)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale.float(), best_scale)
        if zero is not None and best_zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    return best_scale.to(scale_dtype), best_zero


def _candidates(scheme: TensorScheme) -> list[tuple[float, int]]:
    """(number of steps that the largest magnitude, or the range, is divided into; sign of the scale)."""
    if scheme.kind != "int":
        if scheme.bits <= 4:
            return [(scheme.qmax * (0.7 + 0.05 * i), 1) for i in range(22 if scheme.bits == 4 else 40)]
        return [(scheme.qmax * f, 1) for f in (1.0, 1.125, 1.25, 1.5, 1.75)]
    full = scheme.qmax - scheme.qmin if not scheme.symmetric else -scheme.qmin
    if scheme.bits <= 4:
        whole = [float(k) for k in range(1, int(full) + 1)]
        fine = [full * (0.85 + 0.025 * i) for i in range(25 if scheme.bits <= 3 else 19)]
        steps = sorted({*whole, *fine})
    else:
        steps = [float(k) for k in range(int(full * 0.8), int(full) + 1)] if scheme.bits == 8 else []
        steps = sorted({*steps, *(full * (0.9 + 0.025 * i) for i in range(15)), full, full - 1})
    signs = (1, -1) if scheme.symmetric and scheme.bits <= 4 else (1,)
    return [(s, sign) for s in steps for sign in signs]


def _error(tiles: Tensor, scale: Tensor, zero: Tensor | None, weight: Tensor, scheme: TensorScheme) -> Tensor:
    """(R, C) weighted squared error of each tile."""
    scale4 = scale.float()[:, None, :, None]
    zero4 = None if zero is None else zero.float()[:, None, :, None]
    difference = nearest_value(tiles, scale4, zero4, scheme).sub_(tiles)
    return difference.square_().mul_(weight).sum((1, 3))
