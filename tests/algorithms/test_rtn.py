import pytest
import torch

from lowbit.algorithms import find_method, make_settings
from lowbit.algorithms.rtn import RTNSettings, rtn
from lowbit.errors import InputError
from lowbit.numerics import choose_qparams
from lowbit.scheme import Scheme, TensorScheme


def grid(text: str) -> TensorScheme:
    scheme = Scheme.parse(text).weight
    assert scheme is not None
    return scheme


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(16, 128, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("text", ["w4a16-g32", "w3a16-g64-asym", "w8a16-channel", "w8a16-tensor", "w8a8", "fp8"])
def test_plain_rtn_takes_the_nearest_value_of_the_min_max_grid(text: str) -> None:
    scheme = grid(text)
    w = weight()
    quantized = rtn(w, scheme, torch.bfloat16)
    scale, zero = choose_qparams(w, scheme, torch.bfloat16)
    step = scale.float().repeat_interleave(128 // scale.shape[1], 1)
    if scheme.kind == "int":
        codes = torch.arange(int(scheme.qmin), int(scheme.qmax) + 1)
    else:
        values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        codes = values[values.isfinite()]
    offset = torch.zeros_like(step) if zero is None else zero.float().repeat_interleave(128 // zero.shape[1], 1)
    candidates = (codes.float() - offset[..., None]) * step[..., None]  # (16, 128, codes)
    least = (candidates - w[..., None]).abs().amin(-1)
    assert torch.allclose((quantized.dequantize() - w).abs(), least, atol=1e-6)


@pytest.mark.parametrize("text", ["w2a16-g32", "w3a16-g64", "w4a16-g32", "w4a16-g32-asym", "w8a16-channel", "fp8"])
def test_searched_scales_lower_the_squared_error(text: str) -> None:
    w = weight()
    plain, searched = (
        (rtn(w, grid(text), torch.bfloat16, scale_search=s).dequantize() - w).square().sum() for s in (False, True)
    )
    assert searched <= plain
    if text != "fp8":
        assert searched < plain


def test_more_bits_are_never_worse() -> None:
    w = weight()
    errors = [
        float((rtn(w, grid(f"w{b}a16-g32"), torch.bfloat16, scale_search=True).dequantize() - w).square().sum())
        for b in range(2, 9)
    ]
    assert errors == sorted(errors, reverse=True)


def test_rtn_does_not_touch_its_input() -> None:
    w = weight()
    before = w.clone()
    rtn(w, grid("w4a16-g32"), torch.bfloat16, scale_search=True)
    assert torch.equal(w, before)


def test_unknown_method_and_setting_name_their_neighbours() -> None:
    with pytest.raises(InputError, match=r"unknown method 'gpqt'. Did you mean gptq"):
        find_method("gpqt")
    with pytest.raises(InputError, match=r"method 'gptq' has no setting 'dampening'. Did you mean dampening_frac"):
        make_settings("gptq", {"dampening": "0.1"})
    with pytest.raises(InputError, match="gptq: sweeps=two: expected a int"):
        make_settings("gptq", {"sweeps": "two"})
    with pytest.raises(InputError, match="gptq: desc_act=maybe: expected true or false"):
        make_settings("gptq", {"desc_act": "maybe"})


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "1e30"])
def test_settings_outside_their_range_are_refused(value: str) -> None:
    with pytest.raises(InputError, match=f"dampening_frac={value}: expected a number from 0 up"):
        make_settings("gptq", {"dampening_frac": value})


def test_settings_are_read_from_text() -> None:
    assert make_settings("rtn", {"scale_search": "No"}) == RTNSettings(scale_search=False)
