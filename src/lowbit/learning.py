"""What learned rounding (algorithms/signround.py) learns from: a block's own output, or the whole model's answers.

block   the inputs are what the quantized blocks before make of the calibration batches, the target is what the
        original model has after the block (model/original.py), the loss their squared distance. Memory: one block.
model   the loss is KL(original || quantized) over the calibration text, through all blocks at once, and the original
        is the same network with the weights not rounded. Memory: the whole model several times over in float32.

Either way a result is kept only if the loss on batches that taught nothing falls; otherwise what there was stands and
the report says so.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lowbit.algorithms.signround import Latent, SignRoundSettings, learn
from lowbit.console import note
from lowbit.environment import compute_dtype
from lowbit.errors import InputError
from lowbit.model.fold import float32_copy, float32_entry
from lowbit.model.walk import Entry
from lowbit.tensor import InputGrid, QuantizedTensor

Loss = Callable[[Mapping[str, Tensor], int], Tensor]  # weights by linear, batch -> () loss


@dataclass(frozen=True)
class Learned:
    """What learning made, by linear; `loss_before` and `loss_after` are means over held-out batches (over all of them
    where none is held out). `kept`: whether the result is better than the start."""

    tensors: Mapping[str, QuantizedTensor]
    loss_before: float
    loss_after: float

    @property
    def kept(self) -> bool:
        return self.loss_after < self.loss_before


def learn_block(
    block: nn.Module,
    index: int,
    entries: list[Entry],
    targets: list[Tensor],
    resting: Mapping[str, Tensor],
    start: Mapping[str, QuantizedTensor],
    grids: Mapping[str, InputGrid],
    settings: SignRoundSettings,
) -> Learned:
    """Learn the rounding of a block's linears. `targets` has the original's hidden states after the block for every
    entry, `resting` where the latents of `start` begin; all by the linears' names in the block."""
    twin = float32_copy(block, {})

    def loss(changed: Mapping[str, Tensor], i: int) -> Tensor:
        entry = replace(float32_entry(entries[i]), keyword=entries[i].keyword)
        with _rounded_inputs(twin, grids), _fast():
            output = entry.run(_Changed(twin, changed), index)
        return (output.float() - targets[i].float()).square().mean()

    train = [i for i, e in enumerate(entries) if not e.held_out]
    held_out = [i for i, e in enumerate(entries) if e.held_out] or train
    per_step = max(settings.batch_size // max(len(entries[0].hidden), 1), 1)
    return _learn(loss, train, held_out, per_step, resting, start, settings)


def learn_model(
    net: Any,
    batches: list[Tensor],
    held_out: list[int],
    resting: Mapping[str, Tensor],
    start: Mapping[str, QuantizedTensor],
    grids: Mapping[str, InputGrid],
    settings: SignRoundSettings,
) -> Learned:
    """Learn the rounding of all linears at once. `net` is the float32 model with the weights that are to be rounded,
    `resting` where the latents of `start` begin; `batches` are token ids (batch, tokens), of which those in `held_out`
    only judge."""

    def loss(changed: Mapping[str, Tensor], i: int) -> Tensor:
        words = {"input_ids": batches[i], "use_cache": False}
        with _fast():
            with torch.no_grad():
                truth = _log_probabilities(net(**words))
            with _rounded_inputs(net, grids):
                own = _log_probabilities(_Changed(net, changed)(**words))
        return (truth.exp() * (truth - own)).sum(-1).mean()

    train = [i for i in range(len(batches)) if i not in held_out]
    per_step = max(settings.batch_size // len(batches[0]), 1)
    return _learn(loss, train, held_out or train, per_step, resting, start, settings)


def _learn(
    loss: Loss,
    train: list[int],
    held_out: list[int],
    per_step: int,
    resting: Mapping[str, Tensor],
    start: Mapping[str, QuantizedTensor],
    settings: SignRoundSettings,
) -> Learned:
    def judge() -> float:
        values = {name: latent.value() for name, latent in latents.items()}
        with torch.no_grad():
            return sum(float(loss(values, i)) for i in held_out) / len(held_out)

    latents = {name: Latent(resting[name], q, settings.margin) for name, q in start.items()}
    before = judge()
    learn(latents, lambda changed, i: loss(changed, train[i]), len(train), per_step, settings)
    return Learned({name: latent.tensor() for name, latent in latents.items()}, before, judge())


class _Changed(nn.Module):
    """A module with other weights (by linear) in some of its linears, which gradients flow into."""

    def __init__(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.held = [module]  # in a list, so that it is no submodule
        self.weights = {f"{name}.weight": weight for name, weight in weights.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.held[0], self.weights, args, kwargs)


@contextlib.contextmanager
def _rounded_inputs(module: nn.Module, grids: Mapping[str, InputGrid]) -> Iterator[None]:
    """Inputs of linears (by name) rounded to their grids, as if rounding were the identity to a gradient."""

    def hook(grid: InputGrid) -> Any:
        return lambda _module, args: (args[0] + (grid.round(args[0]) - args[0]).detach(), *args[1:])

    handles = [module.get_submodule(n).register_forward_pre_hook(hook(grid)) for n, grid in grids.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _fast() -> Any:
    """Products in bfloat16 where the processor has it; sums, norms and latents stay float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=compute_dtype() == torch.bfloat16)


def _log_probabilities(output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    if logits is None:
        raise InputError("signround: scope=model compares answers, and this model gives no logits: use scope=block.")
    return torch.log_softmax(logits.float(), dim=-1)


def say(what: str, learned: Learned) -> None:
    """One line for the console."""
    outcome = "kept" if learned.kept else "no better, not kept"
    note(f"{what}: held-out loss {learned.loss_before:.4g} -> {learned.loss_after:.4g}, {outcome}")
