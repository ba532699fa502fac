"""Learned rounding: a gradient says for every weight which way to round, for all linears of a block together.

GPTQ minimizes the output error of one linear at a time. What a block computes is not the sum of its linears, so here
the block's own output (or the model's answer) is the loss, and rounding is what is learned: with latents u, which are
codes before rounding, and scales s of the grid's levels g,

    Ŵ = s · g(round(u)),      ∂loss/∂u := ∂loss/∂Ŵ · s      (straight through the rounding)
    u ← u - η sign(∂loss/∂u),      s ← s - η_s |s_0| sign(∂loss/∂s),      η falls linearly to 0

(Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent", section 3; the straight-through gradient is
Bengio et al. 2013). With η = 1/iterations a latent moves half a code at most, over all steps: it can change its mind
once and not wander off. What differs from the paper: the start is GPTQ's result instead of round-to-nearest, and scales
move themselves instead of two factors on a clip range.

GPTQ's codes are not the nearest to the weights, so w/s is no latent for them. A latent begins where weight i would go
if all others stayed rounded as they are,  t_i = ŵ_i + [(W - Ŵ) H]_i / H_ii : its distance to the border of the cell
says what another code would cost, so that codes which hardly matter change first.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.algorithms.gptq import GPTQSettings, alive
from lowbit.errors import InputError
from lowbit.numerics import fixed_table, grid_value, storable
from lowbit.tensor import QuantizedTensor


@dataclass(frozen=True)
class SignRoundSettings(GPTQSettings):
    """GPTQ's settings make the start. scope: 'block' (one block's output at a time) or 'model' (KL of the model's
    answers; the model and its gradient must fit in memory). iterations: steps. batch_size: windows a step. rate: times
    1/iterations, the first step of a latent, in codes. scale_rate: the same of a scale, relative. margin: how near to
    the border of its cell a latent may start."""

    scope: str = "block"
    iterations: int = 100
    batch_size: int = 8
    rate: float = 1.0
    scale_rate: float = 0.2
    margin: float = 0.1

    def __post_init__(self) -> None:
        if self.scope not in ("block", "model"):
            raise InputError(f"signround: scope={self.scope}: expected 'block' or 'model'.")
        if self.batch_size < 1 or self.iterations < 1:
            raise InputError("signround: iterations and batch_size are at least 1.")
        if self.margin > 0.5:
            raise InputError(f"signround: margin={self.margin:g}: a cell ends at 0.5.")


class Latent:
    """One weight (out, in) as something that a gradient can move: u and s, float32."""

    def __init__(self, target: Tensor, start: QuantizedTensor, margin: float) -> None:
        """`start` is a result of GPTQ's on a grid of integers or table entries; `target` (out, in) where each latent
        begins (`resting_point`), brought into the cell of its code where it is not."""
        scheme = start.scheme
        assert scheme.kind in KINDS, scheme
        self.start = start
        table = fixed_table(scheme) if start.table is None else start.table.float()
        self.table = table
        self.lowest = scheme.qmin if table is None else 0.0
        self.highest = scheme.qmax if table is None else table.shape[-1] - 1.0
        self.tile = start.shape[0] // start.scale.shape[0], start.shape[1] // start.scale.shape[1]
        self.scale = start.scale.float().clone()
        self.zero = None if start.zero_point is None else self._spread(start.zero_point.float())
        codes = start.codes.float()
        above, below = (codes + 1).clamp(max=self.highest), (codes - 1).clamp(min=self.lowest)
        gap = (self._level(above) - self._level(below)) / (above - below)  # between levels, around each code
        position = (target.float() / self._spread(self.scale) - self._level(codes)) / gap.clamp(min=1e-9)
        self.u = codes + position.clamp(margin - 0.5, 0.5 - margin)

    def _spread(self, scale: Tensor) -> Tensor:
        """(out/r, in/c) -> (out, in)."""
        return scale.repeat_interleave(self.tile[0], 0).repeat_interleave(self.tile[1], 1)

    def _level(self, codes: Tensor) -> Tensor:
        """(out, in) values of codes at scale 1."""
        return grid_value(codes, torch.ones(()), self.zero, self.table)

    def _stored_scale(self) -> Tensor:
        return storable(self.scale, self.start.scale.dtype)

    def _codes(self) -> Tensor:
        return self.u.round().clamp(self.lowest, self.highest)

    def value(self) -> Tensor:
        """Ŵ (out, in), exactly what `tensor` dequantizes to."""
        return self._level(self._codes()) * self._spread(self._stored_scale().float())

    def step(self, gradient: Tensor, rate: float, scale_rate: float) -> None:
        """Move against the gradient (out, in) of the loss by `value()`: `rate` codes, `scale_rate` of a scale."""
        rows, columns = self.scale.shape
        by_scale = (gradient * self._level(self._codes())).reshape(rows, self.tile[0], columns, self.tile[1])
        self.u -= rate * (gradient * self._spread(self.scale)).sign_()
        self.u.clamp_(self.lowest - 0.5, self.highest + 0.5)  # beyond the last cell there is nothing to learn
        self.scale -= scale_rate * self.start.scale.float().abs() * by_scale.sum((1, 3)).sign_()

    def tensor(self) -> QuantizedTensor:
        return replace(self.start, codes=self._codes().to(self.start.codes.dtype), scale=self._stored_scale())


def resting_point(weight: Tensor, start: QuantizedTensor, hessian: Tensor) -> Tensor:
    """(out, in) t: where each weight alone would be best, the others being as `start` has them."""
    W_hat, H = start.dequantize(), alive(hessian)
    return W_hat + (weight.float() - W_hat) @ H / H.diagonal()


KINDS = ("int", "midrise", "nf", "learned")  # grids of codes in order, with scales that may take any value


def learn(
    latents: Mapping[str, Latent],
    loss: Callable[[Mapping[str, Tensor], int], Tensor],
    batches: int,
    per_step: int,
    settings: SignRoundSettings,
    seed: int = 0,
) -> None:
    """`settings.iterations` steps. `loss(weights, i)` is the loss () of the i-th of `batches` batches when the linears
    have these weights; a step averages over `per_step` batches, which are dealt out in seeded random order."""
    generator = torch.Generator().manual_seed(seed)
    deck: list[int] = []
    for i in range(settings.iterations):
        left = (1 - i / settings.iterations) / settings.iterations
        weights = {name: latent.value().requires_grad_() for name, latent in latents.items()}
        for _ in range(min(per_step, batches)):
            deck = deck or torch.randperm(batches, generator=generator).tolist()
            with torch.enable_grad():
                value = loss(weights, deck.pop())
            value.backward()
        for name, latent in latents.items():
            gradient = weights[name].grad
            if gradient is not None and bool(torch.isfinite(gradient).all()):  # None: no token reached this linear
                latent.step(gradient, settings.rate * left, settings.scale_rate * left)
