"""GPTQ checkpoints: what AutoGPTQ and GPTQModel write and most engines read.

    qweight  int32 (in b / 32, out)      codes + 2^(b-1), a dense little-endian bit stream down each output's inputs
    qzeros   int32 (groups, out b / 32)  zero points + 2^(b-1), the stream runs over the outputs
    scales   float16 (groups, out)
    g_idx    int32 (in,)                 each input's group

Version 1 ("gptq") stores each zero point minus one, in b bits: a symmetric 4-bit file is full of 0x77777777. A zero
point of 0 wraps to 2^b - 1 there, and readers disagree about it (GPTQModel refuses asymmetric version 1), so files with
zero points are written as version 2 ("gptq_v2"), which stores them as they are. Files with activation order and running
groups (a g_idx that is not i // size) are read by giving every column its own scale.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.formats.compressed_tensors import pack_bits, unpack_bits
from lowbit.numerics import half_scale
from lowbit.scheme import Scheme, TensorScheme
from lowbit.tensor import QuantizedTensor

BITS = (2, 3, 4, 8)
Get = Callable[[str], Tensor]


def supports(scheme: Scheme) -> str | None:
    """None if the format holds this scheme, else the reason why not."""
    weight = scheme.weight
    if weight is None:
        return None
    if weight.kind != "int" or weight.bits not in BITS:
        return f"GPTQ files hold integers of {', '.join(map(str, BITS))} bits"
    if scheme.activation is not None:
        return "GPTQ files do not describe quantized activations"
    return None if weight.granularity in ("group", "channel") else f"GPTQ files have no scale per {weight.granularity}"


def pack(name: str, quantized: QuantizedTensor, version: int = 1) -> dict[str, Tensor]:
    """The tensors of linear `name`. Raises InputError for a shape that does not fill whole words."""
    bits = quantized.scheme.bits
    out, width = quantized.codes.shape
    if out * bits % 32 or width * bits % 32:
        raise InputError(f"{name}: {bits}-bit codes of {out} x {width} do not fill whole 32-bit words; leave it alone.")
    groups = quantized.scale.shape[1]
    zero = quantized.zero_point
    if zero is None:
        zero = torch.zeros(out, groups, dtype=torch.int8)
    if version == 1:
        zero = _wrap(zero.to(torch.int16) - 1, bits)
    return {
        f"{name}.qweight": pack_bits(quantized.codes, bits).T.contiguous(),
        f"{name}.qzeros": pack_bits(zero.T.contiguous(), bits),
        f"{name}.scales": half_scale(name, quantized.scale).T.contiguous(),
        f"{name}.g_idx": (torch.arange(width) // (width // groups)).to(torch.int32),
    }


def _wrap(codes: Tensor, bits: int) -> Tensor:
    """int16 -> int8 in [-2^(b-1), 2^(b-1) - 1], modulo 2^b."""
    middle = 2 ** (bits - 1)
    wrapped: Tensor = (codes + middle) % (2 * middle) - middle
    return wrapped.to(torch.int8)


def unpack(name: str, get: Get, scheme: Scheme, config: Mapping[str, Any]) -> QuantizedTensor:
    """Read linear `name`. Raises InputError if tensors and config disagree."""
    weight = scheme.weight
    assert weight is not None
    bits = weight.bits
    packed, scales, zeros = get(f"{name}.qweight"), get(f"{name}.scales"), get(f"{name}.qzeros")
    width, out = packed.shape[0] * 32 // bits, packed.shape[1]
    groups = scales.shape[0]
    if packed.dtype != torch.int32 or scales.shape[1] != out or list(zeros.shape) != [groups, out * bits // 32]:
        raise InputError(
            f"{name}: qweight {list(packed.shape)} {packed.dtype}, scales {list(scales.shape)} and qzeros "
            f"{list(zeros.shape)} do not belong together at {bits} bits."
        )
    codes = unpack_bits(packed.T.contiguous(), bits, width)
    zero = unpack_bits(zeros, bits, out).T.contiguous()
    if checkpoint_format(config) == "gptq":
        zero = _wrap(zero.to(torch.int16) + 1, bits)
    scale = scales.T.contiguous()
    if weight.group_size == 1:
        index = get(f"{name}.g_idx").long()
        if len(index) != width or int(index.min()) < 0 or int(index.max()) >= groups:
            raise InputError(f"{name}.g_idx does not name one of {groups} groups for each of {width} inputs.")
        scale, zero = scale[:, index], zero[:, index]
    elif width % groups:
        raise InputError(f"{name}: {groups} groups do not divide {width} inputs.")
    if weight.symmetric:
        if bool((zero != 0).any()):
            raise InputError(f"{name}: the config says sym, but qzeros are not all 2^{bits - 1}.")
        return QuantizedTensor(codes, scale, None, weight)
    return QuantizedTensor(codes, scale, zero, weight)


def checkpoint_format(config: Mapping[str, Any]) -> str:
    """gptq or gptq_v2. Raises InputError for another layout."""
    found = str(config.get("format") or config.get("checkpoint_format") or "gptq")
    if found not in ("gptq", "gptq_v2"):
        raise InputError(f"GPTQ checkpoint format {found!r} cannot be read; lowbit reads gptq and gptq_v2.")
    return found


def read_schemes(
    config: Mapping[str, Any], linears: Iterable[str], stored: Iterable[str], get: Get
) -> dict[str, Scheme]:
    """The scheme of each linear that is stored as qweight. Raises InputError for what the format cannot mean."""
    bits, size = config.get("bits"), config.get("group_size", -1)
    if bits not in BITS or not isinstance(size, int):
        raise InputError(f"GPTQ config with bits={bits!r}, group_size={size!r}; lowbit reads {BITS} bits.")
    if any(isinstance(v, Mapping) and v for v in (config.get("dynamic") or {}).values()):
        raise InputError("GPTQ files with per-layer settings ('dynamic' overrides) cannot be read yet.")
    checkpoint_format(config)
    names = set(stored)
    result = {}
    for name in linears:
        if f"{name}.qweight" not in names:
            continue
        plain = TensorScheme(
            "int", bits, "group" if size > 0 else "channel", max(size, 0), bool(config.get("sym", True))
        )
        if config.get("desc_act") and size > 0 and not _in_order(get(f"{name}.g_idx"), size):
            plain = TensorScheme("int", bits, "group", 1, plain.symmetric)
        result[name] = Scheme(plain)
    return result


def _in_order(index: Tensor, size: int) -> bool:
    return torch.equal(index.long(), torch.arange(len(index)) // size)


def quantization_config(schemes: Mapping[str, Scheme], version: int) -> dict[str, Any]:
    """config.json's `quantization_config`. Raises InputError if the layers' schemes differ, which GPTQ cannot say."""
    weight = single_scheme(schemes, "a GPTQ file")
    left = [n for n, s in schemes.items() if s.weight is None and n != "lm_head"]
    name = "gptq" if version == 1 else "gptq_v2"
    return {
        "quant_method": "gptq",
        "bits": weight.bits,
        "group_size": weight.group_size or -1,
        "sym": weight.symmetric,
        "desc_act": False,
        "static_groups": True,
        "true_sequential": True,
        "lm_head": schemes.get("lm_head", Scheme(None)).weight is not None,
        "checkpoint_format": name,
        "pack_dtype": "int32",
        "dynamic": {f"-:^{n.replace('.', '[.]')}$": {} for n in left} or None,
    }


def single_scheme(schemes: Mapping[str, Scheme], what: str) -> TensorScheme:
    """The one weight scheme of all quantized linears. Raises InputError if there are several."""
    found = {s.weight: n for n, s in schemes.items() if s.weight is not None}
    if len(found) != 1:
        shown = ", ".join(f"{n}: {schemes[n]}" for n in found.values())
        raise InputError(
            f"{what} has one number of bits and one group size for all layers, this model has several ({shown}). The "
            "formats gguf and compressed-tensors can carry it."
        )
    return next(iter(found))
