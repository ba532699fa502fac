# ruff: noqa: ARG001  (a fake takes every argument of its operator)
"""GPTQ's column loop (algorithms/gptq.py) and the errors of many scales as torch operators: the C++ kernels are in
cpu/columns.h, their torch twins here.

The loop does the same operations in the same order in both, none of which may be fused: codes are equal to the last
bit. Arrays are (columns, out): the columns of a block of the weight, each in one piece.
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


def descend(W_hat: Tensor, G: Tensor, H: Tensor, grid: Grid) -> None:
    """Column by column: the value next to  ŵ_i + G_i / H_ii  becomes ŵ_i, and the later slopes G_j lose H_ij times the
    change. W_hat and G (columns, out) float32 are changed; H (columns, columns): the upper triangle counts."""
    args = (grid.scale, grid.zero, grid.index, grid.table, grid.kind, grid.lowest, grid.highest)
    sweep_columns(G, W_hat, H, *args)


@torch.library.custom_op("lowbit::sweep_columns", mutates_args={"x", "value"})
def sweep_columns(
    x: Tensor, value: Tensor, matrix: Tensor, scale: Tensor, zero: Tensor | None, index: Tensor, table: Tensor | None,
    kind: int, lowest: float, highest: float,
) -> None:  # fmt: skip
    """`descend` with slopes x, values and a curvature; see there."""
    twin(x, value, matrix, Grid(kind, scale, index, zero, table, lowest, highest))


@sweep_columns.register_fake
def _(
    x: Tensor, value: Tensor, matrix: Tensor, scale: Tensor, zero: Tensor | None, index: Tensor, table: Tensor | None,
    kind: int, lowest: float, highest: float,
) -> None:  # fmt: skip
    return None


def twin(x: Tensor, value: Tensor, matrix: Tensor, grid: Grid) -> None:
    """The operator's meaning, in torch."""
    for i, k in enumerate(grid.index.tolist()):
        found = _nearest(value[i] + x[i] / matrix[i, i], grid, k)
        change = found - value[i]
        value[i] = found
        x[i + 1 :] -= matrix[i, i + 1 :, None] * change


NO_INDEX = torch.empty(0, dtype=torch.int32)


def scale_errors(x: Tensor, weight: Tensor, grid: Grid) -> Tensor:
    """(scales, out): what every scale of the grid would cost each row, Σ weight_i (ŵ_i - w_i)² over the columns of x
    (columns, out); weight (columns,). The grid's index is not read."""
    args = (grid.scale, grid.zero, grid.table, grid.kind, grid.lowest, grid.highest)
    errors: Tensor = grid_errors(x, weight, *args)
    return errors


@torch.library.custom_op("lowbit::grid_errors", mutates_args=())
def grid_errors(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor | None,
    kind: int, lowest: float, highest: float,
) -> Tensor:  # fmt: skip
    """See `scale_errors`."""
    return errors_twin(x, weight, Grid(kind, scale, NO_INDEX, zero, table, lowest, highest))


@grid_errors.register_fake
def _(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor | None,
    kind: int, lowest: float, highest: float,
) -> Tensor:  # fmt: skip
    return x.new_empty(scale.shape)


def errors_twin(x: Tensor, weight: Tensor, grid: Grid) -> Tensor:
    """The operator's meaning, in torch; sums in another order."""
    costs = [(_nearest(x, grid, k) - x).square_().mul_(weight[:, None]).sum(0) for k in range(len(grid.scale))]
    return torch.stack(costs)


def _nearest(w: Tensor, grid: Grid, k: int) -> Tensor:
    """The grid's values next to w (..., out) under the k-th scales."""
    y = w / grid.scale[k]
    if grid.kind == FP8:
        return y.clamp(-448, 448).to(torch.float8_e4m3fn).float() * grid.scale[k]
    if grid.table is not None:
        levels = grid.table.T.contiguous()
        middles = ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()
        codes = torch.searchsorted(middles, y.reshape(-1, y.shape[-1]).T.contiguous())  # (out, ...)
        return levels.gather(1, codes).T.reshape(y.shape) * grid.scale[k]
    codes = y.round()
    if grid.zero is None:
        return codes.clamp(grid.lowest, grid.highest) * grid.scale[k]
    zero = grid.zero[k]
    return ((codes + zero).clamp(grid.lowest, grid.highest) - zero) * grid.scale[k]


def native_sweep(x: Tensor, value: Tensor, matrix: Tensor, grid: Grid, isa: str | None = None) -> None:
    """The C++ `sweep_columns`, in the calling thread; `isa` names one of `native.isas()`."""
    columns, out = x.shape
    matrix = matrix.contiguous()
    _check(
        {"x": (x, (columns, out)), "value": (value, (columns, out)), "matrix": (matrix, (columns, columns))}, grid, out
    )
    index = grid.index.to(torch.int32).contiguous()
    if len(index) != columns or (columns and not 0 <= int(index.min()) <= int(index.max()) < len(grid.scale)):
        raise ValueError(f"index: expected {columns} numbers below {len(grid.scale)}")
    _call(_DESCENT, x, value, matrix, grid, index, isa)


def native_errors(x: Tensor, weight: Tensor, grid: Grid, isa: str | None = None) -> Tensor:
    """The C++ `grid_errors`, in the calling thread."""
    columns, out = x.shape
    weight = weight.contiguous()
    _check({"x": (x, (columns, out)), "weight": (weight, (columns,))}, grid, out)
    error = torch.empty(len(grid.scale), out)
    _call(_ERRORS, x, error, weight, grid, grid.index, isa)
    return error


_DESCENT, _ERRORS = range(2)


def _check(arrays: dict[str, tuple[Tensor, tuple[int, ...]]], grid: Grid, out: int) -> None:
    """Raise ValueError for what C++ would read or write beyond."""
    scales, entries = len(grid.scale), 0 if grid.table is None else len(grid.table)
    every = arrays | {"scale": (grid.scale, (scales, out))}
    every |= {} if grid.zero is None else {"zero": (grid.zero, (scales, out))}
    every |= {} if grid.table is None else {"table": (grid.table, (entries, out))}
    for name, (tensor, shape) in every.items():
        if tensor.shape != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(f"{name}: expected contiguous float32 {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
    if (grid.kind == TABLE) != (entries > 0):
        raise ValueError(f"kind {grid.kind} with a table of {entries} entries")


def _call(what: int, x: Tensor, value: Tensor, matrix: Tensor, grid: Grid, index: Tensor, isa: str | None) -> None:
    scales, zero, table = len(grid.scale), grid.zero, grid.table
    native.sweep(
        what, grid.kind, x.data_ptr(), value.data_ptr(), *x.shape, matrix.data_ptr(), grid.scale.data_ptr(), scales,
        0 if zero is None else zero.data_ptr(), index.data_ptr(), 0 if table is None else table.data_ptr(),
        0 if table is None else len(table), grid.lowest, grid.highest, isa,
    )  # fmt: skip


def _sweep_cpu(
    x: Tensor, value: Tensor, matrix: Tensor, scale: Tensor, zero: Tensor | None, index: Tensor, table: Tensor | None,
    kind: int, lowest: float, highest: float,
) -> None:  # fmt: skip
    native_sweep(x, value, matrix, Grid(kind, scale, index, zero, table, lowest, highest))


def _errors_cpu(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor | None,
    kind: int, lowest: float, highest: float,
) -> Tensor:  # fmt: skip
    return native_errors(x, weight, Grid(kind, scale, NO_INDEX, zero, table, lowest, highest))


if native is not None:
    grid_errors.register_kernel("cpu")(_errors_cpu)
    sweep_columns.register_kernel("cpu")(_sweep_cpu)
