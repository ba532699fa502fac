"""compressed-tensors: what vLLM and transformers load.

pack-quantized    integer weights alone: weight_packed int32, the codes of a row as one dense little-endian
                  stream of b-bit fields (code + 2^(b-1)), padded to a word; weight_scale (out, groups) in the
                  model's dtype; weight_shape int64[2]; asymmetric: weight_zero_point packed down the rows
                  (also 4-bit weights with FP8 activations, which is how vLLM's kernel wants them)
int-quantized     integer weights with int8 activations: weight int8 (4-bit codes too), weight_scale (out, 1 or groups)
nvfp4-pack-quantized, mxfp4-pack-quantized
                  4-bit floats: weight_packed uint8 (out, in/2), low nibble first, bit 3 the sign, bits 0-2 the index
                  into 0, ½, 1, 3/2, 2, 3, 4, 6; weight_scale E4M3 (out, in/16) and weight_global_scale float32 [1]
                  that everything is divided by; or weight_scale uint8 (out, in/32), an exponent with bias 127
float-quantized   FP8 weights: weight float8_e4m3fn, weight_scale (out, 1), [1] or one per 128 x 128 block

Static activations add input_scale [1] in the model's dtype.

code 0 1 2 ...  at 4 bits:   word 0 = c0 | c1 << 4 | c2 << 8 ...   3 bits: c10 straddles words 0 and 1
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowbit.errors import InputError
from lowbit.numerics import scale_shape
from lowbit.scheme import Granularity, Scheme, TensorScheme
from lowbit.tensor import InputGrid, QuantizedTensor

_PACKED_ROWS = 256  # at once
_FP4 = ("nvfp4-pack-quantized", "mxfp4-pack-quantized")


def format_of(scheme: Scheme) -> str:
    assert scheme.weight is not None
    if scheme.weight.kind == "float":
        if scheme.weight.bits == 4:
            return "nvfp4-pack-quantized" if scheme.weight.nested else "mxfp4-pack-quantized"
        return "float-quantized"
    return "int-quantized" if scheme.activation is not None and scheme.activation.kind == "int" else "pack-quantized"


def code_bits(scheme: Scheme) -> int:
    """Bits that a code of this scheme takes in the file."""
    assert scheme.weight is not None
    return 8 if format_of(scheme) == "int-quantized" else scheme.weight.bits


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Signed codes (rows, n) int8 -> int32 (rows, ceil(n * bits / 32))."""
    return torch.cat([_pack_rows(rows, bits) for rows in codes.split(_PACKED_ROWS)])  # a byte a bit on the way


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    unsigned = codes.view(torch.uint8) + 2 ** (bits - 1)  # modulo 256
    if 8 % bits == 0:
        return _pack_bytes(unsigned, bits)
    stream = np.unpackbits(unsigned.numpy()[..., None], axis=-1, bitorder="little")
    fields = stream[..., :bits].reshape(len(unsigned), -1)
    fields = np.pad(fields, ((0, 0), (0, -fields.shape[1] % 32)))
    return torch.from_numpy(np.packbits(fields, axis=1, bitorder="little").view("<i4").copy())


def _pack_bytes(unsigned: Tensor, bits: int) -> Tensor:
    """The same where a byte holds whole codes: one shift for each of them."""
    whole = nn.functional.pad(unsigned, (0, -unsigned.shape[1] % (32 // bits)))
    fields = whole.reshape(len(whole), -1, 8 // bits)
    packed = fields[..., 0].clone()
    for i in range(1, 8 // bits):
        packed |= fields[..., i] << (i * bits)
    return packed.view(torch.int32)


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of pack_bits: int32 (rows, words) -> signed codes (rows, n) int8."""
    if 8 % bits == 0:  # whole codes in every byte
        data = packed.contiguous().view(torch.uint8)
        codes = torch.empty(*data.shape, 8 // bits, dtype=torch.uint8)
        for i in range(8 // bits):
            codes[..., i] = (data >> (bits * i)) & (2**bits - 1)
        codes -= 2 ** (bits - 1)
        return codes.view(torch.int8).flatten(1)[:, :n].contiguous()
    stream = np.unpackbits(packed.contiguous().numpy().view(np.uint8), axis=1, bitorder="little")
    fields = stream[:, : n * bits].reshape(len(stream), n, bits)
    unsigned = np.packbits(fields, axis=-1, bitorder="little")[..., 0]
    signed: Tensor = torch.from_numpy(unsigned).to(torch.int16) - 2 ** (bits - 1)
    return signed.to(torch.int8)


def pack_fp4(codes: Tensor) -> Tensor:
    """Codes 0 to 14 of the ascending table (numerics.fixed_table), (rows, n) -> uint8 (rows, n / 2)."""
    level = codes.to(torch.int16) - 7
    nibble = torch.where(level < 0, 8 - level, level).to(torch.uint8)
    return nibble[:, 0::2] | nibble[:, 1::2] << 4


def unpack_fp4(packed: Tensor) -> Tensor:
    """The inverse of pack_fp4; minus zero becomes zero."""
    nibble = torch.stack([packed & 15, packed >> 4], -1).flatten(1).to(torch.int8)
    magnitude = nibble & 7
    return torch.where(nibble >= 8, -magnitude, magnitude) + 7


def pack(name: str, quantized: QuantizedTensor, scheme: Scheme, input_scale: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors of linear `name` as they go into the safetensors file."""
    scale = quantized.scale
    if quantized.scheme.granularity == "tensor":
        scale = scale.reshape(1)
    tensors = {f"{name}.weight_scale": scale}
    if input_scale is not None:
        tensors[f"{name}.input_scale"] = input_scale.reshape(1).clone()  # linears of one input share it
    if format_of(scheme) in _FP4:
        tensors[f"{name}.weight_packed"] = pack_fp4(quantized.codes)
        if quantized.tensor_scale is None:
            tensors[f"{name}.weight_scale"] = scale.view(torch.uint8)
        else:
            tensors[f"{name}.weight_global_scale"] = quantized.tensor_scale.reshape(1).clone()
        return tensors
    if format_of(scheme) != "pack-quantized":
        tensors[f"{name}.weight"] = quantized.codes
        return tensors
    bits = quantized.scheme.bits
    tensors[f"{name}.weight_packed"] = pack_bits(quantized.codes, bits)
    tensors[f"{name}.weight_shape"] = torch.tensor(quantized.codes.shape, dtype=torch.int64)
    if quantized.zero_point is not None:
        zero = quantized.zero_point
        packs = quantized.scheme.granularity != "tensor"
        tensors[f"{name}.weight_zero_point"] = (
            pack_bits(zero.T.contiguous(), bits).T.contiguous() if packs else zero.reshape(1)
        )
    return tensors


def unpack(name: str, get: Callable[[str], Tensor], scheme: Scheme) -> QuantizedTensor:
    """Read linear `name` back through `get(tensor name)`. Raises InputError if shapes and scheme disagree."""
    weight = scheme.weight
    assert weight is not None
    scale = get(f"{name}.weight_scale")
    zero = tensor_scale = None
    if format_of(scheme) in _FP4:
        codes = unpack_fp4(get(f"{name}.weight_packed"))
        if weight.nested:
            tensor_scale = get(f"{name}.weight_global_scale").reshape(())
        else:
            scale = scale.view(torch.float8_e8m0fnu)
    elif format_of(scheme) != "pack-quantized":
        codes = get(f"{name}.weight")
    else:
        shape = get(f"{name}.weight_shape").tolist()
        packed = get(f"{name}.weight_packed")
        expected = [shape[0], -(-shape[1] * weight.bits // 32)] if len(shape) == 2 else None
        if list(packed.shape) != expected or packed.dtype != torch.int32:
            raise InputError(
                f"{name}.weight_packed is {packed.dtype} {list(packed.shape)}, but {weight.bits}-bit codes of shape "
                f"{shape} need int32 {expected}. (compressed-tensors up to 0.12 packed 3, 5, 6 and 7 bits otherwise; "
                "such files must be converted with that version.)"
            )
        codes = unpack_bits(packed, weight.bits, shape[1])
    out_in = (codes.shape[0], codes.shape[1])
    where = scale_shape(weight, out_in)
    if scale.numel() != where[0] * where[1]:
        raise InputError(f"{name}.weight_scale has {scale.numel()} entries, {scheme} of {list(out_in)} needs {where}.")
    if not weight.symmetric:
        zero = get(f"{name}.weight_zero_point")
        if weight.granularity == "tensor":
            zero = zero.reshape(1, 1)
        else:
            zero = unpack_bits(zero.T.contiguous(), weight.bits, where[0]).T.contiguous()
    return QuantizedTensor(codes, scale.reshape(where), zero, weight, tensor_scale=tensor_scale)


def unpack_input(name: str, get: Callable[[str], Tensor], scheme: Scheme) -> InputGrid | None:
    """How the input of linear `name` is rounded, or None. Raises InputError for a stored scale that is no scale."""
    if scheme.activation is None or not scheme.static:
        return None if scheme.activation is None else InputGrid(scheme.activation)
    scale = get(f"{name}.input_scale")
    if scale.numel() != 1 or not bool(torch.isfinite(scale).all()) or not bool((scale > 0).all()):
        raise InputError(f"{name}.input_scale is {scale.tolist()}: expected one positive number.")
    return InputGrid(scheme.activation, scale.reshape(1))


def quantization_config(schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """config.json's `quantization_config` for linears (by full name) and their schemes; `none` means ignored."""
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        if scheme.weight is not None:
            groups.setdefault(scheme, []).append(name)
    formats = {format_of(s) for s in groups}
    plain = len(groups) == 1 and all(re.search(r"\.\d+\.", n) for n in next(iter(groups.values())))  # only in blocks
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": ["Linear"] if plain else names,
                "weights": _weight_args(scheme.weight),
                "input_activations": _activation_args(scheme.activation),
                "output_activations": None,
                "format": format_of(scheme),
            }
            for i, (scheme, names) in enumerate(groups.items())
        },
        "ignore": [name for name, scheme in schemes.items() if scheme.weight is None],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _weight_args(scheme: TensorScheme | None) -> dict[str, Any]:
    assert scheme is not None
    return {
        "num_bits": scheme.bits,
        "type": scheme.kind,
        "symmetric": scheme.symmetric,
        "strategy": "tensor_group" if scheme.nested else scheme.granularity,
        "group_size": scheme.group_size if scheme.granularity == "group" else None,
        "block_structure": [scheme.group_size] * 2 if scheme.granularity == "block" else None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
        **({"scale_dtype": _SCALE_DTYPES[scheme.group_size]} if scheme.kind == "float" and scheme.bits == 4 else {}),
    }


_SCALE_DTYPES = {16: "torch.float8_e4m3fn", 32: "torch.uint8"}


def _activation_args(scheme: TensorScheme | None) -> dict[str, Any] | None:
    if scheme is None:
        return None
    return {
        "num_bits": scheme.bits,
        "type": scheme.kind,
        "symmetric": True,
        "strategy": scheme.granularity,
        "group_size": None,
        "block_structure": None,
        "dynamic": scheme.granularity == "token",
        "actorder": None,
        "observer": None if scheme.granularity == "token" else "minmax",
        "observer_kwargs": {},
    }


def read_schemes(
    config: Mapping[str, Any], linears: Collection[str], embeddings: Collection[str] = ()
) -> dict[str, Scheme]:
    """The scheme of each linear and embedding (by full name) that `quantization_config` quantizes.

    Raises InputError for what lowbit cannot read yet, naming it.
    """
    if config.get("quant_method") != "compressed-tensors":
        raise InputError(
            f"this model is already quantized by {config.get('quant_method')!r}; lowbit reads compressed-tensors."
        )
    groups = [(g["targets"], _scheme(g)) for g in config.get("config_groups", {}).values()]
    ignore = config.get("ignore") or []
    result = {}
    for name in (*linears, *embeddings):
        kind = "Linear" if name in linears else "Embedding"
        if any(_targets(pattern, name) for pattern in ignore):
            continue
        for targets, scheme in groups:
            if kind in targets or any(_targets(t, name) for t in targets):
                result[name] = scheme
    return result


def _targets(pattern: str, name: str) -> bool:
    return bool(re.match(pattern[3:], name)) if pattern.startswith("re:") else pattern == name


def _scheme(group: Mapping[str, Any]) -> Scheme:
    w, a = group["weights"], group.get("input_activations")
    size = w.get("group_size") or (w.get("block_structure") or [0])[0]
    granularity: Any = "group" if w["strategy"] == "tensor_group" else w["strategy"]
    weight = TensorScheme(w["type"], w["num_bits"], granularity, size, w["symmetric"])
    fp4 = (weight.kind, weight.bits) == ("float", 4)
    known_fp4 = {"tensor_group": 16, "group": 32}.get(w["strategy"]) == size
    if weight.granularity not in ("tensor", "channel", "group", "block") or (fp4 and not known_fp4):
        raise InputError(f"cannot read {weight.bits}-bit {weight.kind} weights with strategy {weight.granularity!r}.")
    if a is None:
        return Scheme(weight)
    kinds: dict[tuple[Any, Any], Granularity] = {("token", True): "token", ("tensor", False): "tensor"}
    kind = kinds.get((a.get("strategy"), a.get("dynamic")))
    if kind is None or not a.get("symmetric", True):
        raise InputError(f"cannot read activations with strategy {a.get('strategy')!r}, dynamic={a.get('dynamic')}.")
    return Scheme(weight, TensorScheme(a["type"], a["num_bits"], kind))
