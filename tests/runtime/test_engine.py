"""The engine answers as transformers does, and counts its bytes."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.errors import InputError
from lowbit.pipeline import quantize
from lowbit.runtime.engine import load


def test_greedy_stream_is_transformers_generate(tiny_float32: Path) -> None:
    engine = load(tiny_float32, "float32")
    prompts = torch.randint(3, 4096, (2, 9), generator=torch.Generator().manual_seed(0))
    streamed = torch.stack(list(engine.stream(prompts, 12)), 1)
    model = AutoModelForCausalLM.from_pretrained(tiny_float32)
    expected = model.generate(prompts, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=2)[:, 9:]
    assert torch.equal(streamed, expected)


def test_logits_of_the_quantized_runtimes_agree(tiny: Path, tmp_path: Path) -> None:
    quantize(tiny, tmp_path / "q", scheme="w8a16-channel", method="rtn")
    tokens = torch.randint(0, 4096, (1, 32), generator=torch.Generator().manual_seed(0))
    exact, kernels = load(tmp_path / "q", "float32").logits(tokens), load(tmp_path / "q").logits(tokens)
    assert load(tmp_path / "q").kernels == {"int8": 14}
    kl = (exact.softmax(-1) * (exact.log_softmax(-1) - kernels.log_softmax(-1))).sum(-1).mean()
    assert kl < 2e-3


def test_weight_bytes_count_every_stored_tensor_once(tiny: Path) -> None:
    engine = load(tiny, "bfloat16")
    stored = sum(info.nbytes for info in engine.checkpoint.tensors.values())
    assert engine.weight_bytes == stored
    row = 64 * 2
    assert engine.weight_bytes_per_token == stored - 4096 * row + row
    assert engine.kv_bytes(10) == 2 * 2 * 2 * 16 * 10 * 2  # keys and values, layers, heads, width, tokens, bytes


def test_quantized_weight_bytes_shrink(tiny: Path, tmp_path: Path) -> None:
    quantize(tiny, tmp_path / "q", scheme="w4a16-g32", method="rtn")
    assert load(tmp_path / "q").weight_bytes < load(tiny, "bfloat16").weight_bytes


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
