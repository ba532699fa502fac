"""Which format a directory is in: compressed-tensors wherever it can say it, else lowbit's own layout."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lowbit.errors import InputError
from lowbit.formats import compressed_tensors, native
from lowbit.scheme import Scheme
from lowbit.tensor import QuantizedTensor


@dataclass(frozen=True)
class Format:
    """One layout of tensors and its config."""

    pack: Callable[[str, QuantizedTensor, Scheme], dict[str, Tensor]]
    unpack: Callable[[str, Callable[[str], Tensor], Scheme], QuantizedTensor]
    quantization_config: Callable[[Mapping[str, Scheme], Iterable[str]], dict[str, Any]]  # schemes, rotated linears
    read_schemes: Callable[
        [Mapping[str, Any], Collection[str], Collection[str]], dict[str, Scheme]
    ]  # linears, embeddings


FORMATS = {  # by the quant_method of config.json
    "compressed-tensors": Format(
        compressed_tensors.pack,
        compressed_tensors.unpack,
        lambda schemes, _rotated: compressed_tensors.quantization_config(schemes),
        compressed_tensors.read_schemes,
    ),
    native.QUANT_METHOD: Format(native.pack, native.unpack, native.quantization_config, native.read_schemes),
}


def format_for(schemes: Iterable[Scheme], *, own_layout: bool) -> Format:
    """The format that can carry these schemes; `own_layout` if the method makes more than a scheme says."""
    kinds = {s.weight.kind for s in schemes if s.weight is not None}
    return FORMATS[native.QUANT_METHOD if own_layout or kinds & set(native.OWN_KINDS) else "compressed-tensors"]


def format_of_config(config: Mapping[str, Any]) -> Format:
    """The format a quantization_config names. Raises InputError if lowbit does not read it."""
    method = config.get("quant_method")
    if method not in FORMATS:
        raise InputError(f"this model is already quantized by {method!r}; lowbit reads {' and '.join(FORMATS)}.")
    return FORMATS[method]
