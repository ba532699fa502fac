# ruff: noqa: ARG001  (a fake takes every argument of its operator)
"""GPTQ's column loops (algorithms/gptq.py) as a torch operator: the C++ kernel in cpu/columns.h, and its torch twin.

Both do the same operations in the same order, none of which may be fused, so their results are equal to the last bit.
Arrays are (columns, out): the columns of a block of the weight, each in one piece.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.kernels.pack import native

INTEGERS, TABLE, FP8 = range(3)  # kinds of grids


@dataclass(frozen=True)
class Grid:
    """What the columns of a block are rounded to: `scale[index[i]]` times integers of [lowest, highest] less the zero
    point, times the entries of a table, or times e4m3 numbers.

    scale, zero: (scales, out) float32; index: (columns,) int32; table: (entries, out) float32, ascending."""

    kind: int
    scale: Tensor
    index: Tensor
    zero: Tensor | None = None
    table: Tensor | None = None
    lowest: float = 0.0
    highest: float = 0.0


def round_and_repair(W: Tensor, U: Tensor, grid: Grid) -> Tensor:
    """Column by column: round it, and let the later ones take up  (w_i - ŵ_i) / U_ii * U_ij . Returns Ŵ; W (columns,
    out) float32 becomes the errors (w_i - ŵ_i) / U_ii. U (columns, columns): the upper triangle counts."""
    W_hat = torch.empty_like(W)
    _sweep(W, W_hat, U, grid, descend=False)
    return W_hat


def descend(W_hat: Tensor, G: Tensor, H: Tensor, grid: Grid) -> None:
    """Column by column: the value next to  ŵ_i + G_i / H_ii  becomes ŵ_i, and the later slopes G_j lose H_ij times the
    change. W_hat and G (columns, out) float32 are changed; H (columns, columns): the upper triangle counts."""
    _sweep(W_hat=W_hat, x=G, matrix=H, grid=grid, descend=True)


def _sweep(x: Tensor, W_hat: Tensor, matrix: Tensor, grid: Grid, *, descend: bool) -> None:
    args = (grid.scale, grid.zero, grid.index, grid.table, grid.kind, grid.lowest, grid.highest)
    sweep_columns(x, W_hat, matrix, *args, descend)


@torch.library.custom_op("lowbit::sweep_columns", mutates_args={"x", "value"})
def sweep_columns(
    x: Tensor, value: Tensor, matrix: Tensor, scale: Tensor, zero: Tensor | None, index: Tensor, table: Tensor | None,
    kind: int, lowest: float, highest: float, descend: bool,
) -> None:  # fmt: skip
    """`descend` (x: slopes) or `round_and_repair` (x: weights); see there."""
    twin(x, value, matrix, Grid(kind, scale, index, zero, table, lowest, highest), descend=descend)


@sweep_columns.register_fake
def _(
    x: Tensor, value: Tensor, matrix: Tensor, scale: Tensor, zero: Tensor | None, index: Tensor, table: Tensor | None,
    kind: int, lowest: float, highest: float, descend: bool,
) -> None:  # fmt: skip
    return None


def twin(x: Tensor, value: Tensor, matrix: Tensor, grid: Grid, *, descend: bool) -> None:
    """The operator's meaning, in torch."""
    for i, k in enumerate(grid.index.tolist()):
        wanted = value[i] + x[i] / matrix[i, i] if descend else x[i].clone()
        found = _nearest(wanted, grid, k)
        change = found - value[i] if descend else (wanted - found) / matrix[i, i]
        value[i] = found
        if not descend:
            x[i] = change
        x[i + 1 :] -= matrix[i, i + 1 :, None] * change


def _nearest(w: Tensor, grid: Grid, k: int) -> Tensor:
    """The grid's values next to w (out,) under the k-th scales."""
    y = w / grid.scale[k]
    if grid.kind == FP8:
        return y.clamp(-448, 448).to(torch.float8_e4m3fn).float() * grid.scale[k]
    if grid.table is not None:
        levels = grid.table.T.contiguous()
        middles = ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()
        return levels.gather(1, torch.searchsorted(middles, y[:, None]))[:, 0] * grid.scale[k]
    codes = y.round()
    if grid.zero is None:
        return codes.clamp(grid.lowest, grid.highest) * grid.scale[k]
    zero = grid.zero[k]
    return ((codes + zero).clamp(grid.lowest, grid.highest) - zero) * grid.scale[k]


def native_sweep(
    x: Tensor, value: Tensor, matrix: Tensor, grid: Grid, *, descend: bool, isa: str | None = None
) -> None:
    """The C++ `sweep_columns`, in the calling thread; `isa` names one of `native.isas()`."""
    (columns, out), matrix = x.shape, matrix.contiguous()
    scales, entries = len(grid.scale), 0 if grid.table is None else len(grid.table)
    shapes = {
        "value": (value, (columns, out)), "matrix": (matrix, (columns, columns)), "scale": (grid.scale, (scales, out)),
        "zero": (grid.zero, (scales, out)), "table": (grid.table, (entries, out)), "x": (x, (columns, out)),
    }  # fmt: skip
    for name, (tensor, shape) in shapes.items():
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(f"{name}: expected contiguous float32 {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
    index = grid.index.to(torch.int32).contiguous()
    if len(index) != columns or (columns and not 0 <= int(index.min()) <= int(index.max()) < scales):
        raise ValueError(f"index: expected {columns} numbers below {scales}")
    if (grid.kind == TABLE) != (entries > 0):
        raise ValueError(f"kind {grid.kind} with a table of {entries} entries")
    native.sweep(
        descend, grid.kind, x.data_ptr(), value.data_ptr(), columns, out, matrix.data_ptr(), grid.scale.data_ptr(),
        scales, 0 if grid.zero is None else grid.zero.data_ptr(), index.data_ptr(),
        0 if grid.table is None else grid.table.data_ptr(), entries, grid.lowest, grid.highest, isa,
    )  # fmt: skip


def _sweep_cpu(
    x: Tensor, value: Tensor, matrix: Tensor, scale: Tensor, zero: Tensor | None, index: Tensor, table: Tensor | None,
    kind: int, lowest: float, highest: float, descend: bool,
) -> None:  # fmt: skip
    native_sweep(x, value, matrix, Grid(kind, scale, index, zero, table, lowest, highest), descend=descend)


if native is not None:
    sweep_columns.register_kernel("cpu")(_sweep_cpu)
