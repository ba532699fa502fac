"""The column loop of GPTQ in C++: equal to their torch twin to the last bit, on every grid and instruction set."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit.kernels.columns import (
    FP8,
    INTEGERS,
    TABLE,
    Grid,
    descend,
    errors_twin,
    grid_errors,
    native_errors,
    native_sweep,
    sweep_columns,
    twin,
)
from lowbit.kernels.pack import native

ISAS = native.isas() if native is not None else []


def curvature(columns: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(3 * columns + 1, columns, generator=generator)
    return x.T @ x / len(x)


def grid(kind: str, columns: int, out: int, generator: torch.Generator) -> Grid:
    scales = max(columns // 16, 1)
    scale = (torch.rand(scales, out, generator=generator) + 0.1) * torch.where(torch.rand(scales, out) < 0.2, -1.0, 1.0)
    index = torch.randint(0, scales, (columns,), generator=generator, dtype=torch.int32)
    if kind == "integers":
        return Grid(INTEGERS, scale, index, None, None, -8.0, 7.0)
    if kind == "zero points":
        zero = torch.randint(0, 16, (scales, out), generator=generator).float()
        return Grid(INTEGERS, scale.abs(), index, zero, None, 0.0, 15.0)
    if kind == "table":
        table = torch.randn(11, out, generator=generator).sort(0).values.contiguous()
        return Grid(TABLE, scale, index, None, table)
    return Grid(FP8, scale, index)


def block(columns: int, out: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(columns, out, generator=generator)
    return x, torch.randn(columns, out, generator=generator).round(), curvature(columns, generator)


KINDS = ["integers", "zero points", "table", "fp8"]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("columns", "out"), [(1, 1), (3, 64), (128, 65), (33, 15), (128, 200), (300, 7)])
@pytest.mark.parametrize("what", ["feedback", "descent"])
def test_equal_to_the_twin(isa: str, kind: str, columns: int, out: int, what: str) -> None:
    x, value, H = block(columns, out)
    matrix = H if what == "descent" else torch.linalg.cholesky(H + torch.eye(columns), upper=True)
    g = grid(kind, columns, out, torch.Generator().manual_seed(1))
    mine, theirs = (x.clone(), value.clone()), (x.clone(), value.clone())
    native_sweep(*mine, matrix, g, isa=isa)
    twin(*theirs, matrix, g)
    assert torch.equal(mine[0], theirs[0])
    assert torch.equal(mine[1], theirs[1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("columns", "out"), [(1, 1), (128, 64), (33, 15), (300, 70)])
def test_errors_of_many_scales(isa: str, kind: str, columns: int, out: int) -> None:
    x, _, _ = block(columns, out)
    weight = torch.rand(columns)
    g = grid(kind, 16 * 9, out, torch.Generator().manual_seed(5))  # nine scales
    mine, theirs = native_errors(x, weight, g, isa), errors_twin(x, weight, g)
    assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_adversarial_values(isa: str, kind: str) -> None:
    special = [0.0, -0.0, 1e-40, -1e-45, 0.5, 1.5, 2.5, -0.5, 447.9, 1e9, -1e30, 3e38, 2.0**-10, 2.0**-9 * 1.5, 464.0]
    x = torch.tensor(special).repeat(4, 1)
    g = grid(kind, 4, len(special), torch.Generator().manual_seed(2))
    g = Grid(g.kind, torch.ones_like(g.scale), g.index, g.zero, g.table, g.lowest, g.highest)  # ties stay ties
    mine, theirs = (x.clone(), torch.zeros_like(x)), (x.clone(), torch.zeros_like(x))
    native_sweep(*mine, torch.eye(4), g, isa=isa)
    twin(*theirs, torch.eye(4), g)
    assert torch.equal(mine[1], theirs[1])


@pytest.mark.parametrize("isa", ISAS)
def test_nothing_outside_is_touched(isa: str) -> None:
    x, value, H = block(5, 37)
    rooms = [torch.full((7, 37), 7.0) for _ in range(2)]
    rooms[0][1:6], rooms[1][1:6] = x, value
    native_sweep(rooms[0][1:6], rooms[1][1:6], H, grid("integers", 5, 37, torch.Generator()), isa=isa)
    for room in rooms:
        assert bool((room[0] == 7).all() and (room[6] == 7).all())


def test_operator() -> None:
    x, value, H = block(20, 30)
    for kind in KINDS:
        g = grid(kind, 20, 30, torch.Generator().manual_seed(3))
        arguments: tuple[Any, ...] = (x.clone(), value.clone(), H, g.scale, g.zero, g.index, g.table, g.kind)
        torch.library.opcheck(sweep_columns, (*arguments, g.lowest, g.highest))
        torch.library.opcheck(grid_errors, (x, H[0].abs(), g.scale, g.zero, g.table, g.kind, g.lowest, g.highest))


def test_what_the_loop_is_for() -> None:
    """Feedback costs less than plain rounding, and descent lowers  tr (w - ŵ) H (w - ŵ)ᵀ  further."""
    generator = torch.Generator().manual_seed(4)
    H = curvature(64, generator) + 0.5  # columns that go together
    w = torch.randn(64, 40, generator=generator)
    g = Grid(INTEGERS, torch.full((1, 40), 0.5), torch.zeros(64, dtype=torch.int32), None, None, -4.0, 3.0)

    def loss(w_hat: Tensor) -> float:
        return float(((w - w_hat) * (H @ (w - w_hat))).sum())

    plain = (w / 0.5).round().clamp(-4, 3) * 0.5
    M = torch.linalg.cholesky(H.flip(0, 1)).flip(0, 1)  # upper triangular, H = M Mᵀ
    repaired = w.clone()
    descend(repaired, torch.zeros_like(w), M, g)
    better = repaired.clone()
    descend(better, H @ (w - better), H, g)
    assert loss(better) < loss(repaired) < 0.8 * loss(plain)


@pytest.mark.skipif(not ISAS, reason="the extension is not built")
def test_refusals() -> None:
    x, value, H = block(4, 8)
    g = grid("integers", 4, 8, torch.Generator())
    with pytest.raises(ValueError, match="value: expected"):
        native_sweep(x, value[:3], H, g)
    with pytest.raises(ValueError, match="matrix: expected"):
        native_sweep(x, value, H[:, :3], g)
    with pytest.raises(ValueError, match="index"):
        native_sweep(x, value, H, Grid(INTEGERS, g.scale, g.index + 7, None, None, 0.0, 1.0))
    with pytest.raises(ValueError, match="weight: expected"):
        native_errors(x, torch.ones(3), g)
    with pytest.raises(ValueError, match="table"):
        native_sweep(x, value, H, Grid(TABLE, g.scale, g.index))
