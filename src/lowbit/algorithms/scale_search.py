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

from lowbit.kernels.columns import FP8, INTEGERS, NO_INDEX, TABLE, Grid, scale_errors
from lowbit.numerics import (
    _tiles,
    choose_qparams,
    fixed_table,
    nearest_value,
    qparams_from_range,
    scale_dtype_of,
    storable,
)
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
    scale, zero = choose_qparams(x, scheme, scale_dtype)
    scale = scale.float()
    for k in range(tiles.shape[2]):
        tile = tiles[:, :, k]  # (R, r, c)
        scales, zeros = _tried(tile, scale[:, k], None if zero is None else zero[:, k], scheme, scale_dtype)
        best = _errors(tile, scales, zeros, weight[0, 0, k], scheme).argmin(0)  # the first of equals
        scale[:, k] = scales.gather(0, best[None])[0]
        if zero is not None and zeros is not None:
            zero[:, k] = zeros.gather(0, best[None])[0].to(zero.dtype)
    return scale.to(scale_dtype), zero


def _tried(
    tile: Tensor, scale: Tensor, zero: Tensor | None, scheme: TensorScheme, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """(candidates, R) scales and zero points in float32 for tile (R, r, c): those given first, then all that are
    searched."""
    low, high = tile.amin((1, 2)), tile.amax((1, 2))
    steps, signs = torch.tensor(_candidates(scheme)).T[:, :, None]
    if scheme.symmetric:
        others = storable(torch.maximum(-low, high) / (signs * steps), scale_dtype)
        return torch.cat([scale[None], others.float()]), None
    shrink = (scheme.qmax - scheme.qmin) / steps
    others, zeros = qparams_from_range(low * shrink, high * shrink, scheme, scale_dtype)
    assert zero is not None and zeros is not None  # noqa: PT018
    return torch.cat([scale[None], others.float()]), torch.cat([zero[None].float(), zeros.float()])


def _errors(tile: Tensor, scales: Tensor, zeros: Tensor | None, weight: Tensor, scheme: TensorScheme) -> Tensor:
    """(candidates, R) squared errors of tile (R, r, c), weighted by weight (c,)."""
    if tile.shape[1] == 1:  # a row each
        table = fixed_table(scheme)
        levels = None if table is None else table.float()[:, None].expand(-1, len(tile)).contiguous()
        kind = TABLE if table is not None else FP8 if scheme.kind == "float" else INTEGERS
        limits = (float(scheme.qmin), float(scheme.qmax))
        return scale_errors(tile[:, 0].T.contiguous(), weight, Grid(kind, scales, NO_INDEX, zeros, levels, *limits))
    errors = []
    for k, scale in enumerate(scales):
        zero = None if zeros is None else zeros[k, :, None, None]
        difference = nearest_value(tile, scale[:, None, None], zero, scheme).sub_(tile)
        errors.append(difference.square_().mul_(weight).sum((1, 2)))
    return torch.stack(errors)


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
