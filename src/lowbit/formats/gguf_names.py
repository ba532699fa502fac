"""A Hugging Face decoder in llama.cpp's words: tensor names, hyperparameters, and which type each tensor gets.

Facts that differ from family to family, from llama.cpp's conversion scripts and loaders:

* Llama and Mistral: llama.cpp rotates neighbouring pairs of a head where transformers rotates its two halves, so the
  rows of q and k are reordered (`permute_heads`). Every other family keeps transformers' order.
* Gemma stores norm weights as w - 1 in safetensors and as w in GGUF.
* GPT-2's Conv1D weights are (in, out) in safetensors and (out, in) in GGUF.
* llama.cpp attends to the whole context in Llama, Mistral and Phi-3: a sliding window limits the context instead.
* Llama 3's frequency scaling is a tensor of divisors, rope_freqs.weight.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.formats.gguf_write import Typed
from lowbit.ggml import F16, GgmlType, find_type

_LLAMA = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.#.input_layernorm": "blk.#.attn_norm",
    "model.layers.#.self_attn.q_proj": "blk.#.attn_q",
    "model.layers.#.self_attn.k_proj": "blk.#.attn_k",
    "model.layers.#.self_attn.v_proj": "blk.#.attn_v",
    "model.layers.#.self_attn.o_proj": "blk.#.attn_output",
    "model.layers.#.post_attention_layernorm": "blk.#.ffn_norm",
    "model.layers.#.mlp.gate_proj": "blk.#.ffn_gate",
    "model.layers.#.mlp.up_proj": "blk.#.ffn_up",
    "model.layers.#.mlp.down_proj": "blk.#.ffn_down",
}
_HEAD_NORMS = {
    "model.layers.#.self_attn.q_norm": "blk.#.attn_q_norm",
    "model.layers.#.self_attn.k_norm": "blk.#.attn_k_norm",
}
_BRANCH_NORMS = {
    "model.layers.#.post_attention_layernorm": "blk.#.post_attention_norm",
    "model.layers.#.pre_feedforward_layernorm": "blk.#.ffn_norm",
    "model.layers.#.post_feedforward_layernorm": "blk.#.post_ffw_norm",
}
_FUSED = {
    "model.layers.#.self_attn.qkv_proj": "blk.#.attn_qkv",
    "model.layers.#.mlp.gate_up_proj": "blk.#.ffn_up",
}
_GPT2 = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
    "transformer.h.#.ln_1": "blk.#.attn_norm",
    "transformer.h.#.attn.c_attn": "blk.#.attn_qkv",
    "transformer.h.#.attn.c_proj": "blk.#.attn_output",
    "transformer.h.#.ln_2": "blk.#.ffn_norm",
    "transformer.h.#.mlp.c_fc": "blk.#.ffn_up",
    "transformer.h.#.mlp.c_proj": "blk.#.ffn_down",
}


@dataclass(frozen=True)
class Family:
    """How one model_type is written: llama.cpp's architecture, the names, and the quirks of the module docstring."""

    architecture: str
    names: Mapping[str, str]
    permuted: bool = False
    norm_offset: float = 0.0
    conv1d: bool = False
    windowed: bool = False  # llama.cpp knows its sliding window
    period: int = 0  # every period-th layer attends to everything


FAMILIES = {
    "llama": Family("llama", _LLAMA, permuted=True),
    "mistral": Family("llama", _LLAMA, permuted=True),
    "qwen2": Family("qwen2", _LLAMA),
    "qwen3": Family("qwen3", _LLAMA | _HEAD_NORMS),
    "gemma": Family("gemma", _LLAMA, norm_offset=1.0),
    "gemma2": Family("gemma2", _LLAMA | _BRANCH_NORMS, norm_offset=1.0, windowed=True, period=2),
    "gemma3_text": Family("gemma3", _LLAMA | _BRANCH_NORMS | _HEAD_NORMS, norm_offset=1.0, windowed=True, period=6),
    "phi3": Family("phi3", _LLAMA | _FUSED),
    "gpt2": Family("gpt2", _GPT2, conv1d=True),
}

# GGUF key after the architecture's name, its type, the config's attribute
KEYS = (
    ("vocab_size", "u32", "vocab_size"),
    ("context_length", "u32", "max_position_embeddings"),
    ("embedding_length", "u32", "hidden_size"),
    ("block_count", "u32", "num_hidden_layers"),
    ("feed_forward_length", "u32", "intermediate_size"),
    ("attention.head_count", "u32", "num_attention_heads"),
    ("attention.head_count_kv", "u32", "num_key_value_heads"),
    ("attention.layer_norm_rms_epsilon", "f32", "rms_norm_eps"),
    ("attention.layer_norm_epsilon", "f32", "layer_norm_epsilon"),
    ("attention.key_length", "u32", "head_dim"),
    ("attention.value_length", "u32", "head_dim"),
    ("attn_logit_softcapping", "f32", "attn_logit_softcapping"),
    ("final_logit_softcapping", "f32", "final_logit_softcapping"),
)


def find_family(config: Any) -> Family:
    """Raises InputError for a model_type that cannot be written, or a variant that llama.cpp computes otherwise."""
    kind = config.model_type
    if kind not in FAMILIES:
        raise InputError(f"GGUF export knows {', '.join(FAMILIES)}, not model_type {kind!r}.")
    family = FAMILIES[kind]
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is not None and scalar != config.head_dim:
        raise InputError(f"llama.cpp scales {kind}'s queries by head_dim ({config.head_dim}), this model by {scalar}.")
    if family.period:
        expected = ["full" if (i + 1) % family.period == 0 else "sliding" for i in range(config.num_hidden_layers)]
        if [t.removesuffix("_attention") for t in config.layer_types] != expected:
            raise InputError(f"llama.cpp expects every {family.period}th layer of {kind} to attend to everything.")
    if getattr(config, "use_sliding_window", False):
        raise InputError(f"llama.cpp has no sliding window for {kind}; set use_sliding_window to false to export.")
    return family


def gguf_name(family: Family, name: str) -> str | None:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight; None for a tensor that llama.cpp does not store."""
    module, _, kind = name.rpartition(".")
    number = re.search(r"\.(\d+)\.", module)
    template = module if number is None else module[: number.start()] + ".#." + module[number.end() :]
    if template not in family.names or kind not in ("weight", "bias"):
        return None
    index = number[1] if number is not None else ""
    return f"{family.names[template].replace('#', index)}.{kind}"


def hugging_face_name(family: Family, name: str) -> str | None:
    """The inverse of `gguf_name`."""
    module, _, kind = name.rpartition(".")
    number = re.match(r"blk\.(\d+)\.", module)
    template = module if number is None else "blk.#." + module[number.end() :]
    back = {theirs: ours for ours, theirs in family.names.items()}
    if template not in back:
        return None
    return f"{back[template].replace('#', number[1] if number is not None else '')}.{kind}"


def permute_heads(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k, any further dimensions: each head's (first half, second half) become neighbouring pairs."""
    by_half = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return by_half.transpose(1, 2).reshape(rows.shape)


def unpermute_heads(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `permute_heads`."""
    by_pair = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return by_pair.transpose(1, 2).reshape(rows.shape)


def permuted_heads(family: Family, name: str, config: Any) -> int:
    """How many heads the rows of GGUF tensor `name` are permuted in; 0: they are not."""
    part = name.split(".")[-2]
    if not family.permuted or part not in ("attn_q", "attn_k"):
        return 0
    heads: int = config.num_attention_heads
    return heads if part == "attn_q" else int(getattr(config, "num_key_value_heads", None) or heads)


def hyperparameters(config: Any, family: Family) -> dict[str, Typed]:
    """The keys that describe the architecture."""
    values = {key: getattr(config, attribute, None) for key, _, attribute in KEYS}
    if family.architecture == "gpt2":
        values["feed_forward_length"] = getattr(config, "n_inner", None) or 4 * config.hidden_size
    window = getattr(config, "sliding_window", None)
    if window and family.windowed:
        values["attention.sliding_window"] = window
    elif window:
        values["context_length"] = min(config.max_position_embeddings, window)
    types = {key: kind for key, kind, _ in KEYS} | {"attention.sliding_window": "u32"}
    found: dict[str, Typed] = {k: (types[k], v) for k, v in values.items() if v is not None}
    if family.architecture != "gpt2":
        found |= _rope(config)
    prefix = family.architecture
    return {"general.architecture": ("str", prefix)} | {f"{prefix}.{k}": v for k, v in found.items()}


def _rope(config: Any) -> dict[str, Typed]:
    rope = config.rope_parameters
    main, local = rope.get("full_attention", rope), rope.get("sliding_attention")
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found: dict[str, Typed] = {
        "rope.dimension_count": ("u32", int(width * main.get("partial_rotary_factor", 1.0))),
        "rope.freq_base": ("f32", main["rope_theta"]),
    }
    if local is not None and local.get("rope_type", "default") != "default":
        raise InputError(f"GGUF export does not know rope_type {local['rope_type']!r} for sliding layers.")
    if local is not None:
        found["rope.freq_base_swa"] = ("f32", local["rope_theta"])
    kind = main.get("rope_type", "default")
    if kind == "linear":
        found |= {"rope.scaling.type": ("str", "linear"), "rope.scaling.factor": ("f32", main["factor"])}
    elif kind not in ("default", "llama3"):
        raise InputError(f"GGUF export knows the rope_types default, linear and llama3, not {kind!r}.")
    return found


def rope_divisors(config: Any, inv_freq: Tensor) -> Tensor | None:
    """rope_freqs.weight (rotary / 2,) float32 for Llama 3's scaling, from the frequencies the model computes with."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return None
    plain: Tensor = rope["rope_theta"] ** -(torch.arange(len(inv_freq), dtype=torch.float64) / len(inv_freq))
    return (plain / inv_freq.double()).float()


# Which type each tensor gets

_FILE_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12,
    "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "bf16": 32,
}  # fmt: skip
_PLAIN_K = {"q3_k": "q3_k_s", "q4_k": "q4_k_s", "q5_k": "q5_k_s"}
# A width that 256 does not divide takes the 32-wide type of at least as many bits.
_NARROW = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


def file_type(mixture: str) -> int:
    """general.file_type: a label for people; loaders go by each tensor's type."""
    return _FILE_TYPES[_PLAIN_K.get(mixture, mixture)]


MIXTURES = (*dict.fromkeys([*_FILE_TYPES, *_PLAIN_K]),)


def choose_type(mixture: str, name: str, shape: tuple[int, ...], config: Any) -> GgmlType:
    """The type of GGUF tensor `name` under a mixture such as q4_k_m (llama.cpp's rules) or a plain type such as q4_k.

    Vectors stay float32; a matrix too narrow for its type gets a 32-wide one, or float16.
    """
    if len(shape) < 2 or name.startswith("position_embd"):
        return find_type("f32")
    base = mixture[:4] if re.fullmatch(r"q\d_k_[sml]", mixture) else mixture
    part, tied = name.split(".")[-2], bool(getattr(config, "tie_word_embeddings", False))
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        chosen = "q6_k" if base not in ("f32", "f16", "bf16", "q8_0") else base
    elif name.startswith("blk."):
        chosen = _sprinkled(mixture, part, int(name.split(".")[1]), config) or base
    else:
        chosen = base
    width = shape[-1]
    if chosen in _NARROW and width % 256:
        chosen = _NARROW[chosen]
    return F16 if chosen.startswith("q") and width % 32 else find_type(chosen)


def _sprinkled(mixture: str, part: str, layer: int, config: Any) -> str | None:
    """The better type that llama.cpp's mixtures give to some tensors."""
    layers = config.num_hidden_layers
    more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    heads = config.num_attention_heads
    few_keys = heads // (getattr(config, "num_key_value_heads", None) or heads) >= 4
    rules: dict[str, dict[str, str | None]] = {
        "q2_k": {"attn_v": "q4_k" if few_keys else "q3_k", "ffn_down": "q3_k", "attn_output": "q3_k"},
        "q3_k_m": {
            "attn_v": "q5_k" if layer < 2 else "q4_k",
            "ffn_down": "q5_k" if layer < layers // 16 else "q4_k",
            "attn_output": "q4_k",
            "attn_qkv": "q4_k",
        },
        "q3_k_l": {"attn_v": "q5_k", "ffn_down": "q5_k", "attn_output": "q5_k", "attn_qkv": "q4_k"},
        "q4_k_s": {"attn_v": "q5_k" if layer < 4 else None, "ffn_down": "q5_k" if layer < layers // 8 else None},
        "q4_k_m": {"attn_v": "q6_k" if more else None, "ffn_down": "q6_k" if more else None, "attn_qkv": "q5_k"},
        "q5_k_m": {"attn_v": "q6_k" if more else None, "ffn_down": "q6_k" if more else None, "attn_qkv": "q6_k"},
    }
    return rules.get(mixture, {}).get(part)
