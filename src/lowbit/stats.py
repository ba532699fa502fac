"""Running statistics of a linear's input, updated batch by batch and merged across workers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.environment import compute_dtype
from lowbit.kernels.ops import add_gram, quadratic_forms

_CHUNK_ROWS = 2048
_LOSS_ROWS = 256
_TILE = 128
_LARGE = 1024  # inputs from which on a loss takes time


@dataclass
class Hessian:
    """H = mean over rows of x xᵀ, (in, in) float32: the curvature of a linear's squared output error.

    Only the lower triangle is multiplied out; `mean` mirrors it. Rows that are not finite are
    counted and left out, so that one bad activation does not silently void a layer.
    """

    width: int
    rows: int = 0
    bad_rows: int = 0
    averaged: bool = False

    def __post_init__(self) -> None:
        self.sum = torch.zeros(self.width, self.width)  # takes no memory before it is written to

    def update(self, x: Tensor, threads: int = 1) -> None:
        """x (..., in), any float dtype. `threads` of C++'s; they make no difference to the sum."""
        assert not self.averaged, "the sum has become a mean"
        for chunk in x.reshape(-1, self.width).split(_CHUNK_ROWS):
            finite = torch.isfinite(chunk.sum(1, dtype=torch.float32))
            rows = chunk
            if not bool(finite.all()):
                self.bad_rows += int((~finite).sum())
                rows = chunk[finite]
            self.rows += len(rows)
            add_gram(self.sum, rows, threads)

    def merge(self, other: "Hessian") -> None:
        """Add what `other` has seen; its sum may live on as this one's."""
        assert not self.averaged, "the sum has become a mean"
        if not self.rows:
            self.sum = other.sum
        elif other.rows:
            self.sum += other.sum
        self.rows += other.rows
        self.bad_rows += other.bad_rows

    def mean(self) -> Tensor:
        """(in, in), exactly symmetric, in the place of the sum: of a wide linear's Hessian one copy is enough."""
        if not self.averaged:
            self.averaged = True
            self.sum /= max(self.rows, 1)
            for i in range(0, self.width, _TILE):
                tile = slice(i, i + _TILE)
                diagonal = torch.tril(self.sum[tile, tile])
                self.sum[tile, tile] = diagonal + torch.tril(diagonal, -1).T
                self.sum[:i, tile] = self.sum[tile, :i].T
        return self.sum


@dataclass
class Rows:
    """The rows x of an input themselves, for  mean (e x)² = e H eᵀ  where H would be many times as large.

    At most in / 2 of them are kept, the first ones: more would take longer to multiply with than H does. Rows that are
    not finite are counted and left out.
    """

    width: int
    rows: int = 0
    bad_rows: int = 0

    def __post_init__(self) -> None:
        self.kept: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        """x (..., in), any float dtype."""
        rows = x.reshape(-1, self.width)
        finite = torch.isfinite(rows.sum(1, dtype=torch.float32))
        self.bad_rows += int((~finite).sum())
        self.rows += int(finite.sum())
        self._keep(rows[finite])

    def merge(self, other: "Rows") -> None:
        """Add what `other` has seen."""
        self.rows += other.rows
        self.bad_rows += other.bad_rows
        for kept in other.kept:
            self._keep(kept)

    def _keep(self, rows: Tensor) -> None:
        room = max(self.width // 2, 1) - sum(len(k) for k in self.kept)
        self.kept.append(rows[: max(room, 0)].clone())

    def loss(self, error: Tensor) -> float:
        """mean over output channels and rows of (e x)², for error (out, in)."""
        E, total = _as_multiplied(error), 0.0
        for chunk in torch.cat(self.kept).split(_LOSS_ROWS):
            outputs = (E @ chunk.to(E.dtype).T).float()
            total += float(outputs.square().sum(dtype=torch.float64))
        return total / len(E) / sum(len(k) for k in self.kept)


def quadratic_losses(error: Tensor, *hessians: Tensor) -> list[float]:
    """mean over output channels of e H eᵀ for each symmetric H (in, in), for error (out, in): mean squared errors."""
    return [total / len(error) for total in quadratic_forms(_as_multiplied(error), hessians).tolist()]


def quadratic_loss(error: Tensor, hessian: Tensor) -> float:
    """The same for one H."""
    return quadratic_losses(error, hessian)[0]


def _as_multiplied(error: Tensor) -> Tensor:
    """A large error in bfloat16 where the CPU has it: a sum of squares hardly notices that each number is rounded on
    its own, and stays one (H and the sums are float32; rounding these would not)."""
    return error.to(compute_dtype() if error.shape[1] >= _LARGE else torch.float32)


@dataclass
class InputSummary:
    """Of a linear's input, channel by channel: the largest magnitude, the mean magnitude, and every `stride`-th row.

    Rows that are not finite are left out.
    """

    width: int
    stride: int = 1
    rows: int = 0

    def __post_init__(self) -> None:
        self.absmax = torch.zeros(self.width)
        self.sum_abs = torch.zeros(self.width)
        self.kept: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        """x (..., in), any float dtype."""
        rows = x.reshape(-1, self.width).float()
        rows = rows[torch.isfinite(rows.sum(1))]
        if len(rows) == 0:
            return
        magnitude = rows.abs()
        self.absmax = torch.maximum(self.absmax, magnitude.amax(0))
        self.sum_abs += magnitude.sum(0)
        self.kept.append(rows[-self.rows % self.stride :: self.stride].clone())
        self.rows += len(rows)

    def merge(self, other: "InputSummary") -> None:
        self.absmax = torch.maximum(self.absmax, other.absmax)
        self.sum_abs += other.sum_abs
        self.kept += other.kept
        self.rows += other.rows

    @property
    def mean_abs(self) -> Tensor:
        return self.sum_abs / max(self.rows, 1)

    @property
    def sample(self) -> Tensor:
        """(about rows / stride, in) float32."""
        return torch.cat(self.kept) if self.kept else torch.zeros(0, self.width)
