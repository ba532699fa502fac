import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit.algorithms.rtn import rtn
from lowbit.algorithms.scale_search import search_qparams
from lowbit.numerics import choose_qparams, dequantize, quantize, scale_shape
from lowbit.scheme import TensorScheme

ROWS, COLUMNS = 8, 64


def scheme_of(bits: int, symmetric: bool = True, granularity: str = "group", size: int = 32) -> TensorScheme:
    return TensorScheme("int", bits, granularity, size, symmetric)  # type: ignore[arg-type]


def tile_errors(w: Tensor, qparams: tuple[Tensor, Tensor | None], scheme: TensorScheme, importance: Tensor) -> Tensor:
    """Weighted squared error per scale, by a second way: through codes and a loop over tiles."""
    error = (dequantize(quantize(w, *qparams, scheme), *qparams, scheme) - w).double().square() * importance
    r, c = scheme.tile(*w.shape)
    return torch.tensor([[t.sum() for t in row.split(c, 1)] for row in error.split(r, 0)])


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    where=st.sampled_from([("group", 32), ("channel", 0), ("tensor", 0), ("block", 8)]),
    seed=st.integers(0, 10_000),
    heavy_tails=st.booleans(),
)
def test_never_worse_than_min_max_in_any_tile(
    bits: int, symmetric: bool, where: tuple[str, int], seed: int, heavy_tails: bool
) -> None:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(ROWS, COLUMNS, generator=g)
    if heavy_tails:
        w = w**3
    importance = torch.rand(COLUMNS, generator=g) ** 4
    importance[: seed % 5] = 0
    scheme = scheme_of(bits, symmetric, *where)
    searched = tile_errors(w, search_qparams(w, scheme, importance, torch.bfloat16), scheme, importance)
    plain = tile_errors(w, choose_qparams(w, scheme, torch.bfloat16), scheme, importance)
    assert bool((searched <= plain * (1 + 1e-5) + 1e-12).all())


def test_importance_decides() -> None:
    """One row, one outlier: the scale covers it when it matters and lets it clip when it does not."""
    w = torch.randn(1, 32, generator=torch.Generator().manual_seed(0)) * 0.1
    w[0, 0] = 3.0
    scheme, importance = scheme_of(4), torch.ones(32)
    importance[0] = 100.0
    covers = rtn_with(w, scheme, importance)
    importance[0] = 0.0
    clips = rtn_with(w, scheme, importance)
    assert abs(covers[0, 0] - 3.0) < 0.25
    assert float((clips - w)[0, 1:].square().sum()) < float((covers - w)[0, 1:].square().sum())


def rtn_with(w: Tensor, scheme: TensorScheme, importance: Tensor) -> Tensor:
    scale, zero = search_qparams(w, scheme, importance, torch.bfloat16)
    return dequantize(quantize(w, scale, zero, scheme), scale, zero, scheme)


def on_grid(scheme: TensorScheme, seed: int, scale_dtype: torch.dtype, any_end: bool = False) -> Tensor:
    """A weight that is exactly representable: codes that reach an end of the grid, scales with 8 significant bits."""
    g = torch.Generator().manual_seed(seed)
    low, high = int(scheme.qmin), int(scheme.qmax)
    codes = torch.randint(low, high + 1, (ROWS, COLUMNS), generator=g)
    where = scale_shape(scheme, (ROWS, COLUMNS))
    r, c = scheme.tile(ROWS, COLUMNS)
    for i in range(where[0]):
        for j in range(where[1]):
            if any_end and torch.rand(1, generator=g) < 0.5:
                codes[i * r, j * c : (j + 1) * c].clamp_(low + 1)
                codes[i * r, j * c] = high
            else:
                codes[i * r, j * c] = low
            if not scheme.symmetric:
                codes[i * r, j * c + 1] = high
    scale = torch.rand(where, generator=g).bfloat16() + 0.05
    zero = None
    if scheme.symmetric and scheme.bits <= 4:
        scale = scale * (torch.randint(0, 2, where, generator=g) * 2 - 1)
    if not scheme.symmetric:
        zero = torch.randint(low, high + 1, where, generator=g).to(torch.int8)
    return dequantize(codes.to(torch.int8), scale.to(scale_dtype), zero, scheme)


@pytest.mark.parametrize("where", [("group", 32), ("channel", 0)], ids=["group", "channel"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_exactly_representable_weights_come_back(
    bits: int, symmetric: bool, where: tuple[str, int], scale_dtype: torch.dtype
) -> None:
    scheme = scheme_of(bits, symmetric, *where)
    for seed in range(3):
        w = on_grid(scheme, seed, scale_dtype, any_end=symmetric)
        assert torch.equal(rtn(w, scheme, scale_dtype, scale_search=True).dequantize(), w)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_few_bits_need_not_reach_the_end_of_the_grid(bits: int) -> None:
    """Every whole number of steps is tried: codes in -1..1 or -3..2 of a 4-bit grid are found too."""
    scheme = scheme_of(bits)
    for top in range(1, 2 ** (bits - 1)):
        codes = torch.randint(-top, top + 1, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(top))
        codes[:, ::32] = top
        w = codes * torch.tensor(0.0371).bfloat16().float()
        assert torch.equal(rtn(w, scheme, torch.bfloat16, scale_search=True).dequantize(), w)


def test_a_negative_scale_uses_the_extra_negative_code() -> None:
    """At 2 bits the codes are -2..1; a row of {2, -1} s is exact only under the scale -s."""
    w = torch.tensor([[2.0, -1.0, 0.0, 1.0] * 8])
    scheme = scheme_of(2)
    scale, _ = search_qparams(w, scheme, None, torch.bfloat16)
    assert scale.item() == -1.0
    assert torch.equal(rtn(w, scheme, torch.bfloat16, scale_search=True).dequantize(), w)


def test_zero_tile_and_zero_importance() -> None:
    scheme = scheme_of(4)
    w = torch.zeros(2, 64)
    w[1, 40] = 1.0
    for importance in (None, torch.zeros(64)):
        scale, zero = search_qparams(w, scheme, importance, torch.bfloat16)
        assert bool((scale != 0).all())
        values = dequantize(quantize(w, scale, zero, scheme), scale, zero, scheme)
        assert bool((values[w == 0] == 0).all())
