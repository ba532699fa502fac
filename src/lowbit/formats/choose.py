"""Which format a result is written in: compressed-tensors wherever it can say it, else lowbit's own layout."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lowbit.formats import compressed_tensors, native
from lowbit.scheme import Scheme
from lowbit.tensor import QuantizedTensor


@dataclass(frozen=True)
class Format:
    """One layout of tensors and its config."""

    pack: Callable[[str, QuantizedTensor, Scheme], dict[str, Tensor]]
    unpack: Callable[[str, Callable[[str], Tensor], Scheme], QuantizedTensor]
    quantization_config: Callable[[Mapping[str, Scheme], Iterable[str]], dict[str, Any]]  # schemes, rotated linears


FORMATS = {  # by the quant_method of config.json
    "compressed-tensors": Format(
        compressed_tensors.pack,
        compressed_tensors.unpack,
        lambda schemes, _rotated: compressed_tensors.quantization_config(schemes),
    ),
    native.QUANT_METHOD: Format(native.pack, native.unpack, native.quantization_config),
}


def format_for(schemes: Iterable[Scheme], *, own_layout: bool) -> Format:
    """The format that can carry these schemes; `own_layout` if the method makes more than a scheme says."""
    kinds = {s.weight.kind for s in schemes if s.weight is not None}
    return FORMATS[native.QUANT_METHOD if own_layout or kinds & set(native.OWN_KINDS) else "compressed-tensors"]
