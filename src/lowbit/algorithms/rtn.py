"""RTN: round to nearest, every weight on its own.

The baseline that everything else must beat. `search=True` (the default of `--method rtn`) picks scales by the
unweighted search; `loss_rtn` in every report is the plain min-max form.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.algorithms.scale_search import search_qparams
from lowbit.numerics import choose_qparams, quantize
from lowbit.scheme import TensorScheme
from lowbit.tensor import QuantizedTensor


@dataclass(frozen=True)
class RTNSettings:
    """scale_search: least-squares scales instead of min-max."""

    scale_search: bool = True


def rtn(
    weight: Tensor, scheme: TensorScheme, scale_dtype: torch.dtype, *, scale_search: bool = False
) -> QuantizedTensor:
    """Round weight (out, in) to the nearest grid values under min-max scales, or under searched ones."""
    if scale_search:
        scale, zero = search_qparams(weight, scheme, None, scale_dtype)
    else:
        scale, zero = choose_qparams(weight, scheme, scale_dtype)
    return QuantizedTensor(quantize(weight, scale, zero, scheme), scale, zero, scheme)
