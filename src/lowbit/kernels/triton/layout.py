"""Low-bit weights in the order in which a GPU reads them.

A product of few rows is bound by memory: the weight is read once, so all that counts is that it is read in whole
128-byte lines, 16 bytes a thread, and that turning codes into floats costs few instructions. Two choices give both.

*Tiles.* 16 rows x 32 words of 32 bits (2 KB) are contiguous, and tiles of one panel of 16 rows follow each other along
the columns. A thread loads 4 neighbouring words; a warp loads 512 contiguous bytes; no line is read twice.

*Slices.* Word j of a tile's row does not hold neighbouring columns but every 32nd: its code number i is column
i * 32 + j of the tile. Shifting the whole tile of words by i * bits therefore gives 32 *neighbouring* columns, slice i,
which multiply a contiguous piece of x. Nothing is shuffled between threads, and since groups are multiples of 32
columns, a slice has one scale a row.

    bits  words of a tile's row             columns of a tile
    8     4 codes each                      128
    4     8 codes each                      256
    2     16 codes each                     512
    3     16 low pairs, and 16 high bits    512     (the high bits in a second tensor of 16-bit words)

Scales and zero points lie as (group, row): the rows of a tile take theirs from neighbouring addresses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.kernels.pack import narrow

PANEL, WORDS = 16, 32
BITS = (2, 3, 4, 8)


def low_bits(bits: int) -> int:
    """Bits of a code that are in the 32-bit words; 3-bit codes keep their highest bit elsewhere."""
    return 2 if bits == 3 else bits


def slices(bits: int) -> int:
    """Codes in a word, which is slices in a tile."""
    return 32 // low_bits(bits)


@dataclass(frozen=True)
class TiledWeight:
    """One matrix (rows, cols): W = (code - zero) * scale, or table[row, code] * scale."""

    bits: int
    rows: int
    cols: int
    group: int  # columns per scale; cols when a row has one scale
    words: Tensor  # int32 (panels, tiles, 16, 32)
    high: Tensor | None  # int16 (panels, tiles, 16, 32), of 3-bit codes
    scales: Tensor  # (n_groups, panels * 16), the narrowest float type that holds them exactly
    zeros: Tensor | None  # uint8 (n_groups, panels * 16); None: every zero is 2^(bits - 1)
    table: Tensor | None = None  # (panels * 16, 16)
    bias: Tensor | None = None  # float32 (rows,)

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return sum(t.numel() * t.element_size() for t in self.tensors() if t is not None)

    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """words, high, scales, zeros, table, bias."""
        return self.words, self.high, self.scales, self.zeros, self.table, self.bias

    def to(self, device: torch.device | str) -> TiledWeight:
        """The same weight on another device."""
        moved = [None if t is None else t.to(device) for t in self.tensors()]
        return TiledWeight(self.bits, self.rows, self.cols, self.group, *moved)  # type: ignore[arg-type]


def pack_words(codes: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """Unsigned codes (rows, cols) -> int32 words and, of 3-bit codes, int16 high bits, both (panels, tiles, 16, 32)."""
    count, low = slices(bits), low_bits(bits)
    rows, cols = codes.shape
    width = count * WORDS
    x = torch.nn.functional.pad(codes.to(torch.uint8), (0, -cols % width, 0, -rows % PANEL))
    x = x.view(-1, PANEL, x.shape[1] // width, count, WORDS).permute(3, 0, 2, 1, 4)  # slice, panel, tile, row, word
    words = torch.zeros(x.shape[1:], dtype=torch.int32, device=codes.device)
    for i in range(count):
        words |= (x[i].to(torch.int32) & (1 << low) - 1) << i * low
    if bits != 3:
        return words, None
    high = torch.zeros(x.shape[1:], dtype=torch.int16, device=codes.device)
    for i in range(count):
        high |= (x[i].to(torch.int16) >> 2) << i
    return words, high


def unpack_words(words: Tensor, high: Tensor | None, bits: int, rows: int, cols: int) -> Tensor:
    """The inverse of `pack_words`: uint8 codes (rows, cols)."""
    count, low = slices(bits), low_bits(bits)
    shift = torch.arange(count, device=words.device).view(count, 1, 1)
    x = words[:, :, None] >> shift * low & (1 << low) - 1
    if high is not None:
        x = x | (high[:, :, None].to(torch.int32) >> shift & 1) << 2
    x = x.permute(0, 3, 1, 2, 4).reshape(len(words) * PANEL, -1)
    return x[:rows, :cols].to(torch.uint8).contiguous()


def _by_group(values: Tensor) -> Tensor:
    """(rows, n_groups) -> (n_groups, panels * 16), rows padded with zeros."""
    return torch.nn.functional.pad(values, (0, 0, 0, -len(values) % PANEL)).T.contiguous()


def _group_of(scale: Tensor, cols: int) -> int:
    groups = scale.shape[1]
    group = cols if groups == 1 else -(-cols // groups)
    if -(-cols // group) != groups or (groups > 1 and group % WORDS):
        raise ValueError(
            f"the GPU kernels need groups of a multiple of 32 columns; got {groups} scales for {cols} columns. "
            "Quantize with -g32, -g64, -g128 or -channel."
        )
    return group


def pack_int(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, bits: int, bias: Tensor | None = None
) -> TiledWeight:
    """Pack integer codes (rows, cols) of 2, 3, 4 or 8 bits, with scale and zero_point (rows, n_groups).

    Codes and zero points are signed (int8), or unsigned (uint8) where there is a zero point.
    """
    if bits not in BITS:
        raise ValueError(f"the GPU kernels hold 2, 3, 4 or 8 bits, got {bits}")
    rows, cols = codes.shape
    scale = scale.reshape(rows, -1)
    group = _group_of(scale, cols)
    offset = 1 << (bits - 1) if zero_point is None or codes.dtype == torch.int8 else 0
    unsigned = codes.to(torch.int16) + offset
    if int(unsigned.min()) < 0 or int(unsigned.max()) >= 1 << bits:
        raise ValueError(f"codes do not fit {bits} bits")
    zeros = None
    if zero_point is not None:
        shifted = zero_point.reshape(rows, -1).to(torch.int32) + offset
        if int(shifted.min()) < 0 or int(shifted.max()) > 255:
            raise ValueError("zero points do not fit a byte")
        zeros = _by_group(shifted.to(torch.uint8))
    words, high = pack_words(unsigned, bits)
    return TiledWeight(bits, rows, cols, group, words, high, _by_group(narrow(scale)), zeros, None, _bias(bias))


def pack_table(codes: Tensor, scale: Tensor, table: Tensor, *, bias: Tensor | None = None) -> TiledWeight:
    """Pack 4-bit indices (rows, cols) into a table (rows, 16) or (16,), with scale (rows, n_groups)."""
    rows, cols = codes.shape
    scale = scale.reshape(rows, -1)
    group = _group_of(scale, cols)
    if int(codes.min()) < 0 or int(codes.max()) > 15:
        raise ValueError("table indices do not fit 4 bits")
    words, _ = pack_words(codes, 4)
    entries = torch.nn.functional.pad(table.expand(rows, 16), (0, 0, 0, -rows % PANEL))
    return TiledWeight(
        4, rows, cols, group, words, None, _by_group(narrow(scale)), None, narrow(entries).contiguous(), _bias(bias)
    )


def _bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().float().contiguous()
