"""Rotated checkpoints compute what the original computes; what cannot be rotated is refused with the reason."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

import lowbit
from lowbit.algorithms.hadamard import HadamardSettings
from lowbit.artifact import Work
from lowbit.errors import InputError
from lowbit.model.checkpoint import open_checkpoint
from lowbit.model.rotate import rotate
from lowbit.model.stream import stream_logits

SMALL: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96,
    "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
GQA = SMALL | {"num_key_value_heads": 2, "head_dim": 12}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**GQA),
    "llama-bias": LlamaConfig(**GQA, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**GQA),
    "qwen2": Qwen2Config(**GQA),
    "qwen3": Qwen3Config(**GQA),
    "phi3": Phi3Config(**{k: v for k, v in GQA.items() if k != "head_dim"}),
    "gemma": GemmaConfig(**GQA),
}
REFUSED: dict[str, Any] = {
    "gemma2": Gemma2Config(**GQA),
    "opt": OPTConfig(**SMALL, ffn_dim=80, word_embed_proj_dim=48, do_layer_norm_before=True),
}
TOKENS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(2))


def save(path: Path, config: Any) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        if parameter.dim() == 1:
            offset = 1.0 if key.endswith("weight") and "gemma" not in config.model_type else 0.0
            parameter.data = offset + 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(path)
    return path


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_the_function_is_unchanged_to_float32_rounding(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(tmp_path / "m", CONFIGS[name]))
    expected = stream_logits(checkpoint, TOKENS)
    for settings in (HadamardSettings(), HadamardSettings(r1=False), HadamardSettings(r2=False)):
        rotated = rotate(checkpoint, settings, seed=0)
        logits = stream_logits(rotated, TOKENS)
        assert float((logits - expected).abs().max()) < 1e-4 * float(expected.abs().max())
        changed = {n.split(".")[-2] for n in rotated.tensors if not torch.equal(rotated.get(n), checkpoint.get(n))}
        values = {"qkv_proj" if name == "phi3" else "v_proj", "o_proj"}
        assert (changed == values) if not settings.r1 else ({"embed_tokens", "lm_head", "norm"} <= changed)


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_do_not_commute_are_refused(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(tmp_path / "m", REFUSED[name]))
    with pytest.raises(InputError, match=r"hadamard: (this model does not commute with a rotation|no norm was found)"):
        rotate(checkpoint, HadamardSettings(), seed=0)


def test_tied_embeddings_are_refused_but_values_can_be_rotated(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(tmp_path / "m", LlamaConfig(**GQA | {"tie_word_embeddings": True})))
    with pytest.raises(InputError, match=r"shares the embedding's weights.*--set r1=false"):
        rotate(checkpoint, HadamardSettings(), seed=0)
    rotated = rotate(checkpoint, HadamardSettings(r1=False), seed=0)
    expected = stream_logits(checkpoint, TOKENS)
    assert float((stream_logits(rotated, TOKENS) - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_a_rotation_takes_outliers_away(tmp_path: Path) -> None:
    """Three wide columns in every reader: their share of the rows' range is gone after the rotation."""
    path = save(tmp_path / "m", CONFIGS["llama"])
    checkpoint = open_checkpoint(path)
    rotated = rotate(checkpoint, HadamardSettings(), seed=0)
    name = "model.layers.0.mlp.up_proj.weight"
    gain = checkpoint.get("model.layers.0.post_attention_layernorm.weight")
    planted = gain.clone()
    planted[:3] *= 50

    def peak(w: torch.Tensor) -> float:
        return float((w.abs().amax(1) / w.square().mean(1).sqrt()).mean())

    original = checkpoint.get(name) * planted
    turned = torch.linalg.lstsq((checkpoint.get(name) * gain).double(), rotated.get(name).double()).solution
    assert peak(original) > 3
    assert peak((original.double() @ turned).float()) < peak(original)


@pytest.mark.parametrize("method", ["hadamard", "hadamard+gptq", "hadamard+awq+gptq", "hadamard+smoothquant"])
def test_through_the_pipeline_and_resumed(
    method: str, tiny: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(output: Path, **words: Any) -> None:
        settings = {"scheme": "w8a16-channel", "calibration": str(text_file), "samples": 8, "seq_len": 32}
        lowbit.quantize(tiny, output, method=method, **settings | words)

    run(tmp_path / "whole")
    tokens = torch.randint(3, 4096, (2, 32), generator=torch.Generator().manual_seed(5))
    a, b = (stream_logits(open_checkpoint(p), tokens) for p in (tmp_path / "whole", tiny))
    assert float((a - b).norm() / b.norm()) < 0.1
    assert torch.equal(
        open_checkpoint(tmp_path / "whole").get("model.norm.weight"), torch.ones(64, dtype=torch.bfloat16)
    )
    original = Work.write_report

    def interrupted(self: Work, *args: Any) -> None:
        original(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Work, "write_report", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out")
    run(tmp_path / "out", resume=True)
    for file in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
