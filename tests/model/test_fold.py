"""Folds are found without knowing architectures, and applying all of them leaves the function as it was."""

from typing import Any

import pytest
import torch
from transformers import (
    FalconConfig,
    Gemma2Config,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto import AutoModelForCausalLM

from lowbit.model.fold import Fold, apply_fold, find_folds, float32_copy, float32_entry
from lowbit.model.walk import capture_entries, find_blocks, head_width

SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 128,
    "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GQA = SMALL | {"num_key_value_heads": 2, "head_dim": 16}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**GQA),
    "llama-mha": LlamaConfig(**SMALL | {"num_key_value_heads": 4}),
    "mistral": MistralConfig(**GQA),
    "qwen2": Qwen2Config(**GQA),
    "qwen3": Qwen3Config(**GQA),
    "gemma": GemmaConfig(**GQA),
    "gemma2": Gemma2Config(**GQA),
    "phi3": Phi3Config(**{k: v for k, v in GQA.items() if k != "head_dim"}),
    "opt": OPTConfig(**SMALL | {"ffn_dim": 96, "word_embed_proj_dim": 64, "do_layer_norm_before": True}),
    "neox": GPTNeoXConfig(**SMALL),
    "falcon": FalconConfig(**SMALL, new_decoder_architecture=False, multi_query=True, parallel_attn=True),
    "mixtral": MixtralConfig(**GQA, num_local_experts=4),
}


def random_model(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms and biases that are not what initialization makes them
            offset = 1.0 if key.endswith("weight") and not name.startswith("gemma") else 0.0
            parameter.data = offset + 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def folds_of(model: Any) -> tuple[list[Fold], list[str], Any, Any]:
    blocks = find_blocks(model)
    entry = capture_entries(model, blocks, [torch.arange(12)[None] + 3])[0]
    block = model.get_submodule(blocks.names[0])
    folds, left = find_folds(float32_copy(block, {}), float32_entry(entry), 0, head_width(model.config))
    return folds, left, block, entry


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"]),
        ("llama-mha", ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"]),
        ("mistral", ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"]),
        ("qwen2", ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"]),
        ("qwen3", ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"]),
        ("gemma", ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"]),
        ("gemma2", ["input_layernorm", "self_attn.v_proj", "pre_feedforward_layernorm", "mlp.up_proj"]),
        ("phi3", ["input_layernorm", "self_attn.qkv_proj", "post_attention_layernorm", "mlp.gate_up_proj"]),
        ("opt", ["self_attn_layer_norm", "self_attn.v_proj", "final_layer_norm", "fc1"]),  # ReLU is homogeneous
        ("neox", ["input_layernorm", "post_attention_layernorm"]),  # q, k, v interleaved by head; GELU
        ("mixtral", ["input_layernorm", "self_attn.v_proj"]),  # the experts' and the router's input is no linear's
    ],
)
def test_the_places_that_can_take_a_scale_and_no_others(name: str, expected: list[str]) -> None:
    folds, _, _, _ = folds_of(random_model(name))
    assert [f.producer for f in folds] == expected


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_all_folds_together_leave_the_function(name: str) -> None:
    model = random_model(name)
    tokens = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(2))
    before = model(tokens).logits
    folds, _, block, _ = folds_of(model)
    assert folds
    generator = torch.Generator().manual_seed(3)
    for fold in folds:
        width = block.get_submodule(fold.consumers[0]).in_features
        scale = fold.spread(torch.exp2(4 * torch.rand(width // fold.repeat, generator=generator) - 2))
        folded = apply_fold(fold, scale, block.get_parameter, torch.float32)
        assert not torch.equal(
            folded.tensors[f"{fold.producer}.weight"], block.get_parameter(f"{fold.producer}.weight")
        )
        for key, value in folded.tensors.items():
            block.get_parameter(key).data = value
    assert float((model(tokens).logits - before).abs().max()) < 1e-4 * float(before.abs().max())


@torch.no_grad()
def test_a_norm_in_bfloat16_is_rounded_first_and_the_weights_follow() -> None:
    """The stored norm is a bfloat16 value, and the function is still the same to float32 rounding."""
    model = random_model("gemma")
    tokens = torch.arange(3, 40)[None]
    for key, parameter in model.named_parameters():
        if "norm" in key:
            parameter.data = parameter.data.to(torch.bfloat16).float()
    before = model(tokens).logits
    folds, _, block, _ = folds_of(model)
    fold = folds[0]
    asked = torch.linspace(0.3, 3, 64)
    folded = apply_fold(fold, asked, block.get_parameter, torch.bfloat16)
    stored = folded.tensors["input_layernorm.weight"]
    assert torch.equal(stored, stored.to(torch.bfloat16).float())
    assert 0 < float((folded.scale - asked).abs().max()) < 0.02 * 3
    for key, value in folded.tensors.items():
        block.get_parameter(key).data = value
    assert float((model(tokens).logits - before).abs().max()) < 1e-4 * float(before.abs().max())


@torch.no_grad()
def test_heads_of_a_group_share_one_scale() -> None:
    folds, _, _, _ = folds_of(random_model("llama"))
    fold = folds[1]
    assert (fold.producer, fold.consumers, fold.repeat, fold.dim) == ("self_attn.v_proj", ("self_attn.o_proj",), 2, 16)
    x = torch.arange(64.0)
    small = fold.reduce(x)
    assert torch.equal(small, torch.cat([x[16:32], x[48:64]]))
    spread = fold.spread(small).reshape(4, 16)
    assert torch.equal(spread[0], spread[1])
    assert torch.equal(spread[2], spread[3])


@torch.no_grad()
def test_what_reads_the_norm_besides_linears_forbids_the_fold() -> None:
    model = random_model("llama")
    block = model.model.layers[0]

    class Gated(torch.nn.Module):
        def __init__(self, mlp: Any) -> None:
            super().__init__()
            self.mlp = mlp

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mlp(x) + 0.1 * x

    block.mlp = Gated(block.mlp)
    folds, left, _, _ = folds_of(model)
    assert [f.producer for f in folds] == ["input_layernorm", "self_attn.v_proj", "mlp.mlp.up_proj"]
    assert left == ["mlp.mlp.gate_proj", "mlp.mlp.up_proj"]


@torch.no_grad()
def test_the_twin_is_left_as_it_was() -> None:
    model = random_model("llama")
    blocks = find_blocks(model)
    entry = capture_entries(model, blocks, [torch.arange(12)[None]])[0]
    twin = float32_copy(model.get_submodule(blocks.names[0]), {})
    before = {k: v.clone() for k, v in twin.state_dict().items()}
    find_folds(twin, float32_entry(entry), 0, 16)
    assert all(torch.equal(v, before[k]) for k, v in twin.state_dict().items())
