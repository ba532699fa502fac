import pytest

from lowbit.algorithms.awq import AWQSettings
from lowbit.algorithms.compose import parse_method, settings_of
from lowbit.algorithms.gptq import GPTQSettings
from lowbit.algorithms.rtn import RTNSettings
from lowbit.algorithms.smoothquant import SmoothQuantSettings
from lowbit.errors import InputError


@pytest.mark.parametrize(
    ("text", "parts", "needs_calibration"),
    [
        ("rtn", ("rtn",), False),
        ("gptq", ("gptq",), True),
        ("awq", ("awq", "rtn"), True),
        ("smoothquant", ("smoothquant", "rtn"), True),
        ("awq+rtn", ("awq", "rtn"), True),
        ("awq+gptq", ("awq", "gptq"), True),
        ("smoothquant+gptq", ("smoothquant", "gptq"), True),
        ("hadamard", ("hadamard", "rtn"), False),
        ("hadamard+gptq", ("hadamard", "gptq"), True),
        ("hadamard+awq+gptq", ("hadamard", "awq", "gptq"), True),
    ],
)
def test_parts_in_order(text: str, parts: tuple[str, ...], needs_calibration: bool) -> None:
    method = parse_method(text)
    assert method.parts == parts
    assert method.needs_calibration is needs_calibration


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("awq+smoothquant", "awq and smoothquant: both choose the scale of the same channels.*Keep one"),
        ("rtn+gptq", "rtn and gptq: a weight is rounded once. Keep one"),
        ("gptq+gptq", "a weight is rounded once"),
        ("gptq+awq", r"the order is rotate, equalize, round: write 'awq\+gptq'"),
        ("gptq+hadamard", r"write 'hadamard\+gptq'"),
        ("hadamard+hadamard", "the second rotation would turn the axes"),
        ("aqw+gptq", "unknown method 'aqw'. Did you mean awq"),
        ("awq+", "unknown method ''"),
        ("", "unknown method ''"),
        ("awq gptq", "unknown method 'awq gptq'"),
    ],
)
def test_what_does_not_go_together(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_method(text)


def test_settings_reach_the_part_that_has_them() -> None:
    method = parse_method("smoothquant+gptq")
    assert settings_of(method, {"alpha": "0.8", "dampening_frac": "0.1"}) == {
        "smoothquant": SmoothQuantSettings(alpha="0.8"),
        "gptq": GPTQSettings(dampening_frac=0.1),
    }
    assert settings_of(parse_method("awq"), {"clip": "no", "scale_search": "no"}) == {
        "awq": AWQSettings(clip=False),
        "rtn": RTNSettings(scale_search=False),
    }
    with pytest.raises(InputError, match=r"method 'awq\+gptq' has no setting 'alpha'"):
        settings_of(parse_method("awq+gptq"), {"alpha": "0.5"})


@pytest.mark.parametrize("alpha", ["1.5", "-0.1", "nan", "much"])
def test_alpha_is_auto_or_from_0_to_1(alpha: str) -> None:
    with pytest.raises(InputError, match=f"alpha={alpha}: expected 'auto' or a number from 0 to 1"):
        settings_of(parse_method("smoothquant"), {"alpha": alpha})
