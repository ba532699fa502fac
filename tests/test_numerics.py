import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.errors import InputError
from lowbit.numerics import choose_qparams, dequantize, fake_quantize_activation, quantize, scale_shape
from lowbit.scheme import TensorScheme

SHAPE = (8, 64)
GRANULARITIES = [("tensor", 0), ("channel", 0), ("group", 16), ("block", 4)]
FP8 = TensorScheme("float", 8, "channel")
FP8_FINITE = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
FP8_FINITE = FP8_FINITE[FP8_FINITE.isfinite()]


def int_scheme(bits: int, symmetric: bool = True, granularity: str = "group", size: int = 16) -> TensorScheme:
    return TensorScheme("int", bits, granularity, size, symmetric)  # type: ignore[arg-type]


def random_grid(scheme: TensorScheme, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Random codes, bfloat16 scales and zero points of a weight of SHAPE."""
    g = torch.Generator().manual_seed(seed)
    if scheme.kind == "float":
        codes = FP8_FINITE[torch.randint(len(FP8_FINITE), SHAPE, generator=g)].to(torch.float8_e4m3fn)
    else:
        codes = torch.randint(int(scheme.qmin), int(scheme.qmax) + 1, SHAPE, generator=g).to(torch.int8)
    where = scale_shape(scheme, SHAPE)
    scale = (torch.rand(where, generator=g) + 0.01).bfloat16()
    zero = torch.randint(int(scheme.qmin), int(scheme.qmax) + 1, where, generator=g).to(torch.int8)
    return codes, scale, None if scheme.symmetric else zero


@pytest.mark.parametrize(("granularity", "size"), GRANULARITIES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_quantize_inverts_dequantize_on_grid_values(bits: int, symmetric: bool, granularity: str, size: int) -> None:
    scheme = int_scheme(bits, symmetric, granularity, size)
    codes, scale, zero = random_grid(scheme, seed=bits)
    values = dequantize(codes, scale, zero, scheme)
    assert torch.equal(quantize(values, scale, zero, scheme), codes)


@pytest.mark.parametrize(("granularity", "size"), GRANULARITIES)
def test_quantize_inverts_dequantize_on_fp8_values(granularity: str, size: int) -> None:
    scheme = TensorScheme("float", 8, granularity, size)  # type: ignore[arg-type]
    codes, scale, _ = random_grid(scheme, seed=1)
    again = quantize(dequantize(codes, scale, None, scheme), scale, None, scheme)
    assert torch.equal(again.float(), codes.float())


@pytest.mark.parametrize(("granularity", "size"), GRANULARITIES)
def test_grouping_is_what_a_loop_over_entries_says(granularity: str, size: int) -> None:
    scheme = int_scheme(4, False, granularity, size)
    codes, scale, zero = random_grid(scheme, seed=2)
    assert zero is not None
    values = dequantize(codes, scale, zero, scheme)
    for i in range(SHAPE[0]):
        for j in range(SHAPE[1]):
            r, c = scheme.tile(*SHAPE)
            k = i // r, j // c
            assert values[i, j] == (float(codes[i, j]) - float(zero[k])) * float(scale[k])


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_error_is_at_most_half_a_step_inside_the_range(bits: int, symmetric: bool, scale_dtype: torch.dtype) -> None:
    scheme = int_scheme(bits, symmetric)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(bits))
    scale, zero = choose_qparams(x, scheme, scale_dtype)
    codes = quantize(x, scale, zero, scheme)
    step = scale.float().repeat_interleave(16, 1)
    offset = 0 if zero is None else zero.float().repeat_interleave(16, 1)
    error = (dequantize(codes, scale, zero, scheme) - x).abs()
    inside = (x >= (scheme.qmin - 0.5 - offset) * step) & (x <= (scheme.qmax + 0.5 - offset) * step)
    assert bool((error <= step / 2 * (1 + 1e-4))[inside].all())
    assert bool(
        (error <= step * (1 + 0.02 * 2**bits)).all()
    )  # at the clamped end: the zero point's and scale's rounding


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100), min_size=16, max_size=16),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
)
def test_any_finite_row_stays_near_its_grid(values: list[float], bits: int, symmetric: bool) -> None:
    scheme = int_scheme(bits, symmetric)
    x = torch.tensor([values])
    scale, zero = choose_qparams(x, scheme, torch.float32)
    result = dequantize(quantize(x, scale, zero, scheme), scale, zero, scheme)
    assert bool(result.isfinite().all())
    largest = x.abs().max().item()
    if largest > 1e-30:
        assert float((result - x).abs().max()) <= 1.01 * float(scale.abs().max())
    assert bool((result[x == 0] == 0).all())  # zero is always on the grid


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_all_zero_tile_is_zero(bits: int, symmetric: bool) -> None:
    scheme = int_scheme(bits, symmetric)
    x = torch.zeros(SHAPE)
    scale, zero = choose_qparams(x, scheme)
    assert bool((scale == 1).all())
    assert torch.equal(dequantize(quantize(x, scale, zero, scheme), scale, zero, scheme), x)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_end_of_the_integer_grid(bits: int) -> None:
    scheme = int_scheme(bits, granularity="channel", size=0)
    top, scale = scheme.qmax, torch.ones(1, 1)
    halfway = torch.nextafter(torch.tensor(top + 0.5), torch.tensor(torch.inf))
    x = torch.tensor([[0.0, top, top + 0.5, halfway.item(), 1e30, scheme.qmin, scheme.qmin - 1, -1e30, 0.5, 1.5]])
    expected = [0, top, top, top, top, scheme.qmin, scheme.qmin, scheme.qmin, 0, min(2, top)]  # ties to even, clamped
    assert quantize(x, scale, None, scheme).tolist() == [expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", [int_scheme(4), int_scheme(4, False), int_scheme(8), FP8], ids=str)
def test_subnormals_and_small_weights_do_not_break_a_tile(scheme: TensorScheme, dtype: torch.dtype) -> None:
    """Weights of the smallest kind give finite values, no further from the weight than the weight is from zero."""
    tiny = torch.finfo(dtype).tiny
    x = torch.tensor([[tiny, -tiny, tiny / 2, 0.0] * 16]).to(dtype).float()
    scale, zero = choose_qparams(x, scheme, dtype)
    values = dequantize(quantize(x, scale, zero, scheme), scale, zero, scheme)
    assert bool(scale.isfinite().all())
    assert bool(((values - x).abs() <= x.abs().max()).all())


@pytest.mark.parametrize("scheme", [int_scheme(8, granularity="channel", size=0), FP8], ids=["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_rows_keep_their_relative_precision(scheme: TensorScheme, dtype: torch.dtype) -> None:
    """A row of weights around 0.002 is ordinary in float16 checkpoints: its scale is below float16's normal range."""
    x = torch.linspace(-0.002, 0.002, 64)[None]
    scale, zero = choose_qparams(x, scheme, dtype)
    error = dequantize(quantize(x, scale, zero, scheme), scale, zero, scheme) - x
    assert float(error.norm() / x.norm()) < 0.04


@pytest.mark.parametrize("scheme", [int_scheme(2), int_scheme(8), int_scheme(4, False), FP8], ids=str)
def test_the_largest_finite_weights_stay_finite(scheme: TensorScheme) -> None:
    largest = torch.finfo(torch.bfloat16).max
    x = torch.full(SHAPE, largest)
    x[:, ::2] = -largest
    scale, zero = choose_qparams(x, scheme)
    assert bool(scale.isfinite().all())
    assert bool(dequantize(quantize(x, scale, zero, scheme), scale, zero, scheme).abs().amax() > largest / 4)


def test_fp8_codes_are_torchs_own_cast() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 100
    scale = torch.ones(64, 1)
    assert torch.equal(quantize(x, scale, None, FP8).float(), x.clamp(-448, 448).to(torch.float8_e4m3fn).float())


def test_fp8_corners() -> None:
    over = torch.nextafter(torch.tensor(448.0), torch.tensor(torch.inf)).item()
    smallest = 2.0**-9  # the least subnormal of E4M3
    x = torch.tensor([[0.0, 448.0, over, -over, 465.0, 1e30, smallest, smallest / 2, smallest * 0.75]])
    expected = [0.0, 448.0, 448.0, -448.0, 448.0, 448.0, smallest, 0.0, smallest]
    assert quantize(x, torch.ones(1, 1), None, FP8).float().tolist() == [expected]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_relative_error_of_normal_values(dtype: torch.dtype) -> None:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(3))
    scale, _ = choose_qparams(x, FP8, dtype)
    values = dequantize(quantize(x, scale, None, FP8), scale, None, FP8)
    normal = (x / scale.float()).abs() >= 2.0**-6
    assert bool(((values - x).abs() <= x.abs() * 2.0**-4 * (1 + 1e-5))[normal].all())


def test_symmetric_scale_is_absmax_over_half_the_steps() -> None:
    x = torch.tensor([[3.0, -7.5, 1.0, 0.0]])
    scale, zero = choose_qparams(x, int_scheme(4, granularity="channel", size=0), torch.float32)
    assert zero is None
    assert scale.item() == 1.0  # 7.5 / 7.5


def test_scale_is_already_in_its_storage_type() -> None:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert choose_qparams(x, int_scheme(4), dtype)[0].dtype == dtype


@pytest.mark.parametrize(("size", "columns"), [(128, 96), (48, 64), (7, 64), (65, 64)])
def test_group_size_that_does_not_divide(size: int, columns: int) -> None:
    with pytest.raises(InputError, match=rf"group size {size} does not divide the layer's {columns} inputs: use "):
        scale_shape(int_scheme(4, size=size), (8, columns))


def test_block_that_does_not_divide_the_outputs() -> None:
    with pytest.raises(InputError, match="group size 128 does not divide the layer's 192 outputs"):
        scale_shape(TensorScheme("float", 8, "block", 128), (192, 256))


@pytest.mark.parametrize("kind", ["int", "float"])
def test_activations_are_rounded_token_by_token(kind: str) -> None:
    scheme = TensorScheme(kind, 8, "token")  # type: ignore[arg-type]
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(5)) * torch.tensor([1e-3, 1.0, 1e3])[:, None]
    x[0, 0] = 0
    y = fake_quantize_activation(x, scheme)
    assert y.shape == x.shape
    assert bool((y[0, 0] == 0).all())
    for row, rounded in zip(x.reshape(-1, 64)[1:], y.reshape(-1, 64)[1:], strict=True):
        scale = row.abs().max() / scheme.qmax
        expected = (row / scale).round() if kind == "int" else (row / scale).to(torch.float8_e4m3fn).float()
        assert torch.allclose(rounded, expected * scale, rtol=1e-6, atol=0)
        assert math.isclose(float(rounded.abs().max()), float(row.abs().max()), rel_tol=1e-6)
