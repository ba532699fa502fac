"""Lowbit's integer grids as GGUF types, code for code.

w = (code - zero_point) * scale is carried by a type whose codes reach all of code - zero_point in groups of 32: Q4_0
for -8..7, Q5_0 for -16..15 (so also 4 bits with a zero point), Q8_0 for -128..127. A larger group repeats its scale.
Scales become half precision (numerics.half_scale), which is exact for bfloat16 scales from 2^-17 up.
"""

import torch

from lowbit.errors import InputError
from lowbit.ggml import Q4_0, Q5_0, Q8_0, BlockTensor, BlockType
from lowbit.numerics import half_scale
from lowbit.scheme import Scheme
from lowbit.tensor import QuantizedTensor


def supports(scheme: Scheme) -> str | None:
    """None if some GGUF type holds this scheme's values exactly, else the reason why not."""
    weight = scheme.weight
    if weight is None:
        return None
    if weight.kind != "int":
        return "GGUF has no FP8 weights"
    if scheme.activation is not None:
        return "GGUF does not describe quantized activations"
    if weight.granularity == "group" and weight.group_size % 32:
        return f"GGUF's groups are of 32, which does not divide {weight.group_size}"
    if _type_for(scheme) is None:
        return f"{weight.bits} bits with a zero point reach further than any GGUF type"
    return None


def carrier(name: str, scheme: Scheme) -> BlockType:
    """The smallest type for linear `name`. Raises InputError if there is none."""
    reason, kind = supports(scheme), _type_for(scheme)
    if reason is not None or kind is None:
        raise InputError(f"{name} is {scheme}: {reason}.")
    return kind


def _type_for(scheme: Scheme) -> BlockType | None:
    weight = scheme.weight
    if weight is None or weight.kind != "int":
        return None
    low, high = int(weight.qmin), int(weight.qmax)
    if not weight.symmetric:
        low, high = low - high, high - low
    return next((t for t in (Q4_0, Q5_0, Q8_0) if t.q[0] <= low and high <= t.q[1]), None)


def carry(name: str, quantized: QuantizedTensor, kind: BlockType) -> BlockTensor:
    """The same codes as blocks of `kind`. Raises InputError if rows are not whole blocks or a scale overflows."""
    rows, columns = quantized.codes.shape
    if columns % kind.block:
        raise InputError(f"{name}: {columns} inputs are not whole GGUF blocks of {kind.block}; leave it unquantized.")
    blocks = columns // kind.block

    def spread(x: torch.Tensor) -> torch.Tensor:  # (out/r, in/c) -> (out, blocks)
        return x.repeat_interleave(rows // x.shape[0], 0).repeat_interleave(blocks // x.shape[1], 1)

    d = spread(half_scale(name, quantized.scale))
    codes = quantized.codes.to(torch.int16)
    if quantized.zero_point is not None:
        codes = codes - spread(quantized.zero_point.to(torch.int16)).repeat_interleave(kind.block, 1)
    return BlockTensor(kind, codes, d, torch.ones(rows, blocks, dtype=torch.int16))
