"""Attention's two batched products in int8, against attention in floats; where they are refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import GPTJConfig, GPTJForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lowbit.errors import InputError
from lowbit.exporting import export
from lowbit.pipeline import quantize
from lowbit.recipe import Recipe
from lowbit.runtime.engine import load
from lowbit.runtime.general import GeneralEngine
from lowbit.runtime.int8_products import int8_attention, use_int8_products
from lowbit.scheme import Scheme


def heads(count: int, seed: int, tokens: int = 40) -> Tensor:
    return torch.randn(2, count, tokens, 16, generator=torch.Generator().manual_seed(seed))


def causal(tokens: int) -> Tensor:
    return torch.full((tokens, tokens), torch.finfo(torch.float32).min).triu(1)[None, None]


def test_it_is_attention_to_eight_bits() -> None:
    q, k, v = heads(4, 0), heads(2, 1), heads(2, 2)
    got, _ = int8_attention(nn.Module(), q, k, v, causal(40), scaling=0.25)
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    expected, _ = sdpa_attention_forward(module, q, k, v, causal(40), scaling=0.25)
    relative = (got - expected).norm() / expected.norm()
    assert 1e-4 < float(relative) < 0.015


def test_a_token_sees_nothing_of_those_behind_it() -> None:
    q, k, v = heads(4, 0), heads(2, 1), heads(2, 2)
    whole, _ = int8_attention(nn.Module(), q, k, v, causal(40), scaling=0.25)
    short, _ = int8_attention(nn.Module(), q[:, :, :20], k[:, :, :20], v[:, :, :20], causal(20), scaling=0.25)
    assert torch.allclose(whole[:, :20], short, atol=1e-6)


def test_scheme_words() -> None:
    assert str(Scheme.parse("w8a8-bmm")) == "w8a8-bmm"
    assert Recipe("w8a8-bmm").products
    assert str(Recipe("w8a8-bmm").scheme_of("model.layers.0.mlp.up_proj")) == "w8a8-channel"[:4]
    for wrong in ("w4a16-bmm", "fp8-bmm", "w8a8-bmm-bmm"):
        with pytest.raises(InputError, match="goes with int8 activations"):
            Scheme.parse(wrong)
    with pytest.raises(InputError, match="whole model's attention"):
        Recipe("w8a8", override=(("layers.0.*", "w8a8-bmm"),))


def test_a_directory_computes_so_and_cannot_be_exported(tiny: Path, tmp_path: Path) -> None:
    quantize(tiny, tmp_path / "plain", scheme="w8a8", method="rtn")
    quantize(tiny, tmp_path / "q", scheme="w8a8-bmm", method="rtn")
    tokens = torch.randint(0, 4096, (2, 48), generator=torch.Generator().manual_seed(0))
    engine, plain = load(tmp_path / "q"), load(tmp_path / "plain", "transformers")
    assert isinstance(engine, GeneralEngine)
    assert "int8 attention products" in engine.runtime
    a, b = plain.logits(tokens).log_softmax(-1), engine.logits(tokens).log_softmax(-1)
    assert 0 < float((a.exp() * (a - b)).sum(-1).mean()) < 5e-3
    streamed = torch.stack(list(load(tmp_path / "q", "float32").stream(tokens[:, :20], 6)), 1)
    whole = torch.cat([tokens[:, :20], streamed], 1)
    assert torch.equal(load(tmp_path / "q", "float32").logits(whole)[:, 19:-1].argmax(-1), streamed)
    with pytest.raises(InputError, match="general engine alone"):
        export(tmp_path / "q", tmp_path / "x.gguf", "gguf")


def test_attention_of_its_own_is_refused() -> None:
    model = GPTJForCausalLM(GPTJConfig(n_embd=32, n_layer=1, n_head=2, rotary_dim=8, vocab_size=64))
    with pytest.raises(InputError, match="written out in its own class"):
        use_int8_products(model)
