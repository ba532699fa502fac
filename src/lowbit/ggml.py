"""ggml's block types: grids with scales in two levels, as llama.cpp stores and computes them.

A row is cut into blocks (32 or 256 weights) and a block into groups (32 or 16). With a block's half-precision d and
dmin and a group's small integers s and m, a code q means

    w = (d s) q - dmin m

Symmetric types have no dmin and m. The single-level types (Q4_0, Q8_0, ...) are the case of one group a block with
s = 1; Q4_1 and Q5_1 store the offset itself, here dmin = -offset and m = 1. So one value function, one search and one
GPTQ serve all of them. Facts: ggml-common.h of llama.cpp, "super-block quantization structures".
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import InputError, nearest


@dataclass(frozen=True)
class BlockType:
    """One ggml type. Ranges are inclusive; `q` is the code's range with the type's constant offset taken off."""

    name: str
    id: int
    block: int  # weights that share d and dmin
    nbytes: int  # bytes a block
    group: int  # weights that share s and m
    q: tuple[int, int]
    s: tuple[int, int] = (1, 1)
    m: tuple[int, int] | None = None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.block


@dataclass(frozen=True)
class FloatType:
    """A ggml type that holds plain floats."""

    name: str
    id: int
    dtype: torch.dtype

    @property
    def bits_per_weight(self) -> float:
        return 8.0 * self.dtype.itemsize


GgmlType = BlockType | FloatType

F32 = FloatType("f32", 0, torch.float32)
F16 = FloatType("f16", 1, torch.float16)
BF16 = FloatType("bf16", 30, torch.bfloat16)
Q8_0 = BlockType("q8_0", 8, 32, 34, 32, (-128, 127))
Q4_0 = BlockType("q4_0", 2, 32, 18, 32, (-8, 7))
Q4_1 = BlockType("q4_1", 3, 32, 20, 32, (0, 15), m=(1, 1))
Q5_0 = BlockType("q5_0", 6, 32, 22, 32, (-16, 15))
Q5_1 = BlockType("q5_1", 7, 32, 24, 32, (0, 31), m=(1, 1))
Q2_K = BlockType("q2_k", 10, 256, 84, 16, (0, 3), (0, 15), (0, 15))
Q3_K = BlockType("q3_k", 11, 256, 110, 16, (-4, 3), (-32, 31))
Q4_K = BlockType("q4_k", 12, 256, 144, 32, (0, 15), (0, 63), (0, 63))
Q5_K = BlockType("q5_k", 13, 256, 176, 32, (0, 31), (0, 63), (0, 63))
Q6_K = BlockType("q6_k", 14, 256, 210, 16, (-32, 31), (-128, 127))

TYPES: dict[str, GgmlType] = {
    t.name: t for t in (F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K)
}
BY_ID: dict[int, GgmlType] = {t.id: t for t in TYPES.values()}


def find_type(name: str) -> GgmlType:
    """The type of that name. Raises InputError with the nearest known names."""
    if name.lower() not in TYPES:
        raise InputError(f"unknown GGUF type {name!r}. {nearest(name.lower(), TYPES)}")
    return TYPES[name.lower()]


@dataclass(frozen=True)
class BlockTensor:
    """A weight (out, in) in a block type; `dequantize()` defines what it means.

    codes  (out, in) int16               in type.q
    d      (out, in/block) float16       scale of the scales
    s      (out, in/group) int16         in type.s
    dmin   (out, in/block) float16, and  m (out, in/group) int16 in type.m; both None for a symmetric type
    """

    type: BlockType
    codes: Tensor
    d: Tensor
    s: Tensor
    dmin: Tensor | None = None
    m: Tensor | None = None

    def steps(self) -> tuple[Tensor, Tensor | None]:
        """(scale, offset) of every group, (out, in/group) float32: w = scale * code - offset."""
        per_block = self.type.block // self.type.group
        scale = self.d.float().repeat_interleave(per_block, 1) * self.s
        if self.dmin is None or self.m is None:
            return scale, None
        return scale, self.dmin.float().repeat_interleave(per_block, 1) * self.m

    def dequantize(self) -> Tensor:
        """(out, in) float32, every operation in float32 and in llama.cpp's order."""
        scale, offset = self.steps()
        values = self.codes.float() * scale.repeat_interleave(self.type.group, 1)
        return values if offset is None else values - offset.repeat_interleave(self.type.group, 1)

    def rows(self, index: Tensor) -> "BlockTensor":
        """The rows named by index, in its order."""
        return BlockTensor(self.type, *(None if x is None else x[index] for x in self._fields()))  # type: ignore[arg-type]

    def _fields(self) -> tuple[Tensor | None, ...]:
        return self.codes, self.d, self.s, self.dmin, self.m
