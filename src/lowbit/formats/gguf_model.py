"""A GGUF file seen as a Hugging Face checkpoint: config, tensor names and values, so that it can be evaluated.

Weights in Q4_0, Q5_0 and Q8_0 are lowbit's own symmetric grids in groups of 32 and are offered as `<linear>.qweight`
(codes, int8) and `<linear>.scales` (out, in / 32); all others are dequantized. Rows of q and k are put back into
transformers' order, Gemma's norms back to w - 1.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.formats import gguf_names as names
from lowbit.formats.gguf_file import GGUFFile
from lowbit.ggml import Q4_0, Q5_0, Q8_0, BlockTensor, FloatType
from lowbit.scheme import Scheme, TensorScheme
from lowbit.tensor import QuantizedTensor

_BITS = {Q4_0.name: 4, Q5_0.name: 5, Q8_0.name: 8}
_FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_MODEL_TYPES = {"llama": "llama", "gemma3": "gemma3_text"} | {
    k: k for k in ("qwen2", "qwen3", "gemma", "gemma2", "phi3")
}


@dataclass(frozen=True)
class GGUFModel:
    """`config`: what config.json would say. `places`: offered name -> name in the file, dtype, shape, bytes."""

    file: GGUFFile
    config: dict[str, Any]
    places: dict[str, tuple[str, str, tuple[int, ...], int]] = field(repr=False)
    bits: dict[str, int] = field(repr=False)  # of the linears that are offered as codes

    @property
    def plain(self) -> bool:
        """Whether all weights are in full precision."""
        return all(isinstance(entry.type, FloatType) for entry in self.file.tensors.values())

    def get(self, name: str) -> Tensor:
        """An offered tensor; floats in float32."""
        there = self.places[name][0]
        tensor = self.file.get(there)
        if name.endswith((".qweight", ".scales")) and isinstance(tensor, BlockTensor):
            return self._ordered(there, tensor.codes.to(torch.int8) if name.endswith(".qweight") else tensor.d)
        value = self._ordered(there, self.file.values(there))
        family = names.FAMILIES[self.config["model_type"]]
        return value - family.norm_offset if family.norm_offset and "norm" in there.split(".")[-2] else value

    def _ordered(self, there: str, rows: Tensor) -> Tensor:
        family = names.FAMILIES[self.config["model_type"]]
        part = there.split(".")[-2]
        if not family.permuted or part not in ("attn_q", "attn_k"):
            return rows
        return names.unpermute_heads(
            rows, self.config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
        )


def open_model(file: GGUFFile) -> GGUFModel:
    """Raises InputError for an architecture or a feature that lowbit cannot bring back to transformers' terms."""
    config = _config(file)
    family = names.FAMILIES[config["model_type"]]
    places: dict[str, tuple[str, str, tuple[int, ...], int]] = {}
    bits: dict[str, int] = {}
    for there, entry in file.tensors.items():
        if there == "rope_freqs.weight":
            continue
        name = names.hugging_face_name(family, there)
        if name is None:
            raise InputError(f"{file.path}: tensor {there!r} has no place in a {config['model_type']} model.")
        kind, shape, size = entry.type, entry.shape, entry.nbytes
        linear = name.removesuffix(".weight")
        if kind.name in _BITS and len(shape) == 2 and there != "token_embd.weight":
            bits[linear] = _BITS[kind.name]
            codes = size - shape[0] * shape[1] // 16
            places[f"{linear}.qweight"] = (there, "I8", shape, codes)
            places[f"{linear}.scales"] = (there, "F16", (shape[0], shape[1] // 32), size - codes)
        else:
            places[name] = (there, _FLOATS[kind.dtype] if isinstance(kind, FloatType) else "F32", shape, size)
    return GGUFModel(file, config, places, bits)


def _config(file: GGUFFile) -> dict[str, Any]:
    """config.json's words from the file's hyperparameters."""
    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _MODEL_TYPES:
        raise InputError(f"{file.path}: architecture {architecture!r}; lowbit reads {', '.join(_MODEL_TYPES)}.")

    def word(key: str) -> Any:
        return metadata.get(f"{architecture}.{key}")

    config = {attribute: word(key) for key, _, attribute in names.KEYS if word(key) is not None}
    vocabulary = file.tensors.get("token_embd.weight")
    required = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "rms_norm_eps")
    missing = [k for k in required if not isinstance(config.get(k), int | float) or not config[k] > 0]
    if missing or vocabulary is None or len(vocabulary.shape) != 2:
        raise InputError(
            f"{file.path}: the metadata does not say {missing or 'the vocabulary'}; the file is incomplete."
        )
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    config |= {
        "model_type": _MODEL_TYPES[architecture],
        "vocab_size": vocabulary.shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "rope_parameters": _rope(file, architecture),
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{ours}_token_id"] = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
    if word("attention.sliding_window"):
        config["sliding_window"] = word("attention.sliding_window")
    if names.FAMILIES[config["model_type"]].period:
        config["query_pre_attn_scalar"] = config["head_dim"]
    return config


def _rope(file: GGUFFile, architecture: str) -> dict[str, Any]:
    theta = float(file.metadata.get(f"{architecture}.rope.freq_base", 10000.0))
    plain = {"rope_type": "default", "rope_theta": theta}
    width = file.metadata.get(f"{architecture}.attention.key_length")
    rotated = file.metadata.get(f"{architecture}.rope.dimension_count")
    if isinstance(width, int) and isinstance(rotated, int) and rotated < width:
        raise InputError(f"{file.path}: only {rotated} of {width} values a head are rotated; lowbit cannot read that.")
    scaling = file.metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling == "linear":
        plain |= {"rope_type": "linear", "factor": file.metadata.get(f"{architecture}.rope.scaling.factor")}
    elif scaling != "none":
        raise InputError(f"{file.path}: rope scaling {scaling!r} cannot be read; lowbit reads linear and Llama 3's.")
    if "rope_freqs.weight" in file.tensors:
        return _llama3(file, theta)
    if architecture != "gemma3":
        return plain
    local = float(file.metadata.get(f"{architecture}.rope.freq_base_swa", 10000.0))
    return {"full_attention": plain, "sliding_attention": {"rope_type": "default", "rope_theta": local}}


def _llama3(file: GGUFFile, theta: float) -> dict[str, Any]:
    """Llama 3's scaling from its divisors: the parameters are not in the file, so the usual ones must explain them."""
    divisors = file.values("rope_freqs.weight").double()
    factor = float(divisors.max())
    words = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": 1.0,
             "high_freq_factor": 4.0}  # fmt: skip
    wavelength = 2 * math.pi * theta ** (torch.arange(len(divisors)).double() / len(divisors))
    for context in (8192, 4096, 2048, 1024):
        smooth = ((context / wavelength - 1) / 3).clamp(0, 1)
        if torch.allclose(1 / ((1 - smooth) / factor + smooth), divisors, rtol=1e-4):
            return words | {"original_max_position_embeddings": context}
    raise InputError(f"{file.path}: rope_freqs.weight is not Llama 3's frequency scaling; it cannot be read back.")


def read_schemes(
    config: Mapping[str, Any], linears: Iterable[str], stored: Iterable[str], _get: Any
) -> dict[str, Scheme]:
    """The scheme of each linear offered as codes."""
    names_stored = set(stored)
    return {
        n: Scheme(TensorScheme("int", config["bits"][n], "group", 32))
        for n in linears
        if f"{n}.qweight" in names_stored
    }


def unpack(name: str, get: Any, scheme: Scheme, _config: Mapping[str, Any]) -> QuantizedTensor:
    assert scheme.weight is not None
    return QuantizedTensor(get(f"{name}.qweight"), get(f"{name}.scales"), None, scheme.weight)
