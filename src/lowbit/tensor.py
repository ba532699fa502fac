"""QuantizedTensor: what every method ends in, and every format, kernel and test starts from. InputGrid: how a linear's
input is rounded."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.hadamard import Rotation
from lowbit.lattice import WIDTH
from lowbit.numerics import dequantize, fake_quantize_activation
from lowbit.scheme import TensorScheme

ROWS = 1024  # of a weight, worked on at once: what one column touches stays in the cache
_ENTRIES = 1 << 22  # fewer rows, where they are so wide that a piece would hold more weights than this


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

    codes         (out, in) int8, or float8_e4m3fn for FP8; a lattice: int32 (out, in/8, stages)
    scale         (out/r, in/c) in its storage dtype; may be negative (see algorithms/scale_search.py)
    zero_point    (out/r, in/c) int8, or None for a symmetric grid
    table         (out, 2^bits) ascending values of a learned grid, in their storage dtype; None for all others
    tensor_scale  () float32: everything is divided by it (NVFP4, whose group scales are E4M3); None for all others
    rotation      what the stored weight was multiplied with on both sides (algorithms/quip.py), or None
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: TensorScheme
    table: Tensor | None = None
    tensor_scale: Tensor | None = None
    rotation: Rotation | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        width = WIDTH if self.scheme.kind == "e8p" else 1
        return self.codes.shape[0], self.codes.shape[1] * width

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def step(self) -> Tensor:
        """(out/r, in/c) float32: the scale with the tensor's own scale put in."""
        scale = self.scale.float()
        return scale if self.tensor_scale is None else scale / self.tensor_scale

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(out, in) values, computed in float32 and rounded once to `dtype`."""
        values = dequantize(self.codes, self.step, self.zero_point, self.scheme, self.table)
        return (values if self.rotation is None else self.rotation.undo(values)).to(dtype)

    def equals(self, other: "QuantizedTensor") -> bool:
        """Whether both mean the same values, to the last bit; quick where all parts are alike."""
        mine, theirs = (
            (q.codes, q.scale, q.zero_point, q.table, q.tensor_scale) for q in (self, other)
        )  # a rotation is compared by what it does
        if self.scheme == other.scheme and self.rotation is other.rotation is None and all(map(_alike, mine, theirs)):
            return True
        return torch.equal(self.dequantize(), other.dequantize())

    @property
    def stored_bits(self) -> int:
        """Bits of codes, scales, zero points, tables and signs; divide by `numel` for bits per weight."""
        parts = (self.scale, self.table, self.tensor_scale)
        bits = self.numel * self.scheme.bits + sum(p.numel() * p.element_size() * 8 for p in parts if p is not None)
        bits += 0 if self.zero_point is None else self.zero_point.numel() * self.scheme.bits
        return bits + (0 if self.rotation is None else self.rotation.stored_bits)

    def split_rows(self, sizes: list[int]) -> list["QuantizedTensor"]:
        """Row slices, for linears that were quantized together. Not for grids whose scales span rows."""
        assert self.scheme.granularity in ("channel", "group"), self.scheme
        assert self.rotation is None, "a rotation of the outputs spans rows"
        starts = [sum(sizes[:i]) for i in range(len(sizes))]

        def rows(part: Tensor | None, i: int) -> Tensor | None:
            return None if part is None else part[starts[i] : starts[i] + sizes[i]].contiguous()

        return [
            replace(
                self,
                codes=self.codes[starts[i] : starts[i] + sizes[i]].contiguous(),
                scale=self.scale[starts[i] : starts[i] + sizes[i]].contiguous(),
                zero_point=rows(self.zero_point, i),
                table=rows(self.table, i),
            )
            for i in range(len(sizes))
        ]


def _alike(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two parts are the same bytes; torch compares no float8."""
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def rows_at_once(width: int) -> int:
    """How many rows of a weight with so many columns make a piece."""
    return min(ROWS, max(_ENTRIES // width, 64))


def row_pieces(weight: Tensor, scheme: TensorScheme) -> tuple[Tensor, ...]:
    """Rows of weight (out, in) in pieces of about ROWS: no scale spans two of them, but the whole tensor's."""
    tile, _ = scheme.tile(*weight.shape)
    pieces: tuple[Tensor, ...] = weight.split(max(rows_at_once(weight.shape[1]) // tile, 1) * tile)
    return pieces


def join_rows(parts: list[QuantizedTensor]) -> QuantizedTensor:
    """Rows that were quantized apart, on one grid and under one tensor scale, as one tensor again."""
    if len(parts) == 1:
        return parts[0]
    assert all(p.rotation is None for p in parts), "a rotation of the outputs spans rows"

    def join(name: str) -> Tensor | None:
        every = [getattr(part, name) for part in parts]
        return None if every[0] is None else torch.cat(every)

    codes, scale = torch.cat([p.codes for p in parts]), torch.cat([p.scale for p in parts])
    return replace(parts[0], codes=codes, scale=scale, zero_point=join("zero_point"), table=join("table"))
