"""Linears in a rotated basis, and on the lattice, over lowbit's own kernels.

A weight that was rounded in a rotated basis is stored as W̃ = H (s_out · W · s_in) Hᵀ (hadamard.py). Undoing that at
load would give a matrix of 16 bits; rotating the *activations* costs O(n log n) a token and leaves the weight at its
few bits (Tseng et al. 2024, "QuIP#", section 5):

    y = s_out · Hᵀ (W̃ (H (s_in · x)))

Activations are rounded to int8 in groups of 32 on their way into the product, and after a rotation they have no
outliers. Lattice codes are decoded in registers (kernels/cpu/lattice.h).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit.hadamard import transform
from lowbit.kernels import ops, pack
from lowbit.scheme import Scheme
from lowbit.tensor import QuantizedTensor

_BITS = (2, 3, 4, 8)


def carries(quantized: QuantizedTensor, scheme: Scheme) -> bool:
    """Whether `RotatedLinear` can hold this weight: a lattice, or rotated integers, with float activations."""
    weight = quantized.scheme
    grid = weight.kind == "e8p" or (
        quantized.rotation is not None and weight.kind == "int" and weight.bits in _BITS and weight.group_size % 32 == 0
    )
    return pack.native is not None and scheme.activation is None and grid and weight.granularity in ("channel", "group")


class RotatedLinear(nn.Module):
    """y = x Wᵀ + b. x (..., in) in any float type; y (..., out) in the same."""

    in_signs: Tensor | None
    out_signs: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, quantized: QuantizedTensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = quantized.shape
        weight, rotation = quantized.scheme, quantized.rotation
        scale = quantized.step.expand(self.out_features, -1)
        if weight.kind == "e8p":
            self.kernel = f"native e8p{weight.bits}"
            self.packed = pack.pack_lattice(quantized.codes, scale, bits=weight.bits)
        else:
            self.kernel = f"native rotated int{weight.bits}"
            self.packed = pack.pack_int(quantized.codes, scale, quantized.zero_point, bits=weight.bits)
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
        self.register_buffer("in_signs", None if rotation is None else rotation.in_signs)
        self.register_buffer("out_signs", None if rotation is None else rotation.out_signs)

    @property
    def bytes_read(self) -> int:
        """Bytes of codes, scales and signs; a table of vectors stays in the first cache and is counted once."""
        return self.packed.nbytes + sum(s.nbytes for s in (self.in_signs, self.out_signs) if s is not None)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).float()
        if self.in_signs is not None:
            rows = _rotate(rows * self.in_signs)
        y = ops.linear(rows, self.packed)
        if self.out_signs is not None:
            y = _rotate(y, inverse=True) * self.out_signs
        y = y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        biased: Tensor = y if self.bias is None else y + self.bias
        return biased


def _rotate(x: Tensor, *, inverse: bool = False) -> Tensor:
    """hadamard.transform, by the kernel where the width is a power of two (the matrix is symmetric then)."""
    if x.shape[-1] & (x.shape[-1] - 1):
        return transform(x, inverse=inverse)
    rotated: Tensor = ops.hadamard(x)
    return rotated
