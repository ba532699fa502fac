"""The engine answers as transformers does, and counts its bytes."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import lowbit
from lowbit.errors import InputError
from lowbit.kernels.pack import native
from lowbit.pipeline import quantize
from lowbit.runtime.engine import Runtime, load
from lowbit.runtime.general import GeneralEngine
from lowbit.runtime.native import NativeEngine, why_not
from lowbit.scheme import Scheme


def test_greedy_stream_is_transformers_generate(tiny_float32: Path) -> None:
    engine = load(tiny_float32, "float32")
    prompts = torch.randint(3, 4096, (2, 9), generator=torch.Generator().manual_seed(0))
    streamed = torch.stack(list(engine.stream(prompts, 12)), 1)
    model = AutoModelForCausalLM.from_pretrained(tiny_float32)
    expected = model.generate(prompts, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=2)[:, 9:]
    assert torch.equal(streamed, expected)


needs_native = pytest.mark.skipif(native is None, reason="the compiled kernels were not built")


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean())


def test_logits_of_the_quantized_runtimes_agree(tiny: Path, tmp_path: Path) -> None:
    quantize(tiny, tmp_path / "q", scheme="w8a16-channel", method="rtn")
    tokens = torch.randint(0, 4096, (1, 32), generator=torch.Generator().manual_seed(0))
    engine = load(tmp_path / "q", "transformers")
    assert engine.kernels == {"int8": 14}
    assert kl(load(tmp_path / "q", "float32").logits(tokens), engine.logits(tokens)) < 2e-3


@needs_native
@pytest.mark.parametrize(
    "scheme", ["w4a16-g32", "w4a16-g64-asym", "w3a16-g32", "w2a16-channel", "w8a16-tensor", "w8a8", "w4a8-g32"]
)
def test_native_engine_computes_the_stored_model(scheme: str, tiny: Path, tmp_path: Path) -> None:
    """Against the exact float32 path: what is left is the int8 rounding of the activations."""
    quantize(tiny, tmp_path / "q", scheme=scheme, method="rtn")
    tokens = torch.randint(0, 4096, (2, 48), generator=torch.Generator().manual_seed(0))
    engine = load(tmp_path / "q")
    assert isinstance(engine, NativeEngine)
    assert sum(engine.kernels.values()) == 15  # the blocks' linears and the head
    assert kl(load(tmp_path / "q", "float32").logits(tokens), engine.logits(tokens)) < 2e-3


@needs_native
def test_head_and_embedding_in_8_bits(tiny: Path, tmp_path: Path) -> None:
    """A head that the file leaves alone is rounded at load; one that the file holds in 8 bits, and embedding rows as
    bytes, are what the float32 path computes with."""
    override = (("lm_head", "w8a16-channel"), ("embed_tokens", "w8a16-channel"))
    quantize(tiny, tmp_path / "left", scheme="w4a16-g32", method="rtn")
    quantize(tiny, tmp_path / "asked", scheme="w4a16-g32", method="rtn", override=override)
    tokens = torch.randint(0, 4096, (2, 48), generator=torch.Generator().manual_seed(0))
    left, asked = load(tmp_path / "left"), load(tmp_path / "asked")
    assert "int8 head" in left.runtime
    assert "int8 head" not in asked.runtime
    assert asked.weight_bytes < left.weight_bytes
    assert kl(load(tmp_path / "asked", "float32").logits(tokens), asked.logits(tokens)) < 2e-3
    assert kl(load(tmp_path / "left", "float32").logits(tokens), left.logits(tokens)) < 2e-3


@needs_native
def test_native_stream_is_the_argmax_of_its_own_logits(tiny: Path) -> None:
    engine = load(tiny)
    prompts = torch.randint(3, 4096, (3, 9), generator=torch.Generator().manual_seed(0))
    streamed = torch.stack(list(engine.stream(prompts, 12)), 1)
    whole = torch.cat([prompts, streamed], 1)
    assert torch.equal(engine.logits(whole)[:, 8:-1].argmax(-1), streamed)


@needs_native
def test_models_without_native_kernels_go_through_transformers(tiny: Path, tmp_path: Path) -> None:
    quantize(tiny, tmp_path / "q", scheme="fp8", method="rtn")
    assert isinstance(load(tmp_path / "q"), GeneralEngine)
    assert "no native kernel for fp8" in str(why_not(LlamaConfig(), {"x": Scheme.parse("fp8")}))
    assert "does not know model_type 'gpt2'" in str(why_not(GPT2Config(), {}))


@pytest.mark.parametrize("runtime", ["bfloat16", "auto"])
def test_weight_bytes_count_every_stored_tensor_once(runtime: Runtime, tiny: Path) -> None:
    engine = load(tiny, runtime)
    stored = sum(info.nbytes for info in engine.checkpoint.tensors.values())
    assert engine.weight_bytes == stored
    row = 64 * 2
    assert engine.weight_bytes_per_token == stored - 4096 * row + row
    assert engine.kv_bytes(10) == 2 * 2 * 2 * 16 * 10 * 2  # keys and values, layers, heads, width, tokens, bytes


@pytest.mark.parametrize("runtime", ["transformers", "auto"])
def test_quantized_weight_bytes_shrink(runtime: Runtime, tiny: Path, tmp_path: Path) -> None:
    quantize(tiny, tmp_path / "q", scheme="w4a16-g32", method="rtn")
    assert load(tmp_path / "q", runtime).weight_bytes < load(tiny, runtime).weight_bytes


def test_public_api_generates_text() -> None:
    engine = lowbit.load("demo")
    text = engine.generate("import os\nimport ", max_new_tokens=8)
    assert isinstance(text, str)
    assert text.strip()


def test_bad_prompts(tiny: Path) -> None:
    engine = load(tiny)
    with pytest.raises(InputError, match="prompt is empty"):
        list(engine.stream(torch.empty(1, 0, dtype=torch.long), 4))
    with pytest.raises(InputError, match="knows 0 to 4095"):
        list(engine.stream(torch.tensor([[5000]]), 4))
    with pytest.raises(InputError, match="exceed the model's context of 256"):
        list(engine.stream(torch.zeros(1, 250, dtype=torch.long), 7))
