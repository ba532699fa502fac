import pytest
import torch

from lowbit.stats import Hessian, Rows, quadratic_loss


def rows(n: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def hessian_of(x: torch.Tensor) -> Hessian:
    hessian = Hessian(x.shape[-1])
    hessian.update(x)
    return hessian


@pytest.mark.parametrize("width", [1, 64, 256, 300, 513])  # below, at and across the 256-wide steps
def test_mean_of_outer_products(width: int) -> None:
    x = rows(70, width)
    H = hessian_of(x).mean()
    expected = x.double().T @ x.double() / 70
    assert torch.equal(H, H.T)
    assert torch.allclose(H.double(), expected, rtol=1e-5, atol=1e-5)


def test_batches_and_leading_dimensions_do_not_matter() -> None:
    x = rows(60, 32)
    together = hessian_of(x)
    piecewise = Hessian(32)
    piecewise.update(x[:20].reshape(4, 5, 32))
    piecewise.update(x[20:])
    assert piecewise.rows == together.rows == 60
    assert torch.allclose(piecewise.mean(), together.mean(), atol=1e-6)


def test_rows_beyond_one_chunk_are_counted_once() -> None:
    x = rows(8192 + 5, 4)
    hessian = hessian_of(x)
    assert hessian.rows == 8197
    assert torch.allclose(hessian.mean(), x.T @ x / 8197, atol=1e-4)


def test_merge_is_concatenation() -> None:
    x = rows(50, 48)
    x[3, 1] = torch.nan
    merged = hessian_of(x[:17])
    merged.merge(hessian_of(x[17:]))
    together = hessian_of(x)
    assert (merged.rows, merged.bad_rows) == (together.rows, together.bad_rows) == (49, 1)
    assert torch.allclose(merged.mean(), together.mean(), atol=1e-6)


def test_rows_that_are_not_finite_are_counted_and_left_out() -> None:
    x = rows(10, 16)
    bad = x.clone()
    bad[2, 3], bad[5, 0], bad[7] = torch.nan, torch.inf, torch.nan
    bad[9, 0], bad[9, 1] = torch.inf, -torch.inf
    hessian = hessian_of(bad)
    assert (hessian.rows, hessian.bad_rows) == (6, 4)
    assert torch.equal(hessian.mean(), hessian_of(x[[0, 1, 3, 4, 6, 8]]).mean())


def test_no_rows_is_a_zero_hessian() -> None:
    hessian = hessian_of(torch.full((3, 8), torch.nan))
    assert hessian.rows == 0
    assert torch.equal(hessian.mean(), torch.zeros(8, 8))


def test_half_precision_rows_are_summed_in_float32() -> None:
    x = rows(3000, 8).bfloat16()
    assert torch.allclose(hessian_of(x).mean(), x.float().T @ x.float() / 3000, atol=1e-4)


def test_losses_are_mean_squared_output_errors() -> None:
    x, error = rows(200, 600), rows(70, 600, seed=1)
    outputs = x.double() @ error.double().T  # (rows, out)
    exact = pytest.approx(float(outputs.square().mean()), rel=1e-5)
    assert quadratic_loss(error, hessian_of(x).mean()) == exact
    kept = Rows(600)
    kept.update(x)
    assert kept.loss(error) == exact
