"""Directories in lowbit's own layout: quantize, verify, evaluate's engines, transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lowbit
import lowbit.transformers
from lowbit.errors import InputError
from lowbit.kernels import pack as kernel_pack
from lowbit.model.checkpoint import open_checkpoint
from lowbit.model.load import open_source, skeleton
from lowbit.model.walk import linears

PROMPT = torch.randint(3, 4096, (2, 24), generator=torch.Generator().manual_seed(0))
MADE = [
    ("e8p2", "quip"),
    ("e8p3", "quip"),
    ("w2a16-g32", "quip"),
    ("any4-g64", "any4"),
    ("any3-g64", "gptq"),
    ("nf4", "rtn"),
]


@pytest.fixture(scope="module")
def quantized(tiny: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """quantized(scheme, method) -> the output directory; made once for each."""
    place = tmp_path_factory.mktemp("native")

    def make(scheme: str, method: str, **words: Any) -> Path:
        output = place / f"{scheme}-{method}"
        if not output.exists():
            calibration = str(text_file)
            lowbit.quantize(
                tiny, output, scheme=scheme, method=method, calibration=calibration, samples=8, seq_len=32, **words
            )
        return output

    return make


@torch.no_grad()
@pytest.mark.parametrize(("scheme", "method"), MADE)
def test_transformers_loads_the_dequantized_weights(quantized: Callable[..., Path], scheme: str, method: str) -> None:
    path = quantized(scheme, method)
    checkpoint = open_checkpoint(path)
    assert checkpoint.quantization is not None
    assert checkpoint.quantization["quant_method"] == "lowbit"
    source = open_source(skeleton(checkpoint), checkpoint)
    assert len(source.schemes) == 14
    rotated = checkpoint.quantization["rotated"]
    assert len(rotated) >= 7 if method == "quip" else not rotated  # a few fall back to rtn on so little text
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    modules = linears(model)
    for name in source.schemes:
        weight = source.linear(name)
        assert weight is not None
        assert (weight.rotation is not None) == (name in checkpoint.quantization["rotated"])
        assert torch.equal(modules[name].weight, weight.dequantize(torch.bfloat16)), name
    reference = lowbit.load(path, "bfloat16").logits(PROMPT)
    assert torch.equal(model(PROMPT).logits.float(), reference)


@pytest.mark.parametrize(("scheme", "method"), MADE[:1] + MADE[3:4])
def test_verify_proves_them(quantized: Callable[..., Path], scheme: str, method: str) -> None:
    document = lowbit.verify(quantized(scheme, method))
    assert document["ok"], document["checks"]


def test_rotated_models_are_the_same_bytes_when_made_again(
    quantized: Callable[..., Path], tiny: Path, text_file: Path, tmp_path: Path
) -> None:
    first, second = quantized("e8p2", "quip"), tmp_path / "again"
    lowbit.quantize(tiny, second, scheme="e8p2", method="quip", calibration=str(text_file), samples=8, seq_len=32)
    for file in first.glob("*.safetensors"):
        assert file.read_bytes() == (second / file.name).read_bytes()


@torch.no_grad()
@pytest.mark.skipif(kernel_pack.native is None, reason="needs the compiled kernels")
@pytest.mark.parametrize(("scheme", "method"), [("any4-g64", "any4"), ("nf4", "rtn")])
def test_tables_run_on_the_native_kernels(quantized: Callable[..., Path], scheme: str, method: str) -> None:
    """Table entries become int8 in units of the largest, and activations int8 in groups of 32: a small difference."""
    path = quantized(scheme, method)
    engine = lowbit.load(path)
    assert engine.kernels == {"native table4": 14, "native int8": 1}  # and the head
    exact = lowbit.load(path, "float32").logits(PROMPT)
    mine = engine.logits(PROMPT)
    assert float((mine - exact).norm() / exact.norm()) < 0.08
    assert engine.weight_bytes < lowbit.load(path, "bfloat16").weight_bytes


@torch.no_grad()
@pytest.mark.skipif(kernel_pack.native is None, reason="needs the compiled kernels")
@pytest.mark.parametrize("scheme", ["w2a16-g32", "e8p2"])
def test_rotated_models_keep_their_few_bits(quantized: Callable[..., Path], scheme: str) -> None:
    """The activations are rotated instead of the weight, and rounded to int8 in groups of 32."""
    path = quantized(scheme, "quip")
    engine = lowbit.load(path)
    rotated = len(engine.checkpoint.quantization["rotated"])  # all but where plain rounding was no worse
    assert rotated >= 8
    assert engine.kernels["native e8p2" if scheme == "e8p2" else "native rotated int2"] >= rotated
    dense = lowbit.load(path, "float32")
    exact = dense.logits(PROMPT)
    assert float((engine.logits(PROMPT) - exact).norm() / exact.norm()) < 0.05
    if "bfloat16" in engine.runtime:  # what is not quantized is in float32 where the CPU has no bfloat16
        dense = lowbit.load(path, "bfloat16")
    assert engine.weight_bytes < dense.weight_bytes


@pytest.mark.parametrize(
    ("scheme", "method", "message"),
    [
        ("e8p2", "gptq", "does not round to scheme e8p2, which is a lattice: use --method quip"),
        ("any4", "quip", "has learned tables: use --method rtn or gptq or signround or any4"),
        ("w4a16-g32", "any4", "method 'any4' does not round to scheme w4a16-g32"),
        ("nvfp4", "quip", "method 'quip' does not round to scheme nvfp4"),
    ],
)
def test_methods_name_the_schemes_they_cannot_make(
    tiny: Path, text_file: Path, tmp_path: Path, scheme: str, method: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        lowbit.quantize(tiny, tmp_path / "out", scheme=scheme, method=method, calibration=str(text_file), samples=2)


@torch.no_grad()
@pytest.mark.interop
@pytest.mark.parametrize("scheme", ["mxfp4", "nvfp4"])
def test_four_bit_floats_load_through_compressed_tensors(quantized: Callable[..., Path], scheme: str) -> None:
    path = quantized(scheme, "gptq")
    checkpoint = open_checkpoint(path)
    assert checkpoint.quantization is not None
    assert checkpoint.quantization["format"] == f"{scheme}-pack-quantized"
    source = open_source(skeleton(checkpoint), checkpoint)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    model(PROMPT)  # transformers decompresses at the first use
    for name, module in linears(model).items():
        mine = source.linear(name)
        if mine is not None:
            assert torch.allclose(module.weight.float(), mine.dequantize(), rtol=2**-6, atol=1e-6), name
