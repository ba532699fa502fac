"""Weights into the layout the CPU kernels read, once, at load.

What comes in is the canonical form: integer codes (out, in), scale (out, n_groups), optional zero_point
(out, n_groups), with W = (codes - zero_point) * scale. What comes out is a `PackedWeight`: byte tensors in the order
that a product reads them (drawn in `cpu/kernels.h`) and a plain description, which `handle()` shows the extension.
Scales keep their exact values: they are stored in bf16 or fp16 when that loses nothing, and in float32 otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lowbit import lattice
from lowbit.kernels import reference

try:
    from lowbit.kernels import _cpu  # type: ignore[attr-defined,unused-ignore]

    native: Any = _cpu
except ImportError:  # installed without a compiler: the torch twins do the work
    native = None

PANEL, BLOCK, MAX_FOLD = 16, 32, 512
INT, TABLE, BF16, LATTICE = 0, 1, 2, 3
_SCALE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class PackedWeight:
    """One matrix (rows, cols), ready for the kernels. `nbytes` is what a token reads."""

    kind: int
    bits: int
    rows: int
    cols: int
    group: int  # columns per scale; cols when a row has one scale
    fold: int  # columns per int32 sum
    zero: int  # the unsigned code that means 0, of symmetric weights
    codes: Tensor  # uint8 (bytes,)
    scales: Tensor | None = None  # (panels, n_groups, 16)
    zeros: Tensor | None = None  # uint8 (panels, n_groups, 16)
    table: Tensor | None = None  # uint8 (panels, 16, 16); of a lattice: see cpu/lattice.h
    bias: Tensor | None = None  # float32 (rows,)
    rest: PackedWeight | None = None  # a second stage, whose product is added
    _handle: list[Any] = field(default_factory=list, compare=False, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zero points and tables."""
        parts = (self.codes, self.scales, self.zeros, self.table, self.bias)
        own = sum(t.numel() * t.element_size() for t in parts if t is not None)
        return own + (0 if self.rest is None else self.rest.nbytes)

    def handle(self) -> Any:
        """The extension's view of this weight; it points into these tensors, so keep this object alive."""
        if not self._handle:
            n_groups = -(-self.cols // self.group)
            self._handle.append(
                native.weight(
                    self.kind, self.bits, self.rows, self.cols, self.group, n_groups, self.fold, self.zero,
                    0 if self.scales is None else _SCALE_TYPES[self.scales.dtype],
                    self.codes.data_ptr(), _ptr(self.scales), _ptr(self.zeros), _ptr(self.table), _ptr(self.bias),
                )
            )  # fmt: skip
        return self._handle[0]


def _ptr(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def fold_of(cols: int, group: int, most: int = MAX_FOLD) -> int:
    """Longest run of columns, a power of two from 32 to `most`, that divides the padded row and the group."""
    wide = -(-cols // BLOCK) * BLOCK
    for fold in (512, 256, 128, 64, 32):
        if fold <= most and wide % fold == 0 and (group >= cols or group % fold == 0):
            return fold
    raise ValueError(f"the CPU kernels need a group size that is a multiple of 32, got {group}")


def narrow(scale: Tensor) -> Tensor:
    """The smallest float type that holds every scale exactly."""
    scale = scale.float()
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(scale.to(dtype).float(), scale):
            return scale.to(dtype)
    return scale


def _side(values: Tensor) -> Tensor:
    """(rows, n_groups) -> (panels, n_groups, 16), rows padded with zeros."""
    rows, groups = values.shape
    padded = torch.nn.functional.pad(values, (0, 0, 0, -rows % PANEL))
    return padded.view(-1, PANEL, groups).transpose(1, 2).contiguous()


def _empty(kind: int, bits: int, rows: int, cols: int) -> Tensor:
    out = torch.empty(native.packed_bytes(kind, bits, rows, cols), dtype=torch.uint8)
    native.advise_huge(out.data_ptr(), out.numel())
    return out


def _bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().float().contiguous()


def pack_int(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    bits: int,
    bias: Tensor | None = None,
    act_group: int = 32,
) -> PackedWeight:
    """Pack integer codes (rows, cols), signed or unsigned, of 2, 3, 4 or 8 bits.

    `act_group` is the number of columns that share one int8 activation scale (0: the whole row); sums stay integer for
    as long as it and the weight's group allow.
    """
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"the CPU kernels hold 2, 3, 4 or 8 bits, got {bits}")
    rows, cols = codes.shape
    groups = scale.reshape(rows, -1).shape[1]
    group = cols if groups == 1 else -(-cols // groups)
    if -(-cols // group) != groups:
        raise ValueError(f"{groups} scales a row do not divide {cols} columns evenly")
    signed = zero_point is None or codes.dtype == torch.int8
    offset = 1 << (bits - 1) if signed else 0
    if int(codes.min()) + offset < 0 or int(codes.max()) + offset >= 1 << bits:
        raise ValueError(f"codes do not fit {bits} bits")
    zeros = None
    if zero_point is not None:
        shifted = zero_point.reshape(rows, groups).to(torch.int32) + offset
        if int(shifted.min()) < 0 or int(shifted.max()) > 255:
            raise ValueError("zero points do not fit a byte")
        zeros = _side(shifted.to(torch.uint8))
    data = (codes.to(torch.uint8) + offset).contiguous()  # bytes wrap around: -1 is 255, and 255 + 8 is 7
    if native is None:
        out = reference.pack_codes(data, bits, offset)
    else:
        out = _empty(INT, bits, rows, cols)
        native.pack_int(data.data_ptr(), bits, rows, cols, offset, out.data_ptr())
    fold = fold_of(cols, group, act_group if act_group > 0 else MAX_FOLD)
    scales = _side(narrow(scale.reshape(rows, groups)))
    return PackedWeight(INT, bits, rows, cols, group, fold, offset, out, scales, zeros, None, _bias(bias))


def pack_table(
    codes: Tensor, scale: Tensor, table: Tensor, *, bias: Tensor | None = None, act_group: int = 32
) -> PackedWeight:
    """Pack 4-bit indices (rows, cols) into `table`, (rows, 16) or (16,), with W = table[row, code] * scale.

    Entries are stored as int8 in units of the row's largest entry, which joins the scale.
    """
    rows, cols = codes.shape
    groups = scale.reshape(rows, -1).shape[1]
    group = cols if groups == 1 else -(-cols // groups)
    values = table.float().expand(rows, 16)
    top = values.abs().amax(1, keepdim=True).clamp_min(1e-30)
    entries = torch.round(values / top * 127).to(torch.int16) + 128
    rows_padded = -(-rows // PANEL) * PANEL
    bytes_ = torch.full((rows_padded, 16), 128, dtype=torch.uint8)
    bytes_[:rows] = entries.to(torch.uint8)
    data = codes.to(torch.uint8).contiguous()
    if native is None:
        out = reference.pack_table_codes(data)
    else:
        out = _empty(TABLE, 4, rows, cols)
        native.pack_table(data.data_ptr(), rows, cols, out.data_ptr())
    scales = _side((scale.reshape(rows, groups).float() * (top / 127)).contiguous())
    fold = fold_of(cols, group, act_group if act_group > 0 else MAX_FOLD)
    return PackedWeight(TABLE, 4, rows, cols, group, fold, 128, out, scales, None, bytes_.contiguous(), _bias(bias))


@cache
def _e8p_table() -> Tensor:
    """uint8: the absolute vectors in quarters, then a byte each for where their entries are 3/2, and 5/2."""
    size = (lattice.absolute_vectors() * 4).to(torch.uint8)
    return torch.cat([size.flatten(), *(_bits(size == entry) for entry in (6, 10))])


@cache
def _short_table() -> Tensor:
    """uint8: the short vectors in halves + 8, then their four bit planes, highest first."""
    value = (lattice.short_vectors() * 2 + 8).to(torch.uint8)
    return torch.cat([value.flatten(), *(_bits(value >> bit & 1) for bit in (3, 2, 1, 0))])


def _bits(plane: Tensor) -> Tensor:
    """(256, 8) of 0 and 1 -> (256,) bytes, entry i as bit i."""
    return (plane.int() << torch.arange(8)).sum(1).to(torch.uint8)


def _e8p_bytes(index: Tensor) -> Tensor:
    """E8P indices (rows, octets) -> (rows, octets, 2): absolute vector, and signs with the shift in place of one."""
    size, negative, shift = index & 255, index >> 8 & 127, index >> 15 & 1
    odd = lattice.absolute_vectors().sum(1).int()[size.long()] % 2
    last = (odd + sum(negative >> i & 1 for i in range(7))) % 2  # the sign of entry 7 makes the sum even
    return torch.stack([size, negative | (last ^ shift) << 7], -1).to(torch.uint8)


def pack_lattice(
    codes: Tensor, scale: Tensor, *, bits: int, bias: Tensor | None = None, act_group: int = 32
) -> PackedWeight:
    """Pack lattice indices (rows, cols / 8, stages), lattice.py's, of 2, 3 or 4 bits a weight."""
    rows, octets, _ = codes.shape
    cols = octets * lattice.WIDTH
    scale = scale.reshape(rows, -1).float()
    group = cols // scale.shape[1]
    fold = fold_of(cols, group, act_group if act_group > 0 else MAX_FOLD)

    def stage(n: int, index: Tensor, unit: float, rest: PackedWeight | None) -> PackedWeight:
        data = _e8p_bytes(index) if n == 2 else index[..., None].to(torch.uint8)
        table = _e8p_table() if n == 2 else _short_table()
        packed, scales = reference.pack_octets(data), _side(narrow(scale * unit))
        own_bias = None if rest is None and bits > 2 else _bias(bias)
        return PackedWeight(LATTICE, n, rows, cols, group, fold, 16, packed, scales, None, table, own_bias, rest)

    rest = None
    if bits > 2:
        last = 2 if bits == 4 else 1
        rest = stage(last, codes[..., 1], 1 / ((4 if last == 2 else 2) * lattice.RESIDUAL_SCALE[bits]), None)
    return stage(2, codes[..., 0], 0.25, rest)


def pack_bf16(weight: Tensor, *, bias: Tensor | None = None) -> PackedWeight:
    """Pack an unquantized weight (rows, cols) as bf16."""
    rows, cols = weight.shape
    data = weight.detach().to(torch.bfloat16).contiguous()
    if native is None:
        out = reference.pack_bf16_codes(data)
    else:
        out = _empty(BF16, 16, rows, cols)
        native.pack_bf16(data.data_ptr(), rows, cols, out.data_ptr())
    fold = fold_of(cols, cols, 32)
    return PackedWeight(BF16, 16, rows, cols, cols, fold, 0, out, None, None, None, _bias(bias))
