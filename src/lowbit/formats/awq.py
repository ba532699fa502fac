"""AWQ checkpoints in AutoAWQ's GEMM layout: 4 bits, groups or whole rows, zero points.

    qweight  int32 (in, out / 8)      codes + 8, eight neighbouring outputs a word
    qzeros   int32 (groups, out / 8)  zero points + 8, packed likewise (nothing is subtracted, unlike GPTQ)
    scales   float16 (groups, out)

Nibble i of a word holds output ORDER[i] of its eight: even ones first, as the kernel unpacks them.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.formats.gptq import single_scheme
from lowbit.numerics import half_scale
from lowbit.scheme import Scheme, TensorScheme
from lowbit.tensor import QuantizedTensor

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Get = Callable[[str], Tensor]


def supports(scheme: Scheme) -> str | None:
    """None if the format holds this scheme, else the reason why not."""
    weight = scheme.weight
    if weight is None:
        return None
    if weight.kind != "int" or weight.bits != 4 or scheme.activation is not None:
        return "AWQ files hold 4-bit integer weights with float activations"
    return None if weight.granularity in ("group", "channel") else f"AWQ files have no scale per {weight.granularity}"


def pack_words(codes: Tensor) -> Tensor:
    """Signed codes (n, out) int8 -> int32 (n, out / 8)."""
    nibbles = (codes.to(torch.int64) + 8).reshape(len(codes), -1, 8)[:, :, list(ORDER)]
    words = (nibbles << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_words(words: Tensor) -> Tensor:
    """The inverse of `pack_words`."""
    nibbles = (words.to(torch.int64)[..., None] >> (4 * torch.arange(8))) & 15
    codes = torch.empty_like(nibbles)
    codes[..., list(ORDER)] = nibbles
    return (codes.reshape(len(words), -1) - 8).to(torch.int8)


def pack(name: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of linear `name`. Raises InputError for a number of outputs that 8 does not divide."""
    out = len(quantized.codes)
    if out % 8:
        raise InputError(f"{name}: AWQ packs eight outputs a word, which {out} are not a multiple of; leave it alone.")
    zero = quantized.zero_point
    if zero is None:
        zero = torch.zeros(quantized.scale.shape, dtype=torch.int8)
    return {
        f"{name}.qweight": pack_words(quantized.codes.T),
        f"{name}.qzeros": pack_words(zero.T),
        f"{name}.scales": half_scale(name, quantized.scale).T.contiguous(),
    }


def unpack(name: str, get: Get, scheme: Scheme, _config: Mapping[str, Any]) -> QuantizedTensor:
    """Read linear `name`. Raises InputError if its tensors do not belong together."""
    weight = scheme.weight
    assert weight is not None
    words, scales, zeros = get(f"{name}.qweight"), get(f"{name}.scales"), get(f"{name}.qzeros")
    width, out, groups = words.shape[0], words.shape[1] * 8, scales.shape[0]
    wanted = width // weight.group_size if weight.group_size else 1
    if scales.shape[1] != out or list(zeros.shape) != [groups, out // 8] or groups != wanted:
        raise InputError(
            f"{name}: qweight {list(words.shape)}, scales {list(scales.shape)} and qzeros {list(zeros.shape)} do not "
            f"belong together at group size {weight.group_size or 'a whole row'}."
        )
    return QuantizedTensor(
        unpack_words(words).T.contiguous(), scales.T.contiguous(), unpack_words(zeros).T.contiguous(), weight
    )


def read_schemes(
    config: Mapping[str, Any], linears: Iterable[str], stored: Iterable[str], _get: Get
) -> dict[str, Scheme]:
    """The scheme of each linear that is stored as qweight. Raises InputError for other layouts of AWQ."""
    version = str(config.get("version", "gemm")).lower()
    bits = config.get("bits", config.get("w_bit"))
    size = config.get("group_size", config.get("q_group_size", 128))
    if version != "gemm" or bits != 4 or not config.get("zero_point", True) or not isinstance(size, int):
        raise InputError(
            f"AWQ version {version!r} with bits={bits!r}, group_size={size!r}, "
            f"zero_point={config.get('zero_point')!r}; lowbit reads the GEMM layout of 4 bits with zero points."
        )
    weight = TensorScheme("int", 4, "group" if size > 0 else "channel", max(size, 0), symmetric=False)
    names = set(stored)
    return {n: Scheme(weight) for n in linears if f"{n}.qweight" in names}


def quantization_config(schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """config.json's `quantization_config`. Raises InputError if the layers' schemes differ."""
    weight = single_scheme(schemes, "an AWQ file")
    left = [n for n, s in schemes.items() if s.weight is None and n != "lm_head"]
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": weight.group_size or -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": left or None,
    }
