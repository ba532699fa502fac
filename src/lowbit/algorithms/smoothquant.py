"""SmoothQuant: share the difficulty of rounding between activations and weights.

A few channels of a language model's activations are tens of times larger than the others, and one int8 scale a token
leaves the others no codes. The channel scale

    s_j = max |x_j|^α / max |W_j|^(1 - α)

moves that factor into the weights: α = 1 makes all channels of the input equally large, α = 0 all columns of the
weight (Xiao et al. 2022, "SmoothQuant", section 4, equation 4). The paper takes one α for a model (0.5, for Llama
0.8 to 0.9). Here `alpha=auto` chooses it for every input by the error of the really rounded output.

An outlier that was planted by multiplying a channel of x by c and dividing its weights by c changes s_j by exactly c
whatever α is, so any α finds its way back.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.algorithms.equalize import ChannelScale, Loss, centered, search
from lowbit.errors import InputError


@dataclass(frozen=True)
class SmoothQuantSettings:
    """alpha: 'auto', or a number from 0 to 1. steps: how many intervals of 0..1 `auto` tries."""

    alpha: str = "auto"
    steps: int = 20

    def __post_init__(self) -> None:
        try:
            valid = self.alpha == "auto" or 0 <= float(self.alpha) <= 1
        except ValueError:
            valid = False
        if not valid:
            raise InputError(f"smoothquant: alpha={self.alpha}: expected 'auto' or a number from 0 to 1.")
        if self.steps < 1:
            raise InputError(f"smoothquant: steps={self.steps}: expected at least 1.")


def smooth_scale(x_max: Tensor, w_max: Tensor, alpha: float) -> Tensor:
    """(in,) s for the largest magnitudes (in,) of the input's channels and of the weights' columns.

    Channels that are never active, or that no weight reads, keep their proportion (they cost nothing either way).
    """
    used = (x_max > 0) & (w_max > 0)
    if not bool(used.any()):
        return torch.ones_like(x_max)
    scale = x_max.clamp(min=1e-30).log() * alpha - w_max.clamp(min=1e-30).log() * (1 - alpha)
    scale = torch.where(used, scale, scale[used].mean())
    return centered((scale - scale.mean()).exp())


def smoothquant(x_max: Tensor, w_max: Tensor, loss: Loss, settings: SmoothQuantSettings) -> ChannelScale:
    """The scale of one input. `loss` maps a scale (in,) to the error of the rounded output."""
    width = len(x_max)
    if settings.alpha != "auto":
        scale = smooth_scale(x_max, w_max, float(settings.alpha))
        return ChannelScale(scale, f"alpha {float(settings.alpha):g}", loss(scale), loss(torch.ones(width)))
    alphas = [i / settings.steps for i in range(settings.steps + 1)]
    return search(((f"alpha {a:g}", smooth_scale(x_max, w_max, a)) for a in alphas), loss, width)
