"""Running statistics of a linear's input, updated batch by batch and merged across workers."""

from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK_ROWS = 2048
_TILE = 128


@dataclass
class Hessian:
    """H = mean over rows of x xᵀ, (in, in) float32: the curvature of a linear's squared output error.

    Only blocks on and below the diagonal are multiplied out; `mean` mirrors them. Rows that are not finite are
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
            rows = chunk.float()
            finite = torch.isfinite(rows.sum(1))
            if not bool(finite.all()):
                self.bad_rows += int((~finite).sum())
                rows = rows[finite]
            self.rows += len(rows)
            for i in range(0, self.width, _TILE):
                end = i + _TILE
                self.sum[i:end, :end].addmm_(rows[:, i:end].T, rows[:, :end])

    def merge(self, other: "Hessian") -> None:
        self.sum += other.sum
        self.rows += other.rows
        self.bad_rows += other.bad_rows

    def mean(self) -> Tensor:
        """(in, in), exactly symmetric."""
        lower = torch.tril(self.sum / max(self.rows, 1))
        return lower + torch.tril(lower, -1).T


def quadratic_loss(error: Tensor, hessian: Tensor) -> float:
    """mean over output channels of e H eᵀ, for error (out, in) and H (in, in): the mean squared output error."""
    return float(((error.float() @ hessian) * error.float()).sum().double() / len(error))
