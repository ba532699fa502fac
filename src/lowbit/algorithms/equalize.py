"""Equalization: one positive number a channel, moved from a linear's input into its weight.

    y = x Wᵀ = (x / s) (W · s)ᵀ          x (rows, in), W (out, in), s (in,)

Nothing changes until something is rounded; then channels with s > 1 have finer steps in the weight and coarser ones in
the input. Methods differ in the family of s that they try (smoothquant.py, awq.py). What they share is here: what is
known of the input, the error that a scale leads to, and a search that has the identity among its candidates, so that
by its own measure the result is never worse.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.algorithms.rtn import rtn
from lowbit.numerics import fake_quantize_activation
from lowbit.scheme import Scheme

Loss = Callable[[Tensor], float]  # the error that a channel scale (in,) leads to
_SMALLEST = 1e-4


@dataclass(frozen=True)
class ChannelScale:
    """What a search found: s (in,) float32 or None for the identity, its name, its loss and the identity's."""

    scale: Tensor | None
    label: str
    loss: float
    loss_identity: float


def search(candidates: Iterable[tuple[str, Tensor]], loss: Loss, width: int) -> ChannelScale:
    """The candidate (name, s) with the least loss; identity where none is better. Losses that are not finite lose."""
    identity = loss(torch.ones(width))
    best = ChannelScale(None, "identity", identity, identity)
    for label, scale in candidates:
        if not bool(torch.isfinite(scale).all()) or not bool((scale > 0).all()):
            continue
        value = loss(scale)
        if value < best.loss or (math.isfinite(value) and not math.isfinite(best.loss)):
            best = ChannelScale(scale, label, value, identity)
    return best


def centered(scale: Tensor) -> Tensor:
    """scale / sqrt(max · min): the same ratios, spread evenly around 1, so that nothing over- or underflows."""
    scale = scale.float().clamp(min=_SMALLEST * float(scale.max()))
    return scale / (scale.max().sqrt() * scale.min().sqrt())


def channel_max(weights: Iterable[Tensor]) -> Tensor:
    """(in,) the largest magnitude of each input channel over weights (out_i, in)."""
    return torch.stack([w.float().abs().amax(0) for w in weights]).amax(0)


def round_equalized(weight: Tensor, scale: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Tensor:
    """Q(W · s) / s, (out, in) float32: the weight as the layer sees it after scaling, plain rounding, scaling back."""
    if scheme.weight is None:
        return weight.float()
    return rtn(weight.float() * scale, scheme.weight, scale_dtype).dequantize() / scale


def round_input(x: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """Q(x / s) · s for x (..., in): unchanged where the scheme leaves activations alone."""
    if scheme.activation is None:
        return x
    smooth = x / scale
    stored = smooth.abs().max().clamp(min=1e-30) / scheme.activation.qmax if scheme.static else None
    return fake_quantize_activation(smooth, scheme.activation, stored) * scale


def output_error(
    x: Tensor, weights: Mapping[str, Tensor], schemes: Mapping[str, Scheme], scale_dtype: torch.dtype
) -> Loss:
    """Loss: Σ over linears of |Q(x / s) Q(W s)ᵀ - x Wᵀ|² / |x Wᵀ|², for sampled inputs x (rows, in) float32."""
    outputs = {name: x @ w.float().T for name, w in weights.items()}
    powers = {name: y.square().mean().clamp(min=torch.finfo(torch.float32).tiny) for name, y in outputs.items()}

    def loss(scale: Tensor) -> float:
        total = 0.0
        rounded: dict[Scheme, Tensor] = {}
        for name, weight in weights.items():
            scheme = schemes[name]
            if scheme not in rounded:
                rounded[scheme] = round_input(x, scale, scheme)
            y = rounded[scheme] @ round_equalized(weight, scale, scheme, scale_dtype).T
            total += float((y - outputs[name]).square().mean() / powers[name])
        return total

    return loss
