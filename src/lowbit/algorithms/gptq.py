"""GPTQ: round one column at a time and let the columns not yet rounded repair the damage.

A linear's squared output error is quadratic in its weight:  tr (W - Ŵ) H (W - Ŵ)ᵀ  with  H = E[x xᵀ].  Rounding column
after column, each with the best update of the later ones (Frantar et al. 2022, "GPTQ", section 3), is

    ŵ_j = round(w_j + Σ (w_i - ŵ_i) N_ij over i < j),    H = N D Nᵀ,  N upper triangular with ones, D diagonal

(Chee et al. 2023, "QuIP", theorem 6: it is LDLQ). N and D are one Cholesky factor of H, read backwards: H's inverse, by
which GPTQ's paper goes, is never made. What differs from the reference code:

* Activation order with trivial group indices: groups are visited by their largest H_ii and columns inside a group by
  H_ii, so a group's scale exists before its first column is rounded and the columns stay where they were.
* A group's scale comes from the weights *as updated so far* (in-block updates included), by the weighted search.
* Columns no calibration token reached (H_ii = 0) are rounded on their own instead of being set to zero.
* If H + damping is not positive definite, the damping rises tenfold, up to five times; the value used is returned.
* Afterwards `refine` sweeps over the columns again: with all other columns fixed, the best code of column i is the
  one nearest to ŵ_i + [(W - Ŵ) H]_i / H_ii, which never raises the loss; and group scales are refitted exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lowbit.algorithms.any4 import learn_table
from lowbit.algorithms.scale_search import search_qparams
from lowbit.environment import compute_dtype
from lowbit.kernels.columns import FP8, INTEGERS, TABLE, Grid, descend
from lowbit.numerics import choose_qparams, fixed_table, quantize, storable, tensor_scale_of
from lowbit.parking import Parked
from lowbit.scheme import TensorScheme
from lowbit.tensor import QuantizedTensor, join_rows, row_pieces
from lowbit.workers import every_thread, side_by_side

_SWAPPED = 1 << 20  # numbers
_OFF = 0.1  # of the slopes
_LAZY = 512  # columns that repair all later ones at once
WORTH_FORKING = 1 << 21  # weights: with fewer, starting processes takes longer than half the work


@dataclass(frozen=True)
class GPTQSettings:
    """dampening_frac: λ / mean(diag H). block_size: columns between updates (a group, if searched).
    desc_act: activation order. scale_search: weighted search of a group's scale before its columns, instead of min-max.
    sweeps: refinement passes after the GPTQ pass.
    follow_original: round towards the original model's outputs (model/original.py) instead of the weights."""

    dampening_frac: float = 0.01
    block_size: int = 128
    desc_act: bool = True
    scale_search: bool = True
    sweeps: int = 2
    follow_original: bool = False


def gptq(
    weight: Tensor, hessian: Tensor, scheme: TensorScheme, settings: GPTQSettings, scale_dtype: torch.dtype
) -> tuple[QuantizedTensor, float]:
    """Quantize weight (out, in) given H (in, in) float32. Returns the tensor and the dampening_frac that was used.

    Raises ValueError if H is not finite or no damping makes it positive definite.
    """
    tensor_scale = tensor_scale_of(weight, scheme)
    H = alive(hessian.float())
    order = column_order(H.diagonal(), scheme, settings.desc_act)

    def scaled(rows: Tensor) -> Tensor:
        return rows.float() if tensor_scale is None else rows.float() * tensor_scale

    def first(rows: Tensor, factor: Factor, diagonal: Tensor) -> QuantizedTensor:
        return feedback(scaled(rows), diagonal, factor, order, scheme, settings, scale_dtype)

    def better(rows: Tensor, result: QuantizedTensor) -> QuantizedTensor:
        return refine(scaled(rows), result, H, settings.sweeps)

    def both(rows: Tensor, factor: Factor, diagonal: Tensor) -> QuantizedTensor:
        return better(rows, first(rows, factor, diagonal))

    pieces = row_pieces(weight, scheme)  # their codes do not depend on each other's
    large = weight.numel() >= WORTH_FORKING
    parked = Parked(H)  # H and its factor need not be in memory together
    at_once = not parked.away and settings.sweeps > 0
    try:
        factor = _factor(parked.permuted, order, parked.diagonal, settings.dampening_frac)
        used, step = factor.dampening_frac, both if at_once else first
        results = side_by_side([partial(step, piece, factor, parked.diagonal) for piece in pieces], worth_it=large)
        del factor
    finally:
        parked.back()
    if settings.sweeps and not at_once:
        results = side_by_side([partial(better, *pair) for pair in zip(pieces, results, strict=True)], worth_it=large)
    return replace(join_rows(results), tensor_scale=tensor_scale), used


def feedback(
    weight: Tensor,
    diagonal: Tensor,
    factor: "Factor",
    order: Tensor,
    scheme: TensorScheme,
    settings: GPTQSettings,
    scale_dtype: torch.dtype,
) -> QuantizedTensor:
    """Column by column in `order`: round weight (out, in) float32 and let later columns repair the damage. `factor` is
    of the Hessian in that order, `diagonal` (in,) the Hessian's own. The weight is worked on transposed, a column in
    one piece. What a block of columns repairs in all later ones is a product in bfloat16 where the CPU has it."""
    grouped = (
        scheme.granularity == "group" and scheme.kind != "learned"
    )  # a table is learned for the scales as they are
    if settings.scale_search and not grouped:
        scale, zero = search_qparams(weight, scheme, diagonal, scale_dtype)
    else:  # a group's scale is searched when its first column is reached
        scale, zero = choose_qparams(weight, scheme, scale_dtype)
    table = learn_table(weight, scale, scheme, diagonal) if scheme.kind == "learned" else None
    grid = Columns(scale, zero, scheme, weight.shape, table)
    width = scheme.group_size if grouped else 1
    searched = grouped and settings.scale_search
    step = width if searched else max(settings.block_size // width, 1) * width  # columns between updates, whole groups
    block = max(_LAZY // step, 1) * step
    rough = compute_dtype()
    W = weight.T.clone(memory_format=torch.contiguous_format)  # (in, out), rounded as the columns are
    del weight  # a copy of a piece is 32 MB
    wanted = W[order]  # what they are rounded to: the weights, and repairs
    for start in range(0, len(wanted), block):
        here, later = slice(start, start + block), slice(start + block, None)
        columns, N, D = order[here], factor.N[here, here], factor.D[here]
        before = W[columns]
        values, repairs = before.clone(), wanted[here].sub_(before)
        for i in range(0, len(columns), step):
            group, after = slice(i, i + step), slice(i + step, None)
            if searched:
                grid.search(int(columns[i]), (values[group] + repairs[group]).T.contiguous(), D[group])
            descend(values[group], repairs[group], N[group, group], grid.of(columns[group]))
            repairs[after].addmm_(N[group, after].T, before[group] - values[group])
        W[columns] = values
        wanted[later] += factor.N[here, later].T.to(rough) @ before.sub_(values).to(rough)
    del wanted, before, values, repairs
    return grid.codes(W.T.contiguous())


def alive(H: Tensor) -> Tensor:
    """H with the diagonal of columns that no token reached set to the mean of the others, so they stand alone."""
    if not bool(torch.isfinite(H.sum())) and not all(bool(torch.isfinite(rows).all()) for rows in H.split(256)):
        raise ValueError("the Hessian has entries that are not finite: the calibration activations overflowed")
    dead = H.diagonal() == 0
    if bool(dead.any()):
        H = H.clone()
        H.diagonal()[dead] = H.diagonal()[~dead].mean() if bool((~dead).any()) else 1.0
    return H


def column_order(diagonal: Tensor, scheme: TensorScheme, desc_act: bool) -> Tensor:
    """(in,) permutation: columns by H_ii, largest first, groups kept together (by their largest H_ii)."""
    columns = torch.arange(len(diagonal))
    if not desc_act:
        return columns
    if scheme.granularity != "group":
        return torch.argsort(diagonal, descending=True, stable=True)
    by_group = diagonal.reshape(-1, scheme.group_size)
    groups = torch.argsort(by_group.amax(1), descending=True, stable=True)
    inside = torch.argsort(by_group, dim=1, descending=True, stable=True) + columns[:: scheme.group_size, None]
    return inside[groups].reshape(-1)


@dataclass(frozen=True)
class Factor:
    """H + λI = N D Nᵀ with rows and columns in some order: N (in, in) upper triangular with ones on its diagonal, D
    (in,) what a column's rounding costs once the later ones have repaired it; and dampening_frac, λ / mean(diag H)."""

    N: Tensor
    D: Tensor
    dampening_frac: float


def factorize(H: Tensor, dampening_frac: float, order: Tensor | None = None) -> Factor:
    """Of H in `order`, with the first dampening that makes it positive definite. It takes one matrix beside H: a wide
    linear's takes hundreds of megabytes. Raises ValueError if no dampening does."""
    order = torch.arange(len(H)) if order is None else order
    return _factor(lambda order: H[order[:, None], order], order, H.diagonal(), dampening_frac)


def _factor(permuted: Callable[[Tensor], Tensor], order: Tensor, diagonal: Tensor, dampening_frac: float) -> Factor:
    """The same; `permuted` returns a new matrix with H in some order.

    With P, which reverses the order:  P H P = L Lᵀ  gives  H = (P L P) (P L P)ᵀ , upper triangular.
    """
    fraction, failed = dampening_frac, torch.empty((), dtype=torch.int32)
    for _ in range(6):
        matrix = permuted(order.flip(0))
        matrix.diagonal().add_(diagonal.mean() * fraction)
        L = matrix.T  # symmetric; LAPACK works by columns
        with every_thread():
            torch.linalg.cholesky_ex(L, out=(L, failed))
        if not int(failed):
            _reverse(matrix)
            root = L.diagonal().clone()
            return Factor(L.div_(root), root.square(), fraction)
        fraction = max(fraction * 10, 1e-4)
    raise ValueError(f"the Hessian is not positive definite even with dampening_frac {fraction / 10:g}")


def _reverse(matrix: Tensor) -> None:
    """Rows and columns of a contiguous matrix in reverse order, in place: its numbers from the last to the first."""
    numbers = matrix.view(-1)
    half = len(numbers) // 2
    for start in range(0, half, _SWAPPED):
        n = min(_SWAPPED, half - start)
        front, back = numbers[start : start + n], numbers[len(numbers) - start - n : len(numbers) - start]
        swapped = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(swapped)


class Columns:
    """Scales, zero points and tables seen by columns. Scales are kept in float32, at values of their dtype."""

    def __init__(
        self, scale: Tensor, zero: Tensor | None, scheme: TensorScheme, shape: torch.Size, table: Tensor | None = None
    ) -> None:
        self.scale, self.zero, self.scheme, self.table = scale.float(), zero, scheme, table
        self.dtype = scale.dtype
        self.out, self.columns = shape[0], shape[1] // scale.shape[1]  # rows; columns that share a scale
        levels = fixed_table(scheme) if table is None else table.float()
        self.levels = None if levels is None else levels.expand(self.out, -1).T.contiguous()  # (entries, out)

    def of(self, columns: Tensor) -> Grid:
        """The grid of some columns, scale and zero point for each row of the weight."""
        tiles, index = torch.unique(columns // self.columns, return_inverse=True)
        scale, zero = self._rows(self.scale[:, tiles]), None
        if self.zero is not None:
            zero = self._rows(self.zero[:, tiles].float())
        kind = TABLE if self.levels is not None else FP8 if self.scheme.kind == "float" else INTEGERS
        return Grid(kind, scale, index.int(), zero, self.levels, float(self.scheme.qmin), float(self.scheme.qmax))

    def _rows(self, values: Tensor) -> Tensor:
        """(out/r, n) or (1, n) -> (n, out)."""
        return values.repeat_interleave(self.out // len(values), 0).T.contiguous()

    def codes(self, W_hat: Tensor) -> QuantizedTensor:
        """The tensor whose values are W_hat, already on the grid."""
        scale = self.scale.to(self.dtype)
        return QuantizedTensor(
            quantize(W_hat, scale, self.zero, self.scheme, self.table), scale, self.zero, self.scheme, self.table
        )

    def search(self, column: int, group: Tensor, importance: Tensor) -> None:
        """Choose this group's scale anew for its weights as they are now: (out, group_size)."""
        k = column // self.columns
        scale, zero = search_qparams(group, self.scheme, importance, self.dtype)
        self.scale[:, k] = scale[:, 0].float()
        if self.zero is not None and zero is not None:
            self.zero[:, k] = zero[:, 0]


def refine(weight: Tensor, quantized: QuantizedTensor, H: Tensor, sweeps: int = 1) -> QuantizedTensor:
    """Exact descent on E H Eᵀ, E = W - Ŵ: group by group its scales first, then every column's codes. Never worse.

    `weight` is what the codes stand for before the tensor's own scale and rotation, if there are any. The slopes H Eᵀ
    of a block of columns are made when it is reached: one product of H's size a sweep, in bfloat16 where the CPU has it
    and that changes them little (they choose between neighbouring codes; docs/experiments.md).
    """
    scheme = quantized.scheme
    plain = replace(quantized, tensor_scale=None, rotation=None)
    grid = Columns(quantized.scale, quantized.zero_point, scheme, weight.shape, quantized.table)
    W, W_hat = weight.float().T.contiguous(), plain.dequantize().T.contiguous()  # (in, out)
    del weight
    columns, grouped = torch.arange(len(W)), scheme.granularity == "group"
    block = max(128 // grid.columns, 1) * grid.columns if grouped else 128
    for _ in range(sweeps):
        if scheme.granularity == "channel":
            _refit_channels(W, W_hat, H, grid)
        E = _coarse(H, W - W_hat)
        for start in range(0, len(W), block):
            here = slice(start, start + block)
            values, H1 = W_hat[here], H[here, here]  # (block, out), (block, block)
            G = (H[here].to(E.dtype) @ E).float()
            if grouped:
                for k in range(0, len(values), grid.columns):
                    _refit_group(values, G, H1, grid, start, slice(k, k + grid.columns))
            descend(values, G, H1, grid.of(columns[here]))
            E[here] = W[here] - values
    del W, E
    return replace(grid.codes(W_hat.T.contiguous()), tensor_scale=quantized.tensor_scale, rotation=quantized.rotation)


def _coarse(H: Tensor, E: Tensor) -> Tensor:
    """E (in, out) in bfloat16 if its slopes H E may be computed in that: where the CPU has it, and where large products
    do not cancel, as they do under inputs with a large mean. 64 rows of H tell."""
    rough = E.to(compute_dtype())
    rows = H[:: max(len(H) // 64, 1)]
    exact = rows @ E
    off = (rows.to(rough.dtype) @ rough).float() - exact
    return rough if bool(off.norm() <= _OFF * exact.norm()) else E


def _refit_group(values: Tensor, G: Tensor, H1: Tensor, grid: Columns, start: int, group: slice) -> None:
    """The least-squares scale of a group given its codes, after rounding to the storage dtype; in place. `values` and
    G (block, out) begin at column `start`, `group` is counted from there."""
    k = (start + group.start) // grid.columns
    codes = values[group] / grid.scale[:, k]  # (group, out): code - zero_point
    curved = H1[:, group] @ codes
    step = _scale_step(grid, k, curvature=(curved[group] * codes).sum(0), slope=(G[group] * codes).sum(0))
    values[group] += step * codes
    G -= step * curved


def _refit_channels(W: Tensor, W_hat: Tensor, H: Tensor, grid: Columns) -> None:
    """The same for scales of whole rows; W and W_hat (in, out)."""
    codes = W_hat / grid.scale[:, 0]
    curved = H @ codes
    step = _scale_step(grid, 0, curvature=(curved * codes).sum(0), slope=((W - W_hat) * curved).sum(0))
    W_hat += step * codes


def _scale_step(grid: Columns, k: int, curvature: Tensor, slope: Tensor) -> Tensor:
    """(out,) by how much each row's k-th scale changes, 0 where the rounded optimum is no gain; changed in `grid`."""
    old = grid.scale[:, k].clone()
    new = storable(old + slope / curvature.clamp(min=1e-30), grid.dtype).float()
    step = new - old
    step = torch.where(2 * step * slope - step.square() * curvature > 0, step, 0.0)
    grid.scale[:, k] = torch.where(step != 0, new, old)
    return step
