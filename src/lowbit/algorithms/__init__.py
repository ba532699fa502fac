"""The methods, one file each. Three dict literals say what there is; nothing registers itself.

METHODS round, EQUALIZATIONS choose channel scales, ROTATIONS turn the residual stream; compose.py joins them.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lowbit.algorithms.any4 import Any4Settings, any4
from lowbit.algorithms.awq import AWQSettings
from lowbit.algorithms.gptq import GPTQSettings, gptq
from lowbit.algorithms.hadamard import HadamardSettings
from lowbit.algorithms.quip import QuipSettings, quip
from lowbit.algorithms.rtn import RTNSettings, rtn
from lowbit.algorithms.signround import KINDS as SIGNROUND_KINDS
from lowbit.algorithms.signround import SignRoundSettings
from lowbit.algorithms.smoothquant import SmoothQuantSettings
from lowbit.errors import InputError, nearest
from lowbit.scheme import TensorScheme
from lowbit.tensor import QuantizedTensor

# rounding(weight (out, in), H (in, in) or None, scheme, settings, scale dtype) -> tensor, what to record about it
Rounding = Callable[[Tensor, Tensor | None, TensorScheme, Any, torch.dtype], tuple[QuantizedTensor, dict[str, Any]]]


@dataclass(frozen=True)
class Method:
    rounding: Rounding
    settings: type
    needs_calibration: bool
    grids: tuple[str, ...] = ("int", "midrise", "float", "nf", "learned")  # the kinds of TensorScheme it rounds to
    one_by_one: bool = False  # linears that share an input may not be rounded as rows of one matrix
    own_layout: bool = False  # what it makes is more than standard formats can say
    learns: bool = False  # its rounding is the start of what learning.py does with a block or the model


def _rtn(
    weight: Tensor, _hessian: Tensor | None, scheme: TensorScheme, settings: RTNSettings, dtype: torch.dtype
) -> tuple[QuantizedTensor, dict[str, Any]]:
    return rtn(weight, scheme, dtype, scale_search=settings.scale_search), {}


def _gptq(
    weight: Tensor, hessian: Tensor | None, scheme: TensorScheme, settings: GPTQSettings, dtype: torch.dtype
) -> tuple[QuantizedTensor, dict[str, Any]]:
    assert hessian is not None
    quantized, dampening = gptq(weight, hessian, scheme, settings, dtype)
    return quantized, {"dampening_frac": dampening}


def _any4(
    weight: Tensor, hessian: Tensor | None, scheme: TensorScheme, settings: Any4Settings, dtype: torch.dtype
) -> tuple[QuantizedTensor, dict[str, Any]]:
    return any4(weight, hessian, scheme, settings, dtype), {}


def _quip(
    weight: Tensor, hessian: Tensor | None, scheme: TensorScheme, settings: QuipSettings, dtype: torch.dtype
) -> tuple[QuantizedTensor, dict[str, Any]]:
    assert hessian is not None
    quantized, dampening = quip(weight, hessian, scheme, settings, dtype)
    return quantized, {"dampening_frac": dampening}


METHODS = {
    "rtn": Method(_rtn, RTNSettings, needs_calibration=False),
    "gptq": Method(_gptq, GPTQSettings, needs_calibration=True),
    "signround": Method(_gptq, SignRoundSettings, needs_calibration=True, grids=SIGNROUND_KINDS, learns=True),
    "any4": Method(_any4, Any4Settings, needs_calibration=True, grids=("learned",)),
    "quip": Method(
        _quip,
        QuipSettings,
        needs_calibration=True,
        grids=("int", "midrise", "e8p"),
        one_by_one=True,
        own_layout=True,
    ),
}
EQUALIZATIONS: dict[str, type] = {"awq": AWQSettings, "smoothquant": SmoothQuantSettings}
ROTATIONS: dict[str, type] = {"hadamard": HadamardSettings}


def find_method(name: str) -> Method:
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}. {nearest(name, METHODS)}")
    return METHODS[name]


def settings_class(name: str) -> type:
    """The settings of a part by its name, whatever its kind."""
    return (EQUALIZATIONS | ROTATIONS).get(name) or find_method(name).settings


def make_settings(name: str, values: dict[str, str]) -> Any:
    """The method's settings with `values` (as written by the user) put in. Raises InputError naming what exists."""
    cls = settings_class(name)
    types = {f.name: f.type for f in fields(cls)}
    parsed = {}
    for key, text in values.items():
        if key not in types:
            raise InputError(f"method {name!r} has no setting {key!r}. {nearest(key, types)}")
        parsed[key] = _parse(f"{name}: {key}", types[key], text)
    return cls(**parsed)


def _parse(where: str, kind: Any, text: str) -> Any:
    kind = kind if isinstance(kind, type) else {"bool": bool, "int": int, "float": float, "str": str}[kind]
    if kind is bool:
        if text.lower() in ("true", "false", "yes", "no", "1", "0"):
            return text.lower() in ("true", "yes", "1")
        raise InputError(f"{where}={text}: expected true or false.")
    try:
        value = kind(text)
    except ValueError as error:
        raise InputError(f"{where}={text}: expected a {kind.__name__}.") from error
    if kind in (int, float) and not 0 <= value < 1e9:
        raise InputError(f"{where}={text}: expected a number from 0 up.")
    return value
