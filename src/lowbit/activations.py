"""Stored activation scales: one number for a linear's input, found by calibration.

The largest magnitude that was seen is one choice; a smaller one cuts a few values off and rounds all others more
finely. We take, among fractions of the largest, the one with the least

    Σ_rows Σ_j c_j (x_j - Q(x_j))²,        c_j = Σ_i W_ij²  over the linears that read the input,

which is the error at their outputs when the rounding errors of the channels are independent.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lowbit.clipping import clipped_inputs
from lowbit.model.lockstep import Walk
from lowbit.model.walk import Entry
from lowbit.numerics import fake_quantize_activation, storable
from lowbit.scheme import Scheme, TensorScheme
from lowbit.stats import InputSummary

UNKNOWN_SCALE = (
    "no calibration token reached it, so the stored scale of its input is unknown: calibrate on more text, or override "
    "it with a scheme whose scales are found at run time."
)
_FRACTIONS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
_SAMPLE_ROWS = 4096


def static_scale(
    walk: Walk, k: int, weights: Sequence[Tensor], scheme: Scheme, dtype: torch.dtype
) -> tuple[Tensor | None, float]:
    """The scale [1], in its storage dtype, of the k-th group's input, which linears with `weights` (out_i, in) read,
    and the share of the input that it clips; None if no calibration token reached it."""
    assert scheme.activation is not None
    width = weights[0].shape[1]

    def gather(inputs: Iterator[tuple[Entry, Tensor]]) -> InputSummary:
        found = [x for entry, x in inputs if not entry.held_out]
        rows = sum(x.numel() // width for x in found)
        share = InputSummary(width, max(rows // _SAMPLE_ROWS, 1))
        for x in found:
            share.update(x)
        return share

    total = InputSummary(width)
    for share in walk.collect(k, gather):
        total.merge(share)
    if total.rows == 0:
        return None, 0.0
    importance = torch.stack([w.float().square().sum(0) for w in weights]).sum(0)
    sample = total.sample
    scale = search_static_scale(sample, float(total.absmax.max()), importance, scheme.activation, dtype)
    return scale, clipped_inputs(sample, scheme.activation, scale)


def search_static_scale(
    x: Tensor, largest: float, importance: Tensor, scheme: TensorScheme, dtype: torch.dtype
) -> Tensor:
    """The scale [1] among fractions of largest / qmax with the least error on x (rows, in) weighted by (in,)."""
    best, least = torch.empty(0), float("inf")
    for fraction in _FRACTIONS:
        scale = storable(torch.tensor([largest * fraction / scheme.qmax]), dtype)
        error = float(((x - fake_quantize_activation(x, scheme, scale)).square() * importance).sum())
        if error < least or not len(best):
            best, least = scale, error
    return best
