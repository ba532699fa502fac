"""Was the range cut off?

A scale is a choice between a fine grid and a wide one: what lies beyond the grid's end is stored as the end. Scales are
chosen by what an error costs on the calibration text, so weights that the text hardly looks at may be cut off for free,
and text that does look at them will pay. A few in a thousand are the usual price of a good scale. More than
MOST_WEIGHTS of a linear's weights, or MOST_INPUTS of the values that enter under a stored scale, is an alarm: in the
manifest, on the screen, and in the count for exit code 3.

An entry is clipped where it is more than a step beyond the end: twice what rounding may cost it.
"""

from typing import Any

from torch import Tensor

from lowbit.numerics import beyond_grid
from lowbit.scheme import TensorScheme
from lowbit.tensor import QuantizedTensor, rows_at_once

MOST_WEIGHTS = 0.05
MOST_INPUTS = 0.01


def clipped_weights(weight: Tensor, quantized: QuantizedTensor) -> float | None:
    """The share of weight (out, in) that is clipped in `quantized`; None for a lattice, which has no ends."""
    if quantized.scheme.kind == "e8p":
        return None
    splits = quantized.rotation is None and quantized.scheme.granularity in ("channel", "group")
    pieces = weight.split(rows_at_once(weight.shape[1]) if splits else len(weight))
    parts = quantized.split_rows([len(p) for p in pieces]) if splits else [quantized]
    clipped = 0
    for rows, part in zip(pieces, parts, strict=True):
        x = rows.float() if part.rotation is None else part.rotation.apply(rows.float())
        clipped += int(beyond_grid(x, part.step, part.zero_point, part.scheme, part.table).sum())
    return clipped / weight.numel()


def clipped_inputs(x: Tensor, scheme: TensorScheme, scale: Tensor) -> float:
    """The share of inputs (rows, in) that is clipped under the stored scale [1]."""
    whole = TensorScheme(scheme.kind, scheme.bits, "tensor")
    return float(beyond_grid(x, scale.float().reshape(1, 1), None, whole).float().mean())


def weights_report(weight: Tensor, quantized: QuantizedTensor) -> dict[str, Any]:
    """What a linear's report says: `clipped`, and an `alarm` where it is too much (else None)."""
    share = clipped_weights(weight, quantized)
    alarm = None
    if share is not None and share > MOST_WEIGHTS:
        alarm = f"{share:.1%} of its weights are clipped (the limit is {MOST_WEIGHTS:.0%})"
    return {"clipped": share, "alarm": alarm}


def inputs_report(share: float, report: dict[str, Any]) -> dict[str, Any]:
    """The same of a stored scale of its inputs, added to what `report` says already."""
    alarm = report.get("alarm")
    if share > MOST_INPUTS:
        more = f"{share:.1%} of its inputs are clipped (the limit is {MOST_INPUTS:.0%})"
        alarm = more if alarm is None else f"{alarm}; {more}"
    return {"clipped_inputs": share, "alarm": alarm}
