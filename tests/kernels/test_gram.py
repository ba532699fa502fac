"""XᵀX of bf16 rows, added and weighted, against float64, for every instruction set."""

import pytest
import torch

from lowbit.kernels import ops, reference
from lowbit.kernels.pack import native

ISAS = native.isas() if native is not None else []


def sample(rows: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator) * torch.logspace(-6, 2, width)
    return torch.randn(width, width, generator=generator), x.bfloat16()


def check(total: torch.Tensor, start: torch.Tensor, x: torch.Tensor) -> None:
    """Each entry within float rounding of its own scale: |x_i| |x_j|."""
    exact = start.double() + x.double().T @ x.double()
    norms = x.double().norm(dim=0)
    bound = 1e-5 * (norms[:, None] * norms[None, :] + start.double().abs())
    assert bool(((total.double() - exact).abs() <= bound).tril().logical_or(torch.ones_like(bound).triu(1) > 0).all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (2, 31), (3, 5), (70, 33), (256, 64), (257, 40), (513, 300)])
def test_any_shape(isa: str, rows: int, width: int) -> None:
    start, x = sample(rows, width)
    total = start.clone()
    ops.native_add_gram(total, x, isa=isa)
    check(total, start, x)


@pytest.mark.parametrize("isa", ISAS)
def test_nothing_outside_is_touched(isa: str) -> None:
    start, x = sample(5, 37)
    room = torch.full((39, 37), 7.0)
    room[1:38] = start
    ops.native_add_gram(room[1:38], x, isa=isa)
    assert bool((room[0] == 7).all() and (room[38] == 7).all())
    check(room[1:38], start, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_operator_and_twin(dtype: torch.dtype) -> None:
    start, x = sample(70, 130)
    by_operator, by_twin = start.clone(), start.clone()
    ops.add_gram(by_operator, x.to(dtype), 1)
    reference.add_gram(by_twin, x.to(dtype))
    check(by_operator, start, x)
    check(by_twin, start, x)
    torch.library.opcheck(ops.add_gram, (start.clone(), x.to(dtype), 1))


@pytest.mark.skipif(not ISAS, reason="the extension is not built")
def test_refusals() -> None:
    start, x = sample(4, 8)
    with pytest.raises(ValueError, match="bfloat16"):
        ops.native_add_gram(start, x.float())
    with pytest.raises(ValueError, match="8 x 8"):
        ops.native_add_gram(start[:4], x)


def symmetric(width: int, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    halves = [torch.randn(width, width, generator=generator) for _ in range(count)]
    return [half + half.T for half in halves]


def check_forms(forms: torch.Tensor, x: torch.Tensor, matrices: list[torch.Tensor]) -> None:
    """Each within float rounding of  Σ |x_i H_ij x_j|."""
    for form, H in zip(forms.tolist(), matrices, strict=True):
        X = x.double()
        bound = 1e-5 * float((X.abs() @ H.double().abs() * X.abs()).sum())
        assert abs(form - float((X @ H.double() * X).sum())) <= bound


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (2, 31), (3, 5), (70, 33), (256, 64), (257, 40), (1025, 300)])
def test_forms_of_any_shape(isa: str, rows: int, width: int) -> None:
    x, matrices = sample(rows, width)[1], symmetric(width, 2)
    check_forms(ops.native_quadratic_forms(x, matrices, isa=isa), x, matrices)


@pytest.mark.skipif(not ISAS, reason="the extension is not built")
def test_threads_make_no_difference() -> None:
    start, x = sample(600, 300)
    matrices, one, three = symmetric(300, 2), start.clone(), start.clone()
    ops.native_add_gram(one, x, 1)
    ops.native_add_gram(three, x, 3)
    assert torch.equal(one, three)
    forms = [ops.native_quadratic_forms(x, matrices, threads) for threads in (1, 3)]
    assert torch.equal(*forms)


@pytest.mark.skipif(not ISAS, reason="the extension is not built")
def test_a_sum_of_squares_stays_one() -> None:
    """Inputs with a large mean, errors that hardly have one: the outputs' squares nearly cancel in ⟨XᵀX, H⟩."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(4096, 256, generator=generator) + 30
    error = torch.randn(64, 256, generator=generator)
    error = (error - error.mean(1, keepdim=True)).bfloat16()
    H = inputs.T @ inputs / len(inputs)
    exact = float((inputs.double() @ error.double().T).square().sum()) / len(inputs)
    assert float(ops.native_quadratic_forms(error, [H])) == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_forms_operator_and_twin(dtype: torch.dtype) -> None:
    x, matrices = sample(70, 130)[1].to(dtype), symmetric(130, 3)
    check_forms(ops.quadratic_forms(x, matrices), x, matrices)
    check_forms(reference.quadratic_forms(x, matrices), x, matrices)
    torch.library.opcheck(ops.quadratic_forms, (x, matrices))
