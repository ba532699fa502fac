"""How much the model's answers change when one group of linears is stored in few bits.

For every group (linears that share an input: q/k/v, gate/up) and every scheme, the expected KL(original || changed)
per token if only that group changes. Errors of different groups are small and nearly independent, so they add up
(Dong et al., HAWQ, 2019, §3), and tuning/allocate.py can trade one group against another. Two ways to find it:

direct   put the rounded weights in, run some windows, measure the KL. One forward pass a group.
fisher   to second order KL = 1/2 d^T F d for a change d of the weights and the Fisher information F = E[g g^T] of
         g = grad log p(y | x), y drawn from the model itself. Per linear F is nearly a Kronecker product of its
         inputs' and its output gradients' second moments (Martens and Grosse, K-FAC, 2015, §3), and rounding errors of
         different output channels are nearly uncorrelated, so only the gradients' diagonal counts:
             KL per token = 1/2 sum_i E[g_i^2] (d H d^T)_ii,    H = E[x x^T]
         One backward pass a window for all groups at once, without a weight gradient; the weights are never touched.

Both are measured with one scheme, the probe, rounded by the method itself; the other schemes follow from the ratio of
the group's quadratic output losses (W - W')H(W - W')^T under round-to-nearest, which is nearly the method's own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lowbit.accuracy.measure import measure
from lowbit.console import track
from lowbit.losses import Statistics
from lowbit.model.checkpoint import Checkpoint
from lowbit.model.walk import capture_entries, find_blocks, input_groups
from lowbit.recipe import Recipe
from lowbit.rounding import round_linears
from lowbit.runtime.engine import load
from lowbit.scheme import Scheme
from lowbit.stats import Hessian

Way = Literal["fisher", "direct"]
HESSIAN_WINDOWS, FISHER_WINDOWS, DIRECT_WINDOWS = 32, 32, 8
_BATCH = 4


@dataclass(frozen=True)
class Group:
    """Linears that share an input and so get one scheme, by full name; `shapes` are (out, in) of each."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]

    @property
    def weights(self) -> int:
        return sum(rows * columns for rows, columns in self.shapes)


@dataclass(frozen=True)
class Sensitivity:
    """For each group (rows) and scheme (columns): stored bits in all, and expected KL in nats per token."""

    groups: tuple[Group, ...]
    schemes: tuple[str, ...]
    bits: np.ndarray
    kl: np.ndarray
    way: Way
    probe: str


class Subject:
    """The float32 model in memory, its groups, and the Hessian of each group's input. Raises InputError as `load`."""

    def __init__(self, checkpoint: Checkpoint, windows: Tensor, keep: Callable[[str], bool] = lambda _name: True):
        """windows (n, tokens): calibration text; `keep` says which linears may be quantized at all."""
        self.checkpoint, self.windows = checkpoint, windows
        engine: Any = load(checkpoint, "float32")
        self.net, self.vocab_size = engine.net, engine.vocab_size
        self.modules: dict[str, nn.Linear] = dict(self.net.named_modules())
        self.groups = self._groups(keep)
        self.hessians = self._hessians(windows[:HESSIAN_WINDOWS])

    @torch.no_grad()
    def _groups(self, keep: Callable[[str], bool]) -> tuple[Group, ...]:
        blocks = find_blocks(self.net)
        (entry,) = capture_entries(self.net, blocks, [self.windows[:1]])
        groups = []
        for i, name in enumerate(blocks.names):
            block = self.net.get_submodule(name)
            for found in input_groups(block, entry, i):
                names = tuple(n for local in found.names if keep(n := f"{name}.{local}"))
                if names:
                    shapes = tuple((self.modules[n].out_features, self.modules[n].in_features) for n in names)
                    groups.append(Group(names, shapes))
            entry.hidden = entry.run(block, i)
        return tuple(groups)

    @torch.no_grad()
    def _hessians(self, windows: Tensor) -> list[Hessian]:
        hessians = [Hessian(g.shapes[0][1]) for g in self.groups]
        handles = [
            self.modules[g.names[0]].register_forward_pre_hook(lambda _m, args, h=h: h.update(args[0]))
            for g, h in zip(self.groups, hessians, strict=True)
        ]
        for batch in track(windows.split(_BATCH), "sensitivity: inputs", -(-len(windows) // _BATCH)):
            self.net(input_ids=batch, use_cache=False)
        for handle in handles:
            handle.remove()
        return hessians

    def weights(self, group: Group) -> dict[str, Tensor]:
        return {n: self.modules[n].weight.data for n in group.names}

    @torch.no_grad()
    def round(self, u: int, scheme: str, recipe: Recipe) -> tuple[dict[str, Tensor], float, float]:
        """Group u in `scheme`: (change of each weight (out, in), summed quadratic output loss, stored bits)."""
        weights, hessian = self.weights(self.groups[u]), self.hessians[u]
        statistics = Statistics(hessian, Hessian(hessian.width))
        rounded = round_linears(weights, Scheme.parse(scheme), statistics, recipe, self.checkpoint.dtype)
        change = {n: r.quantized.dequantize() - weights[n] for n, r in rounded.items()}
        loss = sum((r.report["loss"] or 0.0) * len(weights[n]) for n, r in rounded.items())
        return change, loss, float(sum(r.quantized.stored_bits for r in rounded.values()))


def sensitivity(subject: Subject, schemes: Sequence[str], probe: str, recipe: Recipe, way: Way) -> Sensitivity:
    """Expected KL of every group in every scheme. `recipe` names the rounding method and its settings."""
    changes, probed = [], []
    plain = Recipe(method="rtn")
    bits, losses = np.zeros((len(subject.groups), len(schemes))), np.zeros((len(subject.groups), len(schemes)))
    for u in track(range(len(subject.groups)), "sensitivity: rounding", len(subject.groups)):
        changes.append(subject.round(u, probe, recipe)[0])
        probed.append(subject.round(u, probe, plain)[1])
        for o, scheme in enumerate(schemes):
            _, losses[u, o], bits[u, o] = subject.round(u, scheme, plain)
    measured = (fisher if way == "fisher" else direct)(subject, changes)
    share = np.array(probed)[:, None]
    kl = measured[:, None] * np.divide(losses, share, out=np.zeros_like(losses), where=share > 0)
    return Sensitivity(subject.groups, tuple(schemes), bits, kl, way, probe)


def direct(subject: Subject, changes: Sequence[dict[str, Tensor]], windows: int = DIRECT_WINDOWS) -> np.ndarray:
    """KL per token (one value a group) with that group's weights changed and all others left, on the first windows."""
    tokens = subject.windows[:windows]

    def logits(batch: Tensor) -> Tensor:
        out: Tensor = subject.net(input_ids=batch, use_cache=False).logits
        return out.float()

    def changed(change: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        def run(batch: Tensor) -> Tensor:
            kept = {n: subject.modules[n].weight.data for n in change}
            for n, d in change.items():
                subject.modules[n].weight.data = kept[n] + d
            try:
                return logits(batch)
            finally:
                for n, weight in kept.items():
                    subject.modules[n].weight.data = weight

        return run

    with torch.inference_mode():
        scores = measure(logits, [changed(c) for c in changes], tokens, subject.vocab_size)
    return np.array([s.kl.mean() for s in scores[1:]])


def fisher(
    subject: Subject, changes: Sequence[dict[str, Tensor]], windows: int = FISHER_WINDOWS, seed: int = 0
) -> np.ndarray:
    """The same to second order, from gradients of the unchanged model; one value a group."""
    curvature = output_curvature(subject, windows, seed)
    found = []
    for change, hessian in zip(changes, subject.hessians, strict=True):
        inputs = hessian.mean()
        found.append(0.5 * sum(float(((d @ inputs) * d).sum(1) @ curvature[n]) for n, d in change.items()))
    return np.array(found)


def output_curvature(subject: Subject, windows: int, seed: int) -> dict[str, Tensor]:
    """{linear: (out,)}: mean over tokens of the squared gradient of log p(y | x) by the linear's output."""
    generator = torch.Generator().manual_seed(seed)
    tokens = subject.windows[:windows]
    sums = {n: torch.zeros(rows) for g in subject.groups for n, (rows, _) in zip(g.names, g.shapes, strict=True)}

    def collect(name: str) -> Callable[..., None]:
        def on_gradient(gradient: Tensor) -> None:
            sums[name] += gradient.reshape(-1, gradient.shape[-1]).float().square().sum(0)

        return lambda _module, _args, output: output.register_hook(on_gradient) and None

    handles = [subject.modules[n].register_forward_hook(collect(n)) for n in sums]
    # a graph needs a leaf: what the embedding gives
    handles.append(subject.net.get_input_embeddings().register_forward_hook(lambda _m, _a, out: out.requires_grad_()))
    try:
        for window in track(tokens.split(1), "sensitivity: gradients", len(tokens)):
            likely = subject.net(input_ids=window, use_cache=False).logits[0].float().log_softmax(-1)
            drawn = torch.multinomial(likely.detach().exp(), 1, generator=generator)
            likely.gather(-1, drawn).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    return {n: total / tokens.numel() for n, total in sums.items()}
