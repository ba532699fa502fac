"""Quantized checkpoints by their `quant_method`: which linears are stored how, and one of them read."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lowbit.errors import InputError
from lowbit.formats import awq, compressed_tensors, gguf_model, gptq, modelopt
from lowbit.scheme import Scheme
from lowbit.tensor import QuantizedTensor

Get = Callable[[str], Tensor]


@dataclass(frozen=True)
class Reader:
    """`schemes(config, linears, stored tensor names, get)` by linear; `unpack(linear, get, scheme, config)`."""

    schemes: Callable[[Mapping[str, Any], Iterable[str], Iterable[str], Get], dict[str, Scheme]]
    unpack: Callable[[str, Get, Scheme, Mapping[str, Any]], QuantizedTensor]


READERS = {
    "compressed-tensors": Reader(
        lambda config, linears, _stored, _get: compressed_tensors.read_schemes(config, linears),
        lambda name, get, scheme, _config: compressed_tensors.unpack(name, get, scheme),
    ),
    "gptq": Reader(gptq.read_schemes, gptq.unpack),
    "awq": Reader(awq.read_schemes, awq.unpack),
    "modelopt": Reader(modelopt.read_schemes, modelopt.unpack),
    "gguf": Reader(gguf_model.read_schemes, gguf_model.unpack),
}


def find_reader(config: Mapping[str, Any]) -> Reader:
    """Raises InputError for a quant_method that lowbit cannot read, naming it."""
    method = config.get("quant_method")
    if method not in READERS:
        raise InputError(f"this model is already quantized by {method!r}; lowbit reads {', '.join(READERS)}.")
    return READERS[method]
