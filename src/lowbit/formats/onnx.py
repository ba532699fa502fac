"""A linear as ONNX Runtime multiplies it: the same codes and scales, in one of two products.

MatMulNBits (domain com.microsoft), for every integer grid with float activations, and for 4-bit ones with int8 ones:

    codes   uint8 (out, blocks, block b / 8)       code + 2^(b-1), b = 2, 4 or 8 bits, lowest bits first
    scales  float32 (out, blocks)                  one for 16, 32, 64, 128 or 256 inputs; a larger group repeats its own
    zeros   uint8 (out, ceil(blocks b / 8))        zero point + 2^(b-1), packed likewise; absent: 2^(b-1)

A row that is not whole blocks is padded. `accuracy_level=4` rounds the input to int8, one scale a block, as it comes.

MatMulInteger, for w8a8: codes + 128 (in, out), uint8, times the input rounded likewise (one scale a token, or the
stored one), both with the zero point 128; the product, in int32, is multiplied by both scales. Signed codes would mean
the same, but ONNX Runtime has fast kernels for unsigned inputs only (20 times as fast), and on AVX2 those for signed
weights saturate.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit.scheme import Scheme, TensorScheme
from lowbit.tensor import QuantizedTensor

MODEL, DATA = "model.onnx", "model.onnx.data"  # an ONNX directory: the graph, and its weights beside it
CACHE = "past_key_values"  # how the inputs with keys and values begin
BLOCKS = (256, 128, 64, 32, 16)
_ROW_BLOCK = 128  # where one scale is for a whole row


def supports(scheme: Scheme) -> str | None:
    """None if one of the products computes this scheme, else the reason why not."""
    weight, activation = scheme.weight, scheme.activation
    if weight is None:
        return None
    if weight.kind != "int":
        return "ONNX Runtime multiplies by integer codes on evenly spaced grids only"
    if activation is not None and (activation.kind != "int" or (scheme.static and weight.bits != 8)):
        return "ONNX Runtime rounds activations to int8, and by a stored scale only with 8-bit weights"
    if weight.granularity == "group" and not _dividing(weight.group_size):
        return f"ONNX Runtime's blocks are of 16 to 256 inputs, none of which divides {weight.group_size}"
    return None


def is_integer_product(scheme: Scheme) -> bool:
    """Whether codes meet codes (MatMulInteger); else codes meet floats (MatMulNBits)."""
    return scheme.activation is not None and scheme.weight is not None and scheme.weight.bits == 8


UNSIGNED = 128  # what a uint8 of MatMulInteger is above its code


def unsigned(codes: Tensor) -> Tensor:
    """int8 codes as MatMulInteger's uint8."""
    return (codes.to(torch.int16) + UNSIGNED).to(torch.uint8)


def _dividing(group: int) -> int | None:
    return next((b for b in BLOCKS if group % b == 0), None)


def block_size(scheme: TensorScheme, width: int) -> int:
    """Inputs a scale is stored for, in a weight of `width` inputs."""
    if scheme.granularity == "group":
        block = _dividing(scheme.group_size)
        assert block is not None, scheme
        return block
    return next((b for b in reversed(BLOCKS) if b >= width and b <= _ROW_BLOCK), _ROW_BLOCK)


@dataclass(frozen=True)
class NBits:
    """The operands of MatMulNBits."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    block: int

    def dequantize(self, width: int) -> Tensor:
        """(out, width) float32: what the product means."""
        rows, blocks = self.scales.shape
        codes = _unpack(self.codes.reshape(rows, -1), self.bits)[:, : blocks * self.block]
        zeros: Tensor | int = 2 ** (self.bits - 1)
        if self.zeros is not None:
            zeros = _unpack(self.zeros, self.bits)[:, :blocks, None].float()
        values = (codes.reshape(rows, blocks, self.block).float() - zeros) * self.scales[..., None]
        return values.reshape(rows, -1)[:, :width]


def pack(quantized: QuantizedTensor) -> NBits:
    """A weight (out, in) of a scheme that `supports` lets through."""
    scheme = quantized.scheme
    rows, width = quantized.shape
    bits = next(b for b in (2, 4, 8) if b >= scheme.bits)
    block = block_size(scheme, width)
    blocks = -(-width // block)
    codes = F.pad(quantized.codes, (0, blocks * block - width))

    def spread(x: Tensor) -> Tensor:  # (out/r, in/c) -> (out, blocks)
        x = x.repeat_interleave(rows // x.shape[0], 0)
        return x.repeat_interleave(blocks // x.shape[1], 1).contiguous()

    zeros = None if quantized.zero_point is None else _pack(spread(quantized.zero_point), bits)
    return NBits(_pack(codes, bits).reshape(rows, blocks, -1), spread(quantized.step), zeros, bits, block)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Signed codes (rows, n) int8 -> uint8 (rows, ceil(n bits / 8)), 2^(bits-1) added, lowest bits first."""
    unsigned = codes.to(torch.int16) + 2 ** (bits - 1)
    unsigned = F.pad(unsigned, (0, -codes.shape[1] % (8 // bits))).reshape(len(codes), -1, 8 // bits)
    packed: Tensor = (unsigned << (bits * torch.arange(8 // bits, dtype=torch.int16))).sum(-1).to(torch.uint8)
    return packed


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """uint8 (rows, n) -> codes (rows, n 8 / bits), as stored."""
    parts = packed.to(torch.int16)[..., None] >> (bits * torch.arange(8 // bits, dtype=torch.int16))
    codes: Tensor = (parts & (2**bits - 1)).reshape(len(packed), -1)
    return codes
