"""What rounding a linear costs at its output.

An error E = W - Ŵ costs  mean over outputs of e H eᵀ,  H = E[x xᵀ] over the calibration rows. `Statistics` are the
Hessians of one input: one feeds the method, one of held-out windows only judges it. Of a wide input there is one
Hessian alone, which all threads add to in turn, and rows of the held-out windows instead of theirs. `Units` keep losses
comparable where an equalization has changed the weights: they are the original model's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lowbit.algorithms.rtn import rtn
from lowbit.model.lockstep import Walk
from lowbit.model.walk import Entry
from lowbit.parking import WIDE
from lowbit.scheme import TensorScheme
from lowbit.stats import Hessian, Rows, quadratic_losses
from lowbit.tensor import QuantizedTensor

_ENTRIES = 1 << 22  # of an error, at once: fewer, and the Hessian is read more often than the error


@dataclass(frozen=True)
class Statistics:
    """Of one input: what the method sees, and what judges it."""

    train: Hessian
    held_out: Hessian | Rows

    @staticmethod
    def empty(width: int) -> "Statistics":
        return Statistics(Hessian(width), Rows(width) if width >= WIDE else Hessian(width))

    def update(self, entry: Entry, x: Tensor, threads: int) -> None:
        if entry.held_out:
            self.held_out.update(x)
        else:
            self.train.update(x, threads)

    @staticmethod
    def collect(walk: Walk, k: int, width: int) -> "Statistics":
        """Of the k-th input group of the block that `walk` goes through."""

        if width >= WIDE:
            total = Statistics.empty(width)
            walk.in_turn(k, partial(total.update, threads=torch.get_num_threads()))
            return total

        def gather(inputs: Iterator[tuple[Entry, Tensor]]) -> tuple[Hessian, Hessian]:
            train, held_out = Hessian(width), Hessian(width)
            for entry, x in inputs:
                (held_out if entry.held_out else train).update(x)
            return train, held_out

        shares = walk.collect(k, gather)
        train, held_out = shares.pop(0)
        for more, apart in shares:
            train.merge(more)
            held_out.merge(apart)
        return Statistics(train, held_out)

    def loss(self, error: Tensor) -> tuple[float, float | None]:
        """(loss under all calibration rows, loss under the held-out ones if there are any) of an error (out, in)."""
        parts = [h for h in (self.train, self.held_out) if h.rows]
        if not parts:
            return 0.0, None
        losses = quadratic_losses(error, *(h.mean() for h in parts if isinstance(h, Hessian)))
        losses += [h.loss(error) for h in parts if isinstance(h, Rows)]
        every = sum(loss * h.rows for loss, h in zip(losses, parts, strict=True)) / sum(h.rows for h in parts)
        return every, losses[-1] if self.held_out.rows else None


@dataclass(frozen=True, eq=False)
class Units:
    """How an equalized weight relates to the original one: W = original · columns / rows.

    Losses are reported for the original model: its outputs are `rows` times as large, its inputs `columns` times.
    """

    columns: Tensor | None = None  # (in,)
    rows: Tensor | None = None  # (out,)

    @property
    def original(self) -> bool:
        return self.columns is None and self.rows is None

    def scaled(self, difference: Tensor) -> Tensor:
        """A difference of weights (out, in) with outputs in the original's units."""
        return difference if self.rows is None else difference * self.rows[:, None]

    def of_rows(self, start: int, end: int) -> "Units":
        """The same for some of the rows."""
        return Units(self.columns, None if self.rows is None else self.rows[start:end])

    def plain_error(self, weight: Tensor, grid: TensorScheme, scale_dtype: torch.dtype) -> Tensor:
        """The same of the original weight rounded to nearest under plain min-max scales."""
        original = weight.float() if self.rows is None else weight.float() * self.rows[:, None]
        original = original if self.columns is None else original / self.columns
        difference = original - rtn(original, grid, scale_dtype).dequantize()
        return difference if self.columns is None else difference * self.columns


def output_loss(
    statistics: Statistics, weight: Tensor, quantized: QuantizedTensor | None, unit: Units
) -> tuple[float, float | None]:
    """Statistics.loss of weight - quantized (of the weight itself for None), some rows at a time."""
    splits = quantized is None or (quantized.rotation is None and quantized.scheme.granularity in ("channel", "group"))
    pieces = weight.split(max(_ENTRIES // weight.shape[1], 64) if splits else len(weight))
    sizes = [len(piece) for piece in pieces]
    values = [None] * len(pieces) if quantized is None else quantized.split_rows(sizes) if splits else [quantized]
    every, held_out, start = 0.0, 0.0, 0
    for piece, rounded in zip(pieces, values, strict=True):
        end = start + len(piece)
        error = piece.float() if rounded is None else rounded.dequantize().sub_(piece)  # of either sign, in one copy
        loss, apart = statistics.loss(unit.of_rows(start, end).scaled(error))
        every += loss * len(piece)
        held_out += (apart or 0.0) * len(piece)
        start = end
    return every / len(weight), held_out / len(weight) if statistics.held_out.rows else None
