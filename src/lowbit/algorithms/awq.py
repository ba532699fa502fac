"""AWQ: protect the weights that large activations pass through.

Rounding costs  Σ_j (w_j - ŵ_j)² E[x_j²]  at the output, so a percent of the columns carries most of it. Scaling those
columns up by s_j (and their input down) divides their share of the error by s_j², as long as the group's largest
weight does not grow with them (Lin et al. 2023, "AWQ", section 3.2). s is searched on a grid of one exponent:

    s = mean|x|^r       or, balancing with the weight,       s = mean|x|^r / mean|w|^(1 - r),       0 ≤ r ≤ 1

with mean|w| over the rows, each relative to its group's largest. The loss is the error of the *parent's* output:
attention for q, k and v, the MLP for gate and up, so that an error that softmax forgives is not paid for. After the
scales, weight clipping: each group's range shrinks as long as its output error |x (w - ŵ)|² falls (section 4 of the
authors' code), except for q and k, whose errors multiply.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.algorithms.equalize import ChannelScale, Loss, centered, search
from lowbit.errors import InputError
from lowbit.numerics import choose_qparams, dequantize, qparams_from_range, quantize, scale_shape
from lowbit.scheme import TensorScheme
from lowbit.tensor import QuantizedTensor

_SHRINK_STEPS = 20
_MAX_SHRINK = 0.5


@dataclass(frozen=True)
class AWQSettings:
    """n_grid: exponents tried in 0..1, once for each family. duo_scaling: try the family with the weight, too.
    clip: search each group's range (with round-to-nearest; gptq chooses its own scales)."""

    n_grid: int = 10
    duo_scaling: bool = True
    clip: bool = True

    def __post_init__(self) -> None:
        if self.n_grid < 1:
            raise InputError(f"awq: n_grid={self.n_grid}: expected at least 1.")


def relative_magnitude(weights: Sequence[Tensor], group_size: int) -> Tensor:
    """(in,) mean over all rows of |w| / (largest of its group of columns), for weights (out_i, in)."""
    stacked = torch.cat([w.float().abs() for w in weights])
    groups = stacked.reshape(len(stacked), -1, group_size or stacked.shape[1])
    return (groups / groups.amax(2, keepdim=True).clamp(min=1e-30)).mean(0).reshape(-1)


def awq(x_mean: Tensor, w_mean: Tensor, loss: Loss, settings: AWQSettings) -> ChannelScale:
    """The scale of one input, from mean|x| (in,) and `relative_magnitude` (in,), by `loss` of a scale (in,)."""
    x, w = x_mean.clamp(min=1e-30), w_mean.clamp(min=1e-30)
    ratios = [i / settings.n_grid for i in range(settings.n_grid + 1)]
    candidates = [(f"x ratio {r:g}", centered(x**r)) for r in ratios[1:]]  # at 0 this is the identity
    if settings.duo_scaling:
        candidates += [(f"x/w ratio {r:g}", centered(x**r / w ** (1 - r))) for r in ratios]
    return search(candidates, loss, len(x))


def clipped_rtn(weight: Tensor, hessian: Tensor, scheme: TensorScheme, scale_dtype: torch.dtype) -> QuantizedTensor:
    """Round to nearest with each group's range shrunk to where  (w - ŵ) H_gg (w - ŵ)ᵀ  of its own columns is least.

    weight (out, in), hessian (in, in). Only for grids whose scales are within one row; others are not clipped.
    """
    if scheme.granularity not in ("group", "channel"):
        scale, zero = choose_qparams(weight, scheme, scale_dtype)
        return QuantizedTensor(quantize(weight, scale, zero, scheme), scale, zero, scheme)
    W = weight.float()
    n = scale_shape(scheme, (W.shape[0], W.shape[1]))[1]
    groups = W.reshape(len(W), n, -1)
    size = groups.shape[2]
    blocks = torch.stack([hessian[i : i + size, i : i + size] for i in range(0, W.shape[1], size)])  # (n, size, size)
    low, high = groups.amin(2), groups.amax(2)
    best: tuple[Tensor, Tensor | None] = choose_qparams(W, scheme, scale_dtype)
    least = torch.full_like(low, torch.inf)
    for i in range(_SHRINK_STEPS):
        keep = 1 - i * _MAX_SHRINK / _SHRINK_STEPS
        scale, zero = qparams_from_range(low * keep, high * keep, scheme, scale_dtype)
        error = groups - dequantize(quantize(W, scale, zero, scheme), scale, zero, scheme).reshape_as(groups)
        error = error.transpose(0, 1)  # (n, out, size)
        cost = ((error @ blocks) * error).sum(2).T
        better = cost < least
        least = torch.where(better, cost, least)
        best_zero = None if zero is None or best[1] is None else torch.where(better, zero, best[1])
        best = torch.where(better, scale, best[0]), best_zero
    return QuantizedTensor(quantize(W, *best, scheme), *best, scheme)
