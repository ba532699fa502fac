"""FP8 checkpoints as NVIDIA's ModelOpt writes them ("unified Hugging Face" export).

    weight        float8_e4m3fn (out, in)
    weight_scale  float32: () for FP8, (out,) for FP8_PER_CHANNEL_PER_TOKEN, (out / 128, 1, in / 128, 1) for FP8_PB_WO
    input_scale   float32 (), for FP8: the activations' one scale, found while calibrating

config.json says `quant_method: modelopt`, hf_quant_config.json the same in ModelOpt's own words. lowbit's fp8 is
FP8_PER_CHANNEL_PER_TOKEN and fp8-block FP8_PB_WO. FP8 is read with its weights as they are; its activations are then
rounded per token, finer than by the file's one input_scale.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.numerics import scale_shape
from lowbit.scheme import PRESETS, Scheme
from lowbit.tensor import QuantizedTensor

_ALGORITHMS = {"fp8": "FP8_PER_CHANNEL_PER_TOKEN", "fp8-block": "FP8_PB_WO"}
_READ = {"FP8": "fp8-tensor", "FP8_PER_CHANNEL_PER_TOKEN": "fp8", "FP8_PB_WO": "fp8-block", "FP8_PB_REAL": "fp8-block"}
Get = Callable[[str], Tensor]


def supports(scheme: Scheme) -> str | None:
    """None if the format holds this scheme, else the reason why not."""
    if scheme.weight is None or str(scheme) in _ALGORITHMS:
        return None
    return f"ModelOpt export is for {' and '.join(_ALGORITHMS)}"


def pack(name: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of linear `name`."""
    scale = quantized.scale.float()
    shape = (len(scale),) if quantized.scheme.granularity == "channel" else (scale.shape[0], 1, scale.shape[1], 1)
    return {f"{name}.weight": quantized.codes, f"{name}.weight_scale": scale.reshape(shape).contiguous()}


def unpack(name: str, get: Get, scheme: Scheme, _config: Mapping[str, Any]) -> QuantizedTensor:
    """Read linear `name`. Raises InputError if weight and scale do not fit the scheme."""
    weight = scheme.weight
    assert weight is not None
    codes, scale = get(f"{name}.weight"), get(f"{name}.weight_scale")
    if codes.dtype != torch.float8_e4m3fn or codes.ndim != 2:
        raise InputError(f"{name}.weight is {codes.dtype} {list(codes.shape)}; expected float8_e4m3fn (out, in).")
    where = scale_shape(weight, (codes.shape[0], codes.shape[1]))
    if scale.numel() != where[0] * where[1]:
        raise InputError(f"{name}.weight_scale has {scale.numel()} entries; {scheme} needs {where}.")
    return QuantizedTensor(codes, scale.reshape(where), None, weight)


def read_schemes(
    config: Mapping[str, Any], linears: Iterable[str], stored: Iterable[str], _get: Get
) -> dict[str, Scheme]:
    """The scheme of each linear that has a weight_scale. Raises InputError for an algorithm lowbit cannot read."""
    words = config.get("quantization") if isinstance(config.get("quantization"), Mapping) else config
    assert words is not None
    algorithm = str(words.get("quant_algo") or words.get("quant_type") or "")
    if algorithm not in _READ:
        raise InputError(f"ModelOpt algorithm {algorithm!r} cannot be read; lowbit reads {', '.join(_READ)}.")
    names = set(stored)
    return {n: PRESETS[_READ[algorithm]] for n in linears if f"{n}.weight_scale" in names}


def quantization_config(schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """config.json's `quantization_config`. Raises InputError if the layers' schemes differ."""
    return {"quant_method": "modelopt", "quant_algo": _algorithm(schemes), "ignore": _left(schemes)}


def hf_quant_config(schemes: Mapping[str, Scheme], version: str) -> dict[str, Any]:
    """The file hf_quant_config.json."""
    return {
        "producer": {"name": "lowbit", "version": version},
        "quantization": {
            "quant_algo": _algorithm(schemes),
            "kv_cache_quant_algo": None,
            "exclude_modules": _left(schemes),
        },
    }


def _left(schemes: Mapping[str, Scheme]) -> list[str]:
    return [n for n, s in schemes.items() if s.weight is None]


def _algorithm(schemes: Mapping[str, Scheme]) -> str:
    found = {str(s) for s in schemes.values() if s.weight is not None}
    if len(found) != 1:
        raise InputError(
            f"a ModelOpt file has one algorithm for all layers, this model has {', '.join(sorted(found))}."
        )
    return _ALGORITHMS[found.pop()]
