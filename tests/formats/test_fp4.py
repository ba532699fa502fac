"""NVFP4 and MXFP4 against compressed-tensors' own decompression."""

import pytest
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationConfig

from lowbit.algorithms.gptq import GPTQSettings, gptq
from lowbit.algorithms.rtn import rtn
from lowbit.formats.compressed_tensors import pack, pack_fp4, quantization_config, unpack, unpack_fp4
from lowbit.numerics import fixed_table
from lowbit.scheme import Scheme
from lowbit.stats import quadratic_loss
from lowbit.tensor import QuantizedTensor

READERS = {"nvfp4": NVFP4PackedCompressor, "mxfp4": MXFP4PackedCompressor}


def made(text: str) -> tuple[torch.Tensor, torch.Tensor, QuantizedTensor, Scheme]:
    scheme = Scheme.parse(text)
    assert scheme.weight is not None
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 128, generator=g) * torch.logspace(-3, 0, 32)[:, None]
    x = torch.randn(400, 128, generator=g) @ torch.randn(128, 128, generator=g) * 0.1
    H = x.T @ x / 400
    return weight, H, gptq(weight, H, scheme.weight, GPTQSettings(), torch.bfloat16)[0], scheme


@pytest.mark.interop
def test_nibbles_are_theirs() -> None:
    codes = torch.arange(15).repeat(2, 2)[:, :16].to(torch.int8)
    table = fixed_table(Scheme.parse("mxfp4").weight)  # type: ignore[arg-type]
    assert table is not None
    values = table[codes.long()]
    assert torch.equal(pack_fp4(codes), pack_fp4_to_uint8(values))
    assert torch.equal(unpack_fp4_from_uint8(pack_fp4(codes), 2, 16, torch.float32), values)
    assert torch.equal(unpack_fp4(pack_fp4(codes)), codes)
    assert unpack_fp4(torch.tensor([[0x80]], dtype=torch.uint8)).tolist() == [[7, 7]]  # minus zero is zero


@pytest.mark.parametrize("text", ["nvfp4", "mxfp4"])
def test_unpack_inverts_pack(text: str) -> None:
    _, _, quantized, scheme = made(text)
    back = unpack("a", pack("a", quantized, scheme).__getitem__, scheme)
    assert torch.equal(back.codes, quantized.codes)
    assert back.scale.dtype == quantized.scale.dtype
    assert torch.equal(back.dequantize(), quantized.dequantize())


@pytest.mark.interop
@pytest.mark.parametrize("text", ["nvfp4", "mxfp4"])
def test_compressed_tensors_decompresses_the_same(text: str) -> None:
    """Their arithmetic is bfloat16, so values agree to its rounding; for powers of two exactly."""
    _, _, quantized, scheme = made(text)
    config = QuantizationConfig.model_validate(quantization_config({"a": scheme}))
    group = config.config_groups["group_0"]
    tensors = {n.removeprefix("a."): t for n, t in pack("a", quantized, scheme).items()}
    read = READERS[text].decompress(tensors, group)["weight"].float()
    mine = quantized.dequantize()
    assert torch.allclose(read, mine, rtol=2**-7, atol=0)
    if text == "mxfp4":
        assert torch.equal(read, mine)


@pytest.mark.parametrize("text", ["nvfp4", "mxfp4", "nf4"])
def test_feedback_and_searched_scales_beat_rounding(text: str) -> None:
    weight, H, fed_back, scheme = made(text)
    assert scheme.weight is not None
    plain = rtn(weight, scheme.weight, torch.bfloat16)
    searched = rtn(weight, scheme.weight, torch.bfloat16, scale_search=True)
    error = {name: weight - q.dequantize() for name, q in (("plain", plain), ("searched", searched))}
    assert error["searched"].square().sum() < error["plain"].square().sum()
    assert quadratic_loss(weight - fed_back.dequantize(), H) < 0.8 * quadratic_loss(error["plain"], H)


@pytest.mark.parametrize(("text", "bits"), [("nvfp4", 4 + 8 / 16 + 32 / (32 * 128)), ("mxfp4", 4 + 8 / 32)])
def test_bits_count_nested_scales(text: str, bits: float) -> None:
    _, _, quantized, _ = made(text)
    assert quantized.stored_bits / quantized.numel == pytest.approx(bits)


def test_mxfp4_scales_are_powers_of_two_and_nvfp4s_fill_the_range() -> None:
    _, _, quantized, _ = made("mxfp4")
    exponent = quantized.scale.float().log2()
    assert torch.equal(exponent, exponent.round())
    weight, _, _, scheme = made("nvfp4")
    assert scheme.weight is not None
    plain = rtn(weight, scheme.weight, torch.bfloat16)
    assert float(plain.scale.float().max()) == 448
    assert float(plain.dequantize().abs().max()) == pytest.approx(float(weight.abs().max()), rel=1e-6)
