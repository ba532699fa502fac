"""A Hugging Face decoder, built once into the native core and then one call per token.

The Llama family and its relatives differ in a handful of facts: where a norm stands, whether it is stored as 1 + w,
whether heads are normalized before rotation, which activation, which layers see only a window. `describe` reads those
facts from the config; the weights come by name through two functions, so that any checkpoint, quantized or not, can
feed it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.kernels import pack
from lowbit.kernels.pack import PackedWeight

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3")
KV_TYPES: Mapping[str, int] = {"fp16": 0, "bf16": 1, "int8": 2, "fp8": 3, "int4": 4}
_ACTIVATIONS = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1, "gelu_new": 1, "gelu_fast": 1}


@dataclass(frozen=True)
class Family:
    """What sets one architecture apart from Llama."""

    norm_offset: float = 0.0  # Gemma stores norm weights as w - 1
    embed_scale: float = 1.0
    branch_norms: bool = False  # Gemma 2 and 3: norms on both sides of attention and MLP
    head_norms: bool = False  # Qwen3, Gemma 3: RMSNorm of each query and key head
    fused: bool = False  # Phi-3: qkv_proj and gate_up_proj


def family_of(config: Any) -> Family:
    """The facts of `config.model_type`; ValueError for one the native decoder does not know."""
    kind = config.model_type
    if kind not in FAMILIES:
        raise ValueError(f"the native decoder knows {', '.join(FAMILIES)}, not {kind!r}; it runs through transformers")
    gemma = kind.startswith("gemma")
    return Family(
        norm_offset=1.0 if gemma else 0.0,
        # The scale is rounded to the model's dtype, as transformers does.
        embed_scale=float(torch.tensor(config.hidden_size**0.5, dtype=_dtype(config))) if gemma else 1.0,
        branch_norms=kind in ("gemma2", "gemma3_text"),
        head_norms=kind in ("qwen3", "gemma3_text"),
        fused=kind == "phi3",
    )


def _dtype(config: Any) -> torch.dtype:
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def rope_tables(config: Any, positions: int, layer_type: str | None) -> tuple[Tensor, Tensor]:
    """cos and sin, (positions, rotary / 2) float32, from the architecture's own rotary embedding."""
    module = importlib.import_module(f"transformers.models.{config.model_type.removesuffix('_text')}"
                                     f".modeling_{config.model_type.removesuffix('_text')}")  # fmt: skip
    name = next(n for n in vars(module) if n.endswith("RotaryEmbedding"))
    rope = getattr(module, name)(config)
    x = torch.zeros(1, 1, 1)
    ids = torch.arange(positions)[None]
    cos, sin = rope(x, ids, layer_type) if "gemma3" in config.model_type else rope(x, ids)
    half = cos.shape[-1] // 2
    return cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous()


class Decoder:
    """The native core with its tensors, its paged cache, and a plain way to call it.

    Args:
        config: a Hugging Face config of one of `FAMILIES`.
        weight: module path ("model.layers.0.self_attn.q_proj") -> packed weight, bias included.
        tensor: tensor name ("model.norm.weight") -> tensor.
        kv: cache type, one of `KV_TYPES`. kv_tokens: cache size. kv_scales: of each layer what keys and values are
            divided by, [1], (kv_heads,) or (kv_heads, dim) each; without them integers find scales for every token, and
            fp8 holds values as they are. act_group: columns per int8 activation scale
            (0: per token, -1: float activations). embedding_scale: float32 (vocabulary,) where the embedding comes as
            bytes (code + 128).
    """

    def __init__(
        self,
        config: Any,
        weight: Callable[[str], PackedWeight],
        tensor: Callable[[str], Tensor],
        *,
        kv: str = "fp16",
        kv_tokens: int = 4096,
        kv_scales: Sequence[tuple[Tensor, Tensor]] = (),
        kv_block: int = 32,
        max_tokens: int = 512,
        max_position: int | None = None,
        act_group: int = 32,
        embedding_scale: Tensor | None = None,
        isa: str | None = None,
    ) -> None:
        if pack.native is None:
            raise RuntimeError(
                "lowbit was installed without its compiled kernels; install a C++ compiler and reinstall"
            )
        native, family = pack.native, family_of(config)
        self.config = config
        self._keep: list[Any] = []  # whatever the core points into
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.max_position = max_position or min(config.max_position_embeddings, kv_tokens)
        self.max_tokens, self.kv_block, self.vocab = max_tokens, kv_block, config.vocab_size
        self.kv_blocks = -(-kv_tokens // kv_block)
        c = native.Config()
        c.hidden, c.inner, c.heads, c.kv_heads = config.hidden_size, config.intermediate_size, heads, kv_heads
        c.head_dim, c.vocab, c.max_tokens, c.max_position = dim, config.vocab_size, max_tokens, self.max_position
        activation = getattr(config, "hidden_activation", None) or config.hidden_act
        if activation not in _ACTIVATIONS:
            raise ValueError(f"the native decoder has no activation {activation!r}")
        c.activation, c.act_group, c.eps = _ACTIVATIONS[activation], act_group, config.rms_norm_eps
        c.embed_scale = family.embed_scale
        c.attn_scale = (getattr(config, "query_pre_attn_scalar", None) or dim) ** -0.5
        c.attn_softcap = getattr(config, "attn_logit_softcapping", None) or 0.0
        c.logit_softcap = getattr(config, "final_logit_softcapping", None) or 0.0
        c.kv_type, c.kv_block, c.kv_blocks, c.kv_fixed = KV_TYPES[kv], kv_block, self.kv_blocks, bool(kv_scales)

        def norm(name: str) -> int:
            return self._hold(tensor(name).float() + family.norm_offset)

        def linear(name: str) -> Any:
            w = weight(name)
            self._keep.append(w)
            return w.handle()

        embedding = tensor("model.embed_tokens.weight")
        if embedding_scale is not None:
            c.embedding_scale = self._hold(embedding_scale.float())
        elif embedding.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            embedding = embedding.float()
        c.embedding = self._hold(embedding)
        c.embedding_type = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}[embedding.dtype]
        c.final_norm, c.head = norm("model.norm.weight"), linear("lm_head")
        types = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
        window = getattr(config, "sliding_window", None) or 0
        if config.model_type.startswith("qwen") and not getattr(config, "use_sliding_window", False):
            window = 0
        ropes = {t: rope_tables(config, self.max_position, t) for t in dict.fromkeys(types)}
        c.rotary = 2 * next(iter(ropes.values()))[0].shape[1]
        self.kv_bytes = native.kv_block_bytes(c.kv_type, kv_heads, dim, kv_block) * self.kv_blocks
        layers = []
        for i, kind in enumerate(types):
            at, layer = f"model.layers.{i}.", native.Layer()
            attn, mlp = at + "self_attn.", at + "mlp."
            layer.qkv = [linear(attn + n) for n in (("qkv_proj",) if family.fused else ("q_proj", "k_proj", "v_proj"))]
            layer.gate_up = [linear(mlp + n) for n in (("gate_up_proj",) if family.fused else ("gate_proj", "up_proj"))]
            layer.o, layer.down = linear(attn + "o_proj"), linear(mlp + "down_proj")
            layer.attn_norm = norm(at + "input_layernorm.weight")
            if family.branch_norms:
                layer.post_attn_norm = norm(at + "post_attention_layernorm.weight")
                layer.mlp_norm = norm(at + "pre_feedforward_layernorm.weight")
                layer.post_mlp_norm = norm(at + "post_feedforward_layernorm.weight")
            else:
                layer.mlp_norm = norm(at + "post_attention_layernorm.weight")
            if family.head_norms:
                layer.q_norm, layer.k_norm = norm(attn + "q_norm.weight"), norm(attn + "k_norm.weight")
            layer.rope_cos, layer.rope_sin = (self._hold(t) for t in ropes[kind])
            layer.window = window if kind in (None, "sliding_attention") else 0
            cache = torch.empty(self.kv_bytes, dtype=torch.uint8)
            native.advise_huge(cache.data_ptr(), cache.numel())
            layer.kv = self._hold(cache)
            if kv_scales:
                spread = [s.float().view(-1, 1) if s.dim() < 2 else s.float() for s in kv_scales[i]]
                layer.k_scale, layer.v_scale = (self._hold(s.expand(kv_heads, dim)) for s in spread)
            layers.append(layer)
        c.layers = layers
        self._core = native.Decoder(c, isa)

    def _hold(self, t: Tensor) -> int:
        t = t.contiguous()
        self._keep.append(t)
        return t.data_ptr()

    @property
    def weight_bytes(self) -> int:
        """Bytes of packed weights that one token reads (the embedding's one row is left out)."""
        return sum(w.nbytes for w in self._keep if isinstance(w, PackedWeight))

    def forward(
        self,
        tokens: Tensor,
        sequences: Sequence[tuple[int, int, bool]],
        tables: Tensor,
        *,
        every: bool = False,
        logits: bool = True,
    ) -> tuple[Tensor | None, Tensor]:
        """Run the new tokens of some sequences.

        Args:
            tokens: int32 (n,), the sequences' new tokens one after the other.
            sequences: (number of new tokens, position of the first, decoding) of each.
            tables: int32 (sequences, blocks), cache blocks of each sequence.
            every: logits of all tokens, not only each sequence's last.

        Returns:
            logits float32 (rows, vocab) or None, and the argmax int32 (rows,).
        """
        rows, start = [], 0
        for length, pos, decode in sequences:
            rows.append((start, length, pos, int(decode)))
            start += length
        seqs = torch.tensor(rows, dtype=torch.int32)
        tokens, tables = tokens.to(torch.int32).contiguous(), tables.to(torch.int32).contiguous()
        n_rows = len(tokens) if every else len(rows)
        out = torch.empty(n_rows, self.vocab) if logits else None
        best = torch.empty(n_rows, dtype=torch.int32)
        if start != len(tokens) or len(tables) != len(rows):
            raise ValueError("sequences must cover the tokens, and every sequence needs a row of the table")
        self._core.forward(
            tokens.data_ptr(), len(tokens), seqs.data_ptr(), len(rows), tables.data_ptr(), tables.shape[1], every,
            0 if out is None else out.data_ptr(), best.data_ptr(),
        )  # fmt: skip
        return out, best

    def linear_table(self, sequences: int = 1) -> Tensor:
        """Block tables that give each of `sequences` an equal contiguous share of the cache."""
        share = self.kv_blocks // sequences
        return torch.arange(share * sequences, dtype=torch.int32).view(sequences, share)
