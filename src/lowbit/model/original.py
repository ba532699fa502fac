"""The original model's activations, walked beside the quantized model's.

Layer by layer, rounding makes W x̂ for the input x̂ that the quantized prefix produces. The original computed W x. The
weight that comes closest to an output y from x̂ is a regression,

    T = argmin E |T x̂ - y|²  =  W + E[(y - W x̂) x̂ᵀ] (H + λI)⁻¹,      H = E[x̂ x̂ᵀ],

so rounding T instead of W lets every layer repair part of what the layers before it lost. With y = W x that is
Arai, Ichikawa 2025, "Quantization Error Propagation", and Li et al. 2025, "GPTAQ". A linear whose output is added to
the residual stream can repair the stream as well: there y = W x + h - ĥ, where h is what the output is added to. Which
linears those are is not known by name: it is proved on a batch that output + h is, to the last bit, what follows.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.model.lockstep import Walk
from lowbit.model.walk import Entry, InputGroup, linears

BLOCK_INPUT = ""  # the stream as it enters the block


class Original:
    """One pass of the original model over the calibration batches, a block at a time."""

    def __init__(self, entries: list[Entry], threads: int) -> None:
        self.entries = [replace(entry, hidden=entry.hidden.clone(), room=None) for entry in entries]
        self.threads = threads
        self.streams: Mapping[str, str] = {}
        self._walk: Walk | None = None

    def enter(self, block: nn.Module, index: int, groups: Sequence[InputGroup]) -> None:
        """Begin a block; `block` still has its original weights."""
        twin = copy.deepcopy(block)
        self.streams = find_streams(twin, self.entries[0], index) if groups else {}
        self._walk = Walk(twin, index, self.entries, groups, {}, self.threads, self.watched)

    @property
    def watched(self) -> list[str]:
        """The modules whose input is a stream that some linear's output is added to."""
        return sorted(set(self.streams.values()) - {BLOCK_INPUT})

    def leave(self) -> None:
        """The batches move past the block."""
        assert self._walk is not None
        for entry, hidden in zip(self.entries, self._walk.finish(), strict=True):
            entry.hidden = hidden
        self._walk = None

    def correction(self, walk: Walk, k: int, names: Sequence[str], hessian: Tensor) -> "Correction":
        """For linears of the k-th input group, which both walks are waiting at; H (in, in) is of the quantized model's
        input over the batches that are not held out."""
        assert self._walk is not None
        theirs = [pair for share in self._walk.collect(k, list) for pair in share]
        mine = [pair for share in walk.collect(k, list) for pair in share]
        if len(theirs) != len(self.entries) or len(mine) != len(self.entries):
            return Correction(None, {})  # batches take different ways: nothing to compare
        inputs = _moment([(e, x, x_hat) for (e, x), (_, x_hat) in zip(theirs, mine, strict=True)], mine)
        outputs = {}
        for name in names:
            if name in self.streams:
                where = self.streams[name]
                entries = [e for e, _ in mine]
                h_hat = [e.hidden for e in entries] if where == BLOCK_INPUT else walk.kept(where)
                h = [e.hidden for e, _ in theirs] if where == BLOCK_INPUT else self._walk.kept(where)
                outputs[name] = _moment(list(zip(entries, h, h_hat, strict=True)), mine)
        damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
        factor = torch.linalg.cholesky(damped)
        return Correction(_solve(inputs, factor), {name: _solve(moment, factor) for name, moment in outputs.items()})


@dataclass(frozen=True)
class Correction:
    """T = W + W · inputs + outputs[name]."""

    inputs: Tensor | None  # (in, in)
    outputs: Mapping[str, Tensor]  # (out, in), by local name

    def goal(self, name: str, weight: Tensor) -> Tensor:
        """T (out, in) for the weight of a linear by its local name."""
        goal = weight.float()
        if self.inputs is not None:
            goal = goal + goal @ self.inputs
        return goal + self.outputs[name] if name in self.outputs else goal


def _solve(moment: Tensor, factor: Tensor) -> Tensor:
    """moment · (H + λI)⁻¹."""
    return torch.cholesky_solve(moment.T, factor).T


def _moment(pairs: list[tuple[Entry, Tensor, Tensor]], inputs: list[tuple[Entry, Tensor]]) -> Tensor:
    """E[(a - â) x̂ᵀ] over the batches that feed the method."""
    total, rows = torch.zeros(pairs[0][1].shape[-1], inputs[0][1].shape[-1]), 0
    for (entry, a, a_hat), (_, x_hat) in zip(pairs, inputs, strict=True):
        if not entry.held_out:
            difference, x = (a - a_hat).flatten(0, -2).float(), x_hat.flatten(0, -2).float()
            finite = torch.isfinite(difference.sum(1) + x.sum(1))
            total.addmm_(difference[finite].T, x[finite])
            rows += int(finite.sum())
    return total / max(rows, 1)


def find_streams(block: nn.Module, entry: Entry, index: int) -> dict[str, str]:
    """Local name of a linear -> the module whose input its output is added to (BLOCK_INPUT: the block itself).

    Tensors of the stream's shape that enter the block or a module in it are the candidates; a linear counts where
    candidate + its output is exactly a later candidate or the block's output.
    """
    reached: list[tuple[str, Tensor]] = [(BLOCK_INPUT, entry.hidden)]
    made: dict[str, Tensor] = {}

    def note_input(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[object, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].shape == entry.hidden.shape:
                reached.append((name, args[0]))

        return hook

    def note_output(name: str) -> Any:
        def hook(_module: nn.Module, _args: tuple[object, ...], output: Tensor) -> None:
            if output.shape == entry.hidden.shape:
                made[name] = output

        return hook

    modules = linears(block)
    others = {n: m for n, m in block.named_modules() if n and n not in modules and not list(m.children())}
    handles = [m.register_forward_pre_hook(note_input(n)) for n, m in others.items()]
    handles += [m.register_forward_hook(note_output(n)) for n, m in modules.items()]
    try:
        reached.append(("*", entry.run(block, index)))
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: where
        for name, output in made.items()
        for i, (where, before) in enumerate(reached)
        if any(torch.equal(before + output, after) for _, after in reached[i + 1 :])
    }
