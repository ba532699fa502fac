"""transformers with the compressed-tensors package loads what lowbit wrote, and computes the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import lowbit
from lowbit.formats.compressed_tensors import read_schemes, unpack
from lowbit.model.checkpoint import open_checkpoint
from lowbit.model.stream import stream_logits
from lowbit.model.walk import linears
from lowbit.numerics import fake_quantize_activation
from lowbit.scheme import Scheme
from lowbit.tensor import QuantizedTensor

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning"),  # see load()
]

WEIGHT_ONLY = ["w4a16-g32", "w4a16-g32-asym", "w3a16-g64", "w8a16-channel"]
SCHEMES = [*WEIGHT_ONLY, "w8a8", "w8a8-static", "w4a8-g32", "fp8", "fp8-static", "w4afp8-g32"]
OUTSIDE = {"override": (("lm_head", "w8a16-channel"), ("embed_tokens", "w8a16-channel"))}
MIXED = {"override": (("layers.0.*", "w8a16-channel"), ("layers.1.mlp.*", "w3a16-g64")), "ignore": ("o_proj",)}
PROMPT = torch.randint(3, 4096, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def quantized(
    tiny: Path, tiny_float32: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """quantized(scheme, dtype, ...) -> the output directory; made once for each."""
    made: dict[Any, Path] = {}
    place = tmp_path_factory.mktemp("reload")

    def make(scheme: str, dtype: torch.dtype, **words: Any) -> Path:
        key = (scheme, dtype, tuple(words.items()))
        if key not in made:
            output = place / str(len(made))
            model = tiny_float32 if dtype == torch.float32 else tiny
            lowbit.quantize(model, output, scheme=scheme, calibration=str(text_file), samples=8, seq_len=32, **words)
            made[key] = output
        return made[key]

    return make


def tensors_of(path: Path) -> tuple[dict[str, QuantizedTensor], dict[str, Scheme]]:
    """The quantized linears of an output directory by full name, as lowbit reads them."""
    checkpoint = open_checkpoint(path)
    names = [n.removesuffix(".weight_scale") for n in checkpoint.tensors if n.endswith(".weight_scale")]
    schemes = read_schemes(checkpoint.config["quantization_config"], names)
    return {n: unpack(n, checkpoint.get, schemes[n]) for n in names}, schemes


def in_memory(original: Path, path: Path) -> Any:
    """The original model with fake-quantized weights and activations put in: no file format involved."""
    model = AutoModelForCausalLM.from_pretrained(original).eval()
    tensors, schemes = tensors_of(path)
    modules = dict(model.named_modules())
    for name, quantized in tensors.items():
        modules[name].weight = nn.Parameter(quantized.dequantize(model.dtype), requires_grad=False)
        grid, get = schemes[name].activation, open_checkpoint(path).get
        if grid is not None:
            scale = get(f"{name}.input_scale") if schemes[name].static else None
            modules[name].register_forward_pre_hook(
                lambda _m, args, g=grid, s=scale: (fake_quantize_activation(args[0], g, s),)
            )
    return model


def load(path: Path, scheme: str, **words: Any) -> Any:
    """from_pretrained. Packed zero points need dequantize=True: without it transformers 5.23 with compressed-tensors
    0.20 allocates them unpacked and refuses the file, also one of compressed-tensors' own making."""
    if "asym" in scheme:
        words["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(path, **words).eval()


def generate(model: Any) -> list[list[int]]:
    with torch.no_grad():
        tokens: list[list[int]] = model.generate(
            PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=12, do_sample=False, pad_token_id=2
        ).tolist()
    return tokens


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
def test_loaded_weights_are_the_dequantized_ones(quantized: Callable[..., Path], scheme: str) -> None:
    path = quantized(scheme, torch.bfloat16)
    model = load(path, scheme, dtype=torch.bfloat16)
    model(PROMPT)  # transformers decompresses at the first use
    modules = linears(model)
    tensors, _ = tensors_of(path)
    assert len(tensors) == 14
    for name, tensor in tensors.items():
        assert torch.equal(modules[name].weight, tensor.dequantize(torch.bfloat16)), name


# transformers rounds int8 activations to absmax / 127.5 and lowbit, as integer kernels do, to absmax / 127
LOOSE = ("w8a8", "w4a8-g32")
TOLERANCE = dict.fromkeys(SCHEMES, 1e-5) | dict.fromkeys(LOOSE, 0.03)


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_and_greedy_tokens_are_the_in_memory_models(
    quantized: Callable[..., Path], tiny_float32: Path, scheme: str
) -> None:
    path = quantized(scheme, torch.float32)
    loaded = load(path, scheme)
    mine = in_memory(tiny_float32, path)
    a, b = loaded(PROMPT).logits, mine(PROMPT).logits
    assert float((a - b).norm() / b.norm()) < TOLERANCE[scheme]
    assert float((a.argmax(-1) == b.argmax(-1)).double().mean()) >= (0.9 if scheme in LOOSE else 1.0)
    if scheme not in LOOSE:
        assert generate(loaded) == generate(mine)


@torch.no_grad()
def test_mixed_schemes_load(quantized: Callable[..., Path], tiny_float32: Path) -> None:
    path = quantized("w4a16-g32", torch.float32, **MIXED)
    loaded = load(path, "w4a16-g32")
    mine = in_memory(tiny_float32, path)
    assert torch.allclose(loaded(PROMPT).logits, mine(PROMPT).logits, atol=1e-4)
    assert generate(loaded) == generate(mine)


@torch.no_grad()
def test_a_quantized_head_and_embedding_load(quantized: Callable[..., Path], tiny_float32: Path) -> None:
    path = quantized("w4a16-g32", torch.float32, **OUTSIDE)
    assert set(tensors_of(path)[1]) >= {"lm_head", "model.embed_tokens"}
    mine = in_memory(tiny_float32, path)
    expected = mine(PROMPT).logits
    assert torch.allclose(stream_logits(open_checkpoint(path), PROMPT), expected, atol=1e-4)
    # transformers 5.23 does not read a compressed embedding (the model card says so), but it does a compressed head
    path = quantized("w4a16-g32", torch.float32, override=OUTSIDE["override"][:1])
    loaded, mine = load(path, "w4a16-g32"), in_memory(tiny_float32, path)
    assert torch.allclose(loaded(PROMPT).logits, mine(PROMPT).logits, atol=1e-4)
    assert generate(loaded) == generate(mine)


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_streamed_forward_pass_is_the_in_memory_models(
    quantized: Callable[..., Path], tiny_float32: Path, scheme: str
) -> None:
    """lowbit's own reload, one block at a time, against the whole model at once."""
    path = quantized(scheme, torch.float32)
    expected = in_memory(tiny_float32, path)(PROMPT).logits
    assert torch.allclose(stream_logits(open_checkpoint(path), PROMPT), expected, atol=1e-4)
