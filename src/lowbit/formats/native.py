"""lowbit's own layout, for what no other format can say: mid-rise grids, tables, lattice codes, rotated weights.

config.json holds `"quantization_config": {"quant_method": "lowbit", ...}` with the layers of every scheme. A layer has

    weight_packed     scalar codes: int32 (out, words), as in compressed-tensors' pack-quantized, code - 2^(bits-1)
                      lattice: int16 (out, in/8), the 16-bit index of a point of E8P (lattice.py)
    weight_residual   lattice of 3 bits: uint8 (out, in/8); of 4 bits: int16 (out, in/8)
    weight_scale      (out, groups) in the model's dtype; lattice: (out, 1)
    weight_table      learned: (out, 2^bits) bfloat16, ascending
    weight_shape      int64[2]

A layer of any other scheme is stored as compressed-tensors has it. Beside either, a layer named under "rotated" has

    weight_in_signs, weight_out_signs   uint8, eight signs a byte, lowest bit first, 1 is minus
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.formats import compressed_tensors
from lowbit.formats.compressed_tensors import pack_bits, unpack_bits
from lowbit.hadamard import Rotation
from lowbit.lattice import STAGE_BITS, WIDTH
from lowbit.numerics import scale_shape
from lowbit.scheme import Scheme
from lowbit.tensor import QuantizedTensor

QUANT_METHOD = "lowbit"
OWN_KINDS = ("midrise", "nf", "learned", "e8p")
_STAGE_TYPES = {16: torch.int16, 8: torch.uint8}


def pack(name: str, quantized: QuantizedTensor, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of linear `name` as they go into the safetensors file."""
    grid, rotation = quantized.scheme, quantized.rotation
    if grid.kind in OWN_KINDS:
        tensors = {
            f"{name}.weight_scale": quantized.scale,
            f"{name}.weight_shape": torch.tensor(quantized.shape, dtype=torch.int64),
        }
        if grid.kind == "e8p":
            for part, code, bits in zip(_PARTS, quantized.codes.unbind(-1), STAGE_BITS[grid.bits], strict=False):
                tensors[f"{name}.{part}"] = code.to(_STAGE_TYPES[bits]).contiguous()
        else:
            tensors[f"{name}.weight_packed"] = pack_bits(quantized.codes - 2 ** (grid.bits - 1), grid.bits)
        if quantized.table is not None:
            tensors[f"{name}.weight_table"] = quantized.table
    else:
        tensors = compressed_tensors.pack(name, replace(quantized, rotation=None), scheme)
    if rotation is not None:
        tensors[f"{name}.weight_in_signs"] = _bits(rotation.in_signs)
        tensors[f"{name}.weight_out_signs"] = _bits(rotation.out_signs)
    return tensors


_PARTS = ("weight_packed", "weight_residual")


def unpack(name: str, get: Callable[[str], Tensor], scheme: Scheme) -> QuantizedTensor:
    """Read linear `name` back through `get(tensor name)`. Raises InputError if shapes and scheme disagree."""
    grid = scheme.weight
    assert grid is not None
    if grid.kind not in OWN_KINDS:
        quantized = compressed_tensors.unpack(name, get, scheme)
    else:
        rows, columns = get(f"{name}.weight_shape").tolist()
        scale = get(f"{name}.weight_scale")
        expected = scale_shape(grid, (rows, columns))
        if tuple(scale.shape) != expected:
            raise InputError(
                f"{name}.weight_scale is {list(scale.shape)}, {scheme} of {[rows, columns]} needs {expected}."
            )
        if grid.kind == "e8p":
            codes = torch.stack(
                [
                    _whole(f"{name}.{part}", get(f"{name}.{part}"), (rows, columns // WIDTH)).int() & (2**bits - 1)
                    for part, bits in zip(_PARTS, STAGE_BITS[grid.bits], strict=False)
                ],
                -1,
            )
        else:
            packed = _whole(
                f"{name}.weight_packed", get(f"{name}.weight_packed"), (rows, -(-columns * grid.bits // 32))
            )
            codes = unpack_bits(packed, grid.bits, columns) + 2 ** (grid.bits - 1)
        table = None
        if grid.kind == "learned":
            table = _whole(f"{name}.weight_table", get(f"{name}.weight_table"), (rows, 2**grid.bits))
        quantized = QuantizedTensor(codes, scale, None, grid, table)
    try:
        packed_signs = get(f"{name}.weight_in_signs")
    except KeyError:
        return quantized
    rows, columns = quantized.shape
    in_signs = _signs(f"{name}.weight_in_signs", packed_signs, columns)
    out_signs = _signs(f"{name}.weight_out_signs", get(f"{name}.weight_out_signs"), rows)
    return replace(quantized, rotation=Rotation(in_signs, out_signs))


def _whole(name: str, tensor: Tensor, shape: tuple[int, int]) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise InputError(f"{name} is {list(tensor.shape)}, expected {list(shape)}: the file and config.json disagree.")
    return tensor


def _bits(signs: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits((signs < 0).numpy(), bitorder="little"))


def _signs(name: str, packed: Tensor, count: int) -> Tensor:
    if packed.numel() != -(-count // 8):
        raise InputError(f"{name} has {packed.numel()} bytes, {count} signs need {-(-count // 8)}.")
    negative = np.unpackbits(packed.numpy(), count=count, bitorder="little").astype(np.int8)
    return torch.from_numpy(1 - 2 * negative)


def stored_shapes(
    scheme: Scheme, shape: tuple[int, int], scale_dtype: torch.dtype, *, rotated: bool
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of every tensor of a linear (out, in), by its last name. Raises InputError for schemes that
    compressed-tensors stores in another way than packed integers."""
    grid = scheme.weight
    assert grid is not None
    rows, columns = shape
    words = -(-columns * grid.bits // 32)
    parts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "weight_scale": (scale_shape(grid, shape), scale_dtype),
        "weight_shape": ((2,), torch.int64),
        "weight_packed": ((rows, words), torch.int32),
    }
    if grid.kind == "e8p":
        for part, bits in zip(_PARTS, STAGE_BITS[grid.bits], strict=False):
            parts[part] = ((rows, columns // WIDTH), _STAGE_TYPES[bits])
    elif grid.kind == "learned":
        parts["weight_table"] = ((rows, 2**grid.bits), torch.bfloat16)
    elif grid.kind == "int" and scheme.activation is None and grid.granularity != "tensor":
        if not grid.symmetric:
            groups = scale_shape(grid, shape)[1]
            parts["weight_zero_point"] = ((-(-rows * grid.bits // 32), groups), torch.int32)
    elif grid.kind not in ("nf", "midrise"):
        raise InputError(f"transformers cannot load scheme {scheme} from lowbit's own layout; lowbit.load can.")
    if rotated:
        parts["weight_in_signs"] = ((-(-columns // 8),), torch.uint8)
        parts["weight_out_signs"] = ((-(-rows // 8),), torch.uint8)
    return parts


def quantization_config(schemes: Mapping[str, Scheme], rotated: Iterable[str] = ()) -> dict[str, Any]:
    """config.json's `quantization_config` for linears (by full name), their schemes and which of them are rotated."""
    layers: dict[str, list[str]] = {}
    for name, scheme in schemes.items():
        if scheme.weight is not None:
            layers.setdefault(str(scheme), []).append(name)
    return {"quant_method": QUANT_METHOD, "format_version": 1, "layers": layers, "rotated": sorted(rotated)}


def read_schemes(
    config: Mapping[str, Any], linears: Collection[str], embeddings: Collection[str] = ()
) -> dict[str, Scheme]:
    """The scheme of each linear and embedding (by full name).

    Raises InputError for a version or a scheme it does not know.
    """
    if config.get("format_version") != 1:
        raise InputError(
            f"this model is in version {config.get('format_version')!r} of lowbit's own layout, and this lowbit reads "
            "version 1: use the lowbit that wrote it, or a newer one."
        )
    wanted = {*linears, *embeddings}
    return {n: Scheme.parse(text) for text, names in config["layers"].items() for n in names if n in wanted}
