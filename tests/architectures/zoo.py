"""Small random models of many architectures, from transformers' own config classes, with the demo's tokenizer."""

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from lowbit.model.checkpoint import DEMO

VOCABULARY = 4096
_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4} | _TOKENS
LLAMA = _SIZES | {"intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 128}
_HEADS = {"head_dim": 16}
_BERT = _SIZES | {"intermediate_size": 128, "max_position_embeddings": 128}
_MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# name -> (model class, config class, the config's words)
ZOO: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama3": (
        "LlamaForCausalLM",
        "LlamaConfig",
        LLAMA
        | {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", LLAMA | _HEADS | {"sliding_window": 8}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", LLAMA | _HEADS),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", LLAMA | _HEADS | {"sliding_window": 8}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", LLAMA | _HEADS | {"sliding_window": 8}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", LLAMA),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        _SIZES
        | {"ffn_dim": 128, "max_position_embeddings": 128, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _TOKENS | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _BERT | {"use_parallel_residual": True}),
    "falcon": ("FalconForCausalLM", "FalconConfig", _SIZES | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-alibi": (
        "FalconForCausalLM", "FalconConfig", _SIZES | {"alibi": True, "parallel_attn": False, "bias": True},
    ),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", LLAMA | {"use_qkv_bias": True}),
    "cohere": ("CohereForCausalLM", "CohereConfig", LLAMA | {"use_qk_norm": True}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", LLAMA | {"num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig", LLAMA | _MIXTURE | {"shared_expert_intermediate_size": 64},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", LLAMA | _HEADS | _MIXTURE),
    "bert": ("BertForMaskedLM", "BertConfig", _BERT),
    "bert-classifier": ("BertForSequenceClassification", "BertConfig", _BERT | {"num_labels": 3}),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", _BERT),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        _TOKENS | {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128},
    ),
}  # fmt: skip
ENCODERS = {"bert", "bert-classifier", "roberta", "distilbert"}
MIXTURES = {"mixtral", "qwen2_moe", "qwen3_moe"}


def save_architecture(name: str, path: Path, dtype: torch.dtype = torch.float32, **words: Any) -> Path:
    """Build architecture `name` with random weights (norms and biases too) and save it as a checkpoint directory."""
    model_class, config_class, config = ZOO[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**(config | words)))
    return save_model(model.to(dtype), path)


def save_model(model: Any, path: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * 0.1
        with torch.no_grad():
            parameter.add_(noise.to(parameter.dtype))
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight.data[module.padding_idx] = 0.1
    model.save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / "model" / file, path / file)
    return path
