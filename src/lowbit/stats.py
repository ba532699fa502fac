"""Running statistics of a linear's input, updated batch by batch and merged across workers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.kernels.ops import add_gram

_CHUNK_ROWS = 2048
_TILE = 128


@dataclass
class Hessian:
    """H = mean over rows of x xᵀ, (in, in) float32: the curvature of a linear's squared output error.

    Only the lower triangle is multiplied out; `mean` mirrors it. Rows that are not finite are
    counted and left out, so that one bad activation does not silently void a layer.
    """

    width: int
    rows: int = 0
    bad_rows: int = 0

    def __post_init__(self) -> None:
        self.sum = torch.zeros(self.width, self.width)

    def update(self, x: Tensor) -> None:
        """x (..., in), any float dtype."""
        for chunk in x.reshape(-1, self.width).split(_CHUNK_ROWS):
            finite = torch.isfinite(chunk.sum(1, dtype=torch.float32))
            rows = chunk
            if not bool(finite.all()):
                self.bad_rows += int((~finite).sum())
                rows = chunk[finite]
            self.rows += len(rows)
            add_gram(self.sum, rows)

    def merge(self, other: "Hessian") -> None:
        self.sum += other.sum
        self.rows += other.rows
        self.bad_rows += other.bad_rows

    def mean(self) -> Tensor:
        """(in, in), exactly symmetric."""
        lower = torch.tril(self.sum / max(self.rows, 1))
        return lower + torch.tril(lower, -1).T


def quadratic_losses(error: Tensor, *hessians: Tensor) -> list[float]:
    """Mean over output channels of e H eᵀ, for an error (out, in) and each symmetric H (in, in): squared output errors.

    Σ e H eᵀ = ⟨EᵀE, H⟩: one product of half the cost of E H serves every H.
    """
    rows, width = error.shape
    rows_as_float = error.float()
    gram = torch.zeros(width, width)
    for i in range(0, width, _TILE):
        end = i + _TILE
        gram[i:end, :end] = rows_as_float[:, i:end].T @ rows_as_float[:, :end]
    lower = gram.tril_(-1)
    diagonal = rows_as_float.square().sum(0)
    return [float(2 * _dot(lower, H) + _dot(diagonal, H.diagonal())) / rows for H in hessians]


def quadratic_loss(error: Tensor, hessian: Tensor) -> float:
    """The same for one H."""
    return quadratic_losses(error, hessian)[0]


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum(-1).double().sum())


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
