"""The original model's activations, walked beside the quantized model's.

Layer by layer, rounding makes W x̂ for the input x̂ that the quantized prefix produces. The original computed W x. The
weight that comes closest to that from x̂ is a regression,

    T = argmin E |T x̂ - y|²  =  W + (E[y x̂ᵀ] - W H) (H + λI)⁻¹,      y = W x,  H = E[x̂ x̂ᵀ],

so rounding T instead of W lets every layer repair part of what the layers before it lost (Arai, Ichikawa 2025,
"Quantization Error Propagation"; Li et al. 2025, "GPTAQ"). A linear whose output is added to the residual stream can
also repair the stream: there y = W x + (h - ĥ), h the stream that the output is added to.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lowbit.model.lockstep import Walk
from lowbit.model.walk import Entry, InputGroup


class Original:
    """One pass of the original model over the calibration batches, a block at a time."""

    def __init__(self, entries: list[Entry], threads: int) -> None:
        self.entries = [replace(entry) for entry in entries]
        self.threads = threads
        self._walk: Walk | None = None

    def enter(self, block: nn.Module, index: int, groups: Sequence[InputGroup]) -> None:
        """Begin a block; `block` still has its original weights."""
        self._walk = Walk(copy.deepcopy(block), index, self.entries, groups, {}, self.threads)

    def leave(self) -> None:
        """The batches move past the block."""
        assert self._walk is not None
        for entry, hidden in zip(self.entries, self._walk.finish(), strict=True):
            entry.hidden = hidden
        self._walk = None

    def correction(self, walk: Walk, k: int, hessian: Tensor, dampening_frac: float) -> Tensor:
        """M (in, in) with T = W + W M, for the k-th input group that both walks are waiting at; H (in, in) is of the
        quantized model's input over the batches that are not held out."""
        assert self._walk is not None
        cross, rows = torch.zeros_like(hessian), 0
        theirs = [pair for share in self._walk.collect(k, list) for pair in share]
        mine = [pair for share in walk.collect(k, list) for pair in share]
        if len(theirs) != len(mine):
            return torch.zeros_like(hessian)  # a batch took another way: nothing to compare
        for (entry, x), (_, x_hat) in zip(theirs, mine, strict=True):
            if not entry.held_out and x.shape == x_hat.shape:
                original, quantized = x.flatten(0, -2).float(), x_hat.flatten(0, -2).float()
                finite = torch.isfinite(original.sum(1) + quantized.sum(1))
                cross.addmm_((original - quantized)[finite].T, quantized[finite])
                rows += int(finite.sum())
        damped = hessian + dampening_frac * hessian.diagonal().mean() * torch.eye(len(hessian))
        return torch.linalg.solve(damped, (cross / max(rows, 1)).T).T
