"""Quantized checkpoints by their `quant_method`: which linears are stored how, and one of them read."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lowbit.errors import InputError
from lowbit.formats import awq, compressed_tensors, gguf_model, gptq, modelopt, native
from lowbit.scheme import Scheme
from lowbit.tensor import QuantizedTensor

Get = Callable[[str], Tensor]


@dataclass(frozen=True)
class Reader:
    """`schemes(config, linears, embeddings, stored tensor names, get)` by layer, and
    `unpack(layer, get, scheme, config)`."""

    schemes: Callable[[Mapping[str, Any], Collection[str], Collection[str], Iterable[str], Get], dict[str, Scheme]]
    unpack: Callable[[str, Get, Scheme, Mapping[str, Any]], QuantizedTensor]


def _linears_only(
    read: Callable[[Mapping[str, Any], Iterable[str], Iterable[str], Get], dict[str, Scheme]],
) -> Callable[[Mapping[str, Any], Collection[str], Collection[str], Iterable[str], Get], dict[str, Scheme]]:
    return lambda config, linears, _embeddings, stored, get: read(config, linears, stored, get)


READERS = {
    "compressed-tensors": Reader(
        lambda config, linears, embeddings, _stored, _get: compressed_tensors.read_schemes(config, linears, embeddings),
        lambda name, get, scheme, _config: compressed_tensors.unpack(name, get, scheme),
    ),
    native.QUANT_METHOD: Reader(
        lambda config, linears, embeddings, _stored, _get: native.read_schemes(config, linears, embeddings),
        lambda name, get, scheme, _config: native.unpack(name, get, scheme),
    ),
    "gptq": Reader(_linears_only(gptq.read_schemes), gptq.unpack),
    "awq": Reader(_linears_only(awq.read_schemes), awq.unpack),
    "modelopt": Reader(_linears_only(modelopt.read_schemes), modelopt.unpack),
    "gguf": Reader(_linears_only(gguf_model.read_schemes), gguf_model.unpack),
}


def find_reader(config: Mapping[str, Any]) -> Reader:
    """Raises InputError for a quant_method that lowbit cannot read, naming it."""
    method = config.get("quant_method")
    if method not in READERS:
        raise InputError(f"this model is already quantized by {method!r}; lowbit reads {', '.join(READERS)}.")
    return READERS[method]
