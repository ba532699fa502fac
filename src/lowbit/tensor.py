"""QuantizedTensor: what every method ends in, and every format, kernel and test starts from. InputGrid: how a linear's
input is rounded."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.numerics import dequantize, fake_quantize_activation
from lowbit.scheme import TensorScheme


@dataclass(frozen=True)
class InputGrid:
    """The grid of a linear's input: one scale a token found at run time, or the stored one (a tensor of one entry)."""

    scheme: TensorScheme
    scale: Tensor | None = None

    def round(self, x: Tensor) -> Tensor:
        """x (..., in) on the grid, in x's dtype."""
        return fake_quantize_activation(x, self.scheme, self.scale)


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight (out, in) as codes on a grid; `dequantize()` defines what it means.

    codes       (out, in) int8, or float8_e4m3fn for a float grid
    scale       (out/r, in/c) in its storage dtype; may be negative (see algorithms/scale_search.py)
    zero_point  (out/r, in/c) int8, or None for a symmetric grid
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: TensorScheme

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(out, in) values, computed in float32 and rounded once to `dtype`."""
        return dequantize(self.codes, self.scale, self.zero_point, self.scheme).to(dtype)

    @property
    def stored_bits(self) -> int:
        """Bits of codes, scales and zero points; divide by codes.numel() for bits per weight."""
        bits = self.codes.numel() * self.scheme.bits + self.scale.numel() * self.scale.element_size() * 8
        return bits + (0 if self.zero_point is None else self.zero_point.numel() * self.scheme.bits)

    def split_rows(self, sizes: list[int]) -> list["QuantizedTensor"]:
        """Row slices, for linears that were quantized together. Not for grids whose scales span rows."""
        assert self.scheme.granularity in ("channel", "group"), self.scheme
        zeros = [None] * len(sizes) if self.zero_point is None else self.zero_point.split(sizes)
        return [
            replace(self, codes=c.contiguous(), scale=s.contiguous(), zero_point=None if z is None else z.contiguous())
            for c, s, z in zip(self.codes.split(sizes), self.scale.split(sizes), zeros, strict=True)
        ]
