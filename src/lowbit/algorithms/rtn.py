"""RTN: round to nearest, every weight on its own.

The baseline that everything else must beat. `search=True` (the default of `--method rtn`) picks scales by the
unweighted search; `loss_rtn` in every report is the plain min-max form.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.algorithms.any4 import learn_table, start_table
from lowbit.algorithms.scale_search import search_qparams
from lowbit.numerics import choose_qparams, quantize, tensor_scale_of
from lowbit.scheme import TensorScheme
from lowbit.tensor import QuantizedTensor, join_rows, row_pieces


@dataclass(frozen=True)
class RTNSettings:
    """scale_search: least-squares scales instead of min-max; for a learned grid, tables learned without statistics."""

    scale_search: bool = True


def rtn(
    weight: Tensor, scheme: TensorScheme, scale_dtype: torch.dtype, *, scale_search: bool = False
) -> QuantizedTensor:
    """Round weight (out, in) to the nearest grid values under min-max scales, or under searched ones."""
    tensor_scale = tensor_scale_of(weight, scheme)
    parts = row_pieces(weight, scheme)  # what is computed on the way is several times as large
    results = [_rtn(part, scheme, scale_dtype, tensor_scale, scale_search) for part in parts]
    return replace(join_rows(results), tensor_scale=tensor_scale)


def _rtn(
    weight: Tensor, scheme: TensorScheme, scale_dtype: torch.dtype, tensor_scale: Tensor | None, scale_search: bool
) -> QuantizedTensor:
    if tensor_scale is not None:
        weight = weight.float() * tensor_scale
    table = None
    if scale_search:
        scale, zero = search_qparams(weight, scheme, None, scale_dtype)
    else:
        scale, zero = choose_qparams(weight, scheme, scale_dtype)
    if scheme.kind == "learned":
        table = learn_table(weight, scale, scheme, None) if scale_search else start_table(len(weight), scheme)
    codes = quantize(weight, scale, zero, scheme, table)
    return QuantizedTensor(codes, scale, zero, scheme, table)
