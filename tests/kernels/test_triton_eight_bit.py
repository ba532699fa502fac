"""Quantization of activations, int8 and FP8 products: kernels against their torch twins."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from lowbit.kernels import reference
from lowbit.kernels.triton import PLACE, ops, twins

pytest.importorskip("triton", minversion="3.9" if PLACE == "cpu" else "3.6", reason="interpreter: Triton 3.9 or newer")

from lowbit.kernels.triton import activations, fp8, w8a8

E4M3 = torch.float8_e4m3fn
needs_fp8 = pytest.mark.skipif(not fp8.supported(torch.device(PLACE)), reason="this GPU has no FP8")


@pytest.mark.parametrize("dtype", [torch.int8, pytest.param(E4M3, marks=needs_fp8)], ids=["int8", "fp8"])
@pytest.mark.parametrize(("n", "group"), [(32, 0), (100, 32), (300, 0), (300, 128), (16, 32)])
def test_quantization_is_its_twin_exactly(n: int, group: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, n)
    x[1] = 0
    x[2] *= 1e-40
    x[3] *= 1e20
    x[4] = (torch.arange(n) - n // 2) * 0.5  # with max 127 or 448 below: exact ties
    x[4, 0] = 127.0 if dtype == torch.int8 else 448.0
    x[5] = torch.linspace(-1, 1, n) ** 9  # down to the smallest FP8 steps
    codes, scale = activations.quantize(x.to(PLACE), None, 0.0, group, dtype)
    expected, expected_scale = twins.quantize(x, None, 0.0, group, dtype)
    assert torch.equal(codes.cpu().float(), expected.float())  # as numbers: -0 and 0 are one
    assert torch.equal(scale.cpu(), expected_scale)


@needs_fp8
def test_every_float_rounds_to_the_nearest_fp8() -> None:
    """All E4M3 values, all midpoints of neighbours and their float32 neighbours; the scale is 1."""
    grid = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    middle = (grid[1:] + grid[:-1]) / 2
    x = torch.cat([grid, middle, middle.nextafter(torch.tensor(1e9)), middle.nextafter(torch.tensor(0.0))])
    x = torch.cat([x, -x])[None].contiguous()
    codes, scale = activations.quantize(x.to(PLACE), None, 0.0, 0, E4M3)
    assert float(scale) == pytest.approx(1.0)
    assert torch.equal(codes.cpu().float(), x.to(E4M3).float())


@pytest.mark.parametrize("dtype", [torch.int8, pytest.param(E4M3, marks=needs_fp8)], ids=["int8", "fp8"])
def test_norm_and_quantization_are_their_twin(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for n, group in ((64, 32), (100, 0), (768, 128)):
        x, w = (torch.randn(4, n) * 3).bfloat16(), torch.randn(n)
        codes, scale = activations.quantize(x.to(PLACE), w.to(PLACE), 1e-5, group, dtype)
        expected, expected_scale = twins.quantize(x, w, 1e-5, group, dtype)
        torch.testing.assert_close(scale.cpu(), expected_scale, rtol=1e-5, atol=0)
        # A value on the edge of two codes may fall either way: neighbours, and few.
        ratio = 1.0 if dtype == torch.int8 else 0.126
        step = (codes.cpu().float() - expected.float()).abs()
        allowed = torch.ones_like(step) if dtype == torch.int8 else expected.float().abs() * ratio + 2**-9
        assert (step <= allowed).all()
        assert (step > 0).float().mean() < 0.01


@pytest.mark.parametrize(("m", "rows", "cols"), [(1, 40, 100), (7, 33, 256), (40, 130, 300)])
def test_int8_products_are_exact(m: int, rows: int, cols: int) -> None:
    """Integer sums: with scales of powers of two, the float64 result rounded once; codes include -128."""
    torch.manual_seed(0)
    x, w = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((m, cols), (rows, cols)))
    x[0], w[0] = -128, -128
    x_scale, w_scale = 2.0 ** torch.randint(-3, 3, (m,)), -(2.0 ** torch.randint(-3, 3, (rows,)))
    bias = torch.randint(-9, 9, (rows,)).float()
    y = w8a8.linear(*(t.to(PLACE) for t in (x, x_scale, w, w_scale, bias)), torch.float32).cpu()
    assert torch.equal(y, (x.double() @ w.double().T * x_scale[:, None] * w_scale + bias).float())


@needs_fp8
@pytest.mark.parametrize("weights", ["tensor", "channel", "block"])
@pytest.mark.parametrize("grouped", [False, True], ids=["token", "token-group"])
def test_fp8_products_are_their_twin(weights: str, grouped: bool) -> None:
    torch.manual_seed(0)
    for m, rows, cols in ((1, 40, 100), (17, 130, 300)):
        x, w = ((torch.randn(shape) * 100).clamp(-448, 448).to(E4M3) for shape in ((m, cols), (rows, cols)))
        x[0], w[0] = (torch.full((cols,), v).to(E4M3) for v in (448.0, -448.0))
        k_blocks, n_blocks = -(-cols // 128), -(-rows // 128)
        x_scale = torch.rand(m, k_blocks if grouped else 1) + 0.1
        w_scale = torch.rand({"tensor": (1, 1), "channel": (rows, 1), "block": (n_blocks, k_blocks)}[weights]) + 0.1
        bias = torch.randn(rows)
        y = fp8.linear(*(t.to(PLACE) for t in (x, x_scale, w, w_scale, bias)), torch.float32).cpu()
        expected = twins.fp8_linear(x, x_scale, w, w_scale, bias, torch.float32)
        # On the GPU a tensor core's running sum of 128 columns keeps about 14 bits.
        torch.testing.assert_close(
            y, expected, rtol=0, atol=float(expected.abs().max()) * (1e-6 if PLACE == "cpu" else 1e-3)
        )


def test_a_w8a8_linear_from_end_to_end_is_near_the_float_one() -> None:
    """Quantize x, multiply, against float x and the dequantized weight: the error is that of int8 activations."""
    torch.manual_seed(0)
    x, w = torch.randn(5, 256), torch.randint(-127, 128, (48, 256), dtype=torch.int8)
    w_scale = torch.rand(48) / 127
    codes, scale = activations.quantize(x.to(PLACE))
    y = w8a8.linear(codes, scale[:, 0], w.to(PLACE), w_scale.to(PLACE), None, torch.float32).cpu()
    exact = x @ (w.float() * w_scale[:, None]).T
    assert (y - exact).norm() / exact.norm() < 0.01


def test_bad_scales_are_refused() -> None:
    x, w = torch.zeros(2, 256, device=PLACE).to(E4M3), torch.zeros(4, 256, device=PLACE).to(E4M3)
    with pytest.raises(ValueError, match="fit neither"):
        fp8.linear(x, torch.ones(2, 3, device=PLACE), w, torch.ones(4, 1, device=PLACE))
    with pytest.raises(ValueError, match="fit neither"):
        fp8.linear(x, torch.ones(2, 1, device=PLACE), w, torch.ones(3, 2, device=PLACE))
    with pytest.raises(ValueError, match="powers of two"):
        activations.quantize(torch.zeros(2, 96, device=PLACE), None, 0.0, 96)
    with pytest.raises(ValueError, match="expected int8"):
        w8a8.linear(x, torch.ones(2, device=PLACE), w, torch.ones(4, device=PLACE))


def test_operators() -> None:
    x, weight = torch.randn(3, 64), torch.randn(64)
    opcheck(ops.quantize, (x, weight, 1e-5, 32, torch.int8))
    codes, scale = ops.quantize(x, None, 0.0, 0, torch.int8)
    assert torch.equal(codes, reference.quantize_rows(x, 0)[0])
    w = torch.randint(-127, 128, (8, 64), dtype=torch.int8)
    arguments = (codes, scale, w, torch.rand(8, 1), None, torch.float32)
    opcheck(ops.scaled_linear, arguments)
    assert torch.equal(
        ops.scaled_linear(*arguments), twins.int8_linear(codes, scale[:, 0], w, arguments[3][:, 0], None, torch.float32)
    )
