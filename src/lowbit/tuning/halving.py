"""Successive halving: many candidates on few windows, the better half on more, the rest on everything.

Karnin, Koren and Somekh, "Almost Optimal Exploration in Multi-Armed Bandits" (2013), with two objectives instead of
one: bits per weight (known, and what speed mostly follows) and KL (measured). Candidates are ranked by Pareto layers:
first those that no other one beats in both, then those beaten by the first layer only, and so on.

A candidate leaves early only for a reason that holds outside the noise: its perplexity is above the limit, or
another candidate of no more bits is closer to the original by the paired interval over the same windows. Halving then
takes the better half of what is left, but never fewer than KEEP.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowbit.intervals import kl_difference, perplexity_ratio

RUNGS = (8, 32)  # windows
KEEP = 4


@dataclass(frozen=True)
class Measured:
    """One candidate on a rung: bits per weight, and one value a window of it and of the reference."""

    name: str
    bits: float
    kl: np.ndarray
    nll: np.ndarray
    nll_reference: np.ndarray


def dropped(rung: Sequence[Measured], max_ppl_increase: float, max_kl: float | None = None) -> dict[str, str]:
    """{name: why it goes no further}; at least KEEP stay, or all that no limit rules out if those are fewer."""
    out: dict[str, str] = {}
    for c in rung:
        ratio = perplexity_ratio(c.nll, c.nll_reference)
        if ratio.low - 1 > max_ppl_increase:
            out[c.name] = f"too inaccurate: perplexity {ratio.low - 1:+.2%} at least, limit {max_ppl_increase:+.2%}"
        elif max_kl is not None and kl_difference(c.kl, np.zeros_like(c.kl)).low > max_kl:
            out[c.name] = f"too inaccurate: KL {c.kl.mean():.5f}, limit {max_kl:g}"
    rest = [c for c in rung if c.name not in out]
    layers = _layers(rest)
    worst_first = sorted(rest, key=lambda c: (layers[c.name], float(c.kl.mean())), reverse=True)
    for c in worst_first[: len(rest) - max(KEEP, -(-len(rest) // 2))]:
        why = "others of no more bits are closer to the original" if layers[c.name] else "the worse half on few windows"
        out[c.name] = f"dropped: {why} (KL {c.kl.mean():.5f})"
    return out


def _layers(rest: Sequence[Measured]) -> dict[str, int]:
    """{name: Pareto layer}, 0 for what nothing beats."""
    layers: dict[str, int] = {}
    left = list(rest)
    while left:
        front = [c for c in left if not any(_beats(other, c) for other in left)] or left
        layers |= dict.fromkeys((c.name for c in front), max(layers.values(), default=-1) + 1)
        left = [c for c in left if c.name not in layers]
    return layers


def _beats(own: Measured, other: Measured) -> bool:
    """No more bits, and closer to the original outside the noise."""
    return own.name != other.name and own.bits <= other.bits * 1.001 and kl_difference(own.kl, other.kl).high < 0
