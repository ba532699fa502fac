"""A decoder of the Llama family and its relatives as an ONNX graph that generates.

    input_ids, position_ids (batch, sequence), attention_mask (batch, past + sequence), int64
    past_key_values.N.key, .value (batch, heads, past, width)  ->  logits, present.N.key, .value

These are the names that Optimum, transformers.js and ONNX Runtime's own generators know. Attention, rotation and norms
are ONNX's standard operators of opset 23; the mask (causal, of a window, without padding) is made in the graph.
"""

from typing import Any

import torch

from lowbit.errors import InputError
from lowbit.exporting.onnx_graph import Graph
from lowbit.exporting.onnx_layers import Build, activation, check_activation, floats, linear, lookup, rms_norm
from lowbit.formats.onnx import CACHE
from lowbit.runtime.decoder import FAMILIES as FAMILIES  # the native decoder's: the same facts make this graph
from lowbit.runtime.decoder import Family, family_of

_MOVING = ("dynamic", "longrope")  # rotations whose frequencies follow the length of the text


def check_decoder(where: str, config: Any) -> None:
    """Raises InputError for what the graph cannot express."""
    check_activation(where, _activation(config))
    words = getattr(config, "rope_parameters", None) or {}
    for rope in [words, *(v for v in words.values() if isinstance(v, dict))]:
        if rope.get("rope_type") in _MOVING:
            raise InputError(
                f"{where}: rope_type {rope['rope_type']!r} changes with the length of the text, which the ONNX graph "
                "does not. Formats that can: gguf."
            )


def decoder(build: Build) -> None:
    """Put the whole model into build.graph."""
    graph, config = build.graph, build.net.config
    family = family_of(config)
    ids = graph.input("input_ids", torch.int64, ("batch", "sequence"))
    seen = graph.input("attention_mask", torch.int64, ("batch", "total"))
    positions = graph.input("position_ids", torch.int64, ("batch", "sequence"))
    types = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    ropes = {t: _rotation(build, positions, t) for t in dict.fromkeys(types)}
    masks = {w: _mask(graph, ids, seen, w) for w in dict.fromkeys(_window(config, t) for t in types)}
    x = lookup(build, ids, "model.embed_tokens")
    if family.embed_scale != 1.0:
        x = graph.op("Mul", x, graph.number(family.embed_scale))
    for i, kind in enumerate(types):
        x = _block(build, family, x, i, masks[_window(config, kind)], ropes[kind])
    x = rms_norm(build, x, "model.norm", config.rms_norm_eps, family.norm_offset)
    logits = linear(build, x, "lm_head")
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        logits = graph.op("Mul", graph.op("Tanh", graph.op("Div", logits, graph.number(cap))), graph.number(cap))
    graph.output(logits, "logits", ("batch", "sequence", config.vocab_size))


def _activation(config: Any) -> str:
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def _window(config: Any, kind: str | None) -> int:
    """How many tokens a layer sees; 0 for all."""
    if config.model_type.startswith("qwen") and not getattr(config, "use_sliding_window", False):
        return 0
    return (getattr(config, "sliding_window", None) or 0) if kind in (None, "sliding_attention") else 0


def _mask(graph: Graph, ids: str, seen: str, window: int) -> str:
    """bool (batch, 1, sequence, total): which keys a query sees."""
    first, last = graph.ints(0), graph.ints(1)
    total, new = graph.op("Shape", seen, start=1), graph.op("Shape", ids, start=1)

    def count(start: str, end: str) -> str:  # int64 (end - start,)
        ends = [graph.op("Squeeze", v) for v in (start, end, last)]
        return graph.op("Range", *ends)

    keys = count(first, total)
    queries = graph.op("Unsqueeze", count(graph.op("Sub", total, new), total), last)
    mask = graph.op("LessOrEqual", keys, queries)
    if window:
        mask = graph.op("And", mask, graph.op("Greater", keys, graph.op("Sub", queries, graph.ints(window))))
    real = graph.op("Unsqueeze", graph.cast(seen, torch.bool), graph.ints(1, 2))
    return graph.op("And", mask, real)


def _rotation(build: Build, positions: str, kind: str | None) -> tuple[str, str]:
    """cos and sin (batch, sequence, rotary / 2) of the positions, with the architecture's own frequencies."""
    graph, rotary = build.graph, build.net.model.rotary_emb
    prefix = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
    frequencies = graph.weight(f"{prefix}inv_freq", getattr(rotary, f"{prefix}inv_freq").float())
    scaling = float(getattr(rotary, f"{prefix}attention_scaling"))
    at = graph.op("Unsqueeze", graph.cast(positions, torch.float32), graph.ints(-1))
    angles = graph.op("Mul", at, frequencies)
    cos, sin = (graph.op(f, angles) for f in ("Cos", "Sin"))
    if scaling != 1.0:
        cos, sin = (graph.op("Mul", v, graph.number(scaling)) for v in (cos, sin))
    return cos, sin


def _block(build: Build, family: Family, x: str, index: int, mask: str, rope: tuple[str, str]) -> str:
    graph, config, at = build.graph, build.net.config, f"model.layers.{index}."

    def norm(value: str, name: str) -> str:
        return rms_norm(build, value, at + name, config.rms_norm_eps, family.norm_offset)

    attended = _attention(build, family, norm(x, "input_layernorm"), index, mask, rope)
    if family.branch_norms:
        x = graph.op("Add", x, norm(attended, "post_attention_layernorm"))
        return graph.op("Add", x, norm(_mlp(build, family, norm(x, "pre_feedforward_layernorm"), at),
                                       "post_feedforward_layernorm"))  # fmt: skip
    x = graph.op("Add", x, attended)
    return graph.op("Add", x, _mlp(build, family, norm(x, "post_attention_layernorm"), at))


def _mlp(build: Build, family: Family, x: str, at: str) -> str:
    graph = build.graph
    if family.fused:
        both = linear(build, x, f"{at}mlp.gate_up_proj")
        gate, up = graph.ops("Split", both, outputs=2, axis=-1, num_outputs=2)
    else:
        gate, up = (linear(build, x, f"{at}mlp.{n}_proj") for n in ("gate", "up"))
    inner = graph.op("Mul", activation(graph, gate, _activation(build.net.config)), up)
    return linear(build, inner, f"{at}mlp.down_proj")


def _attention(build: Build, family: Family, x: str, index: int, mask: str, rope: tuple[str, str]) -> str:
    graph, config, at = build.graph, build.net.config, f"model.layers.{index}.self_attn."
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    if family.fused:
        sizes = graph.ints(heads * width, kv_heads * width, kv_heads * width)
        q, k, v = graph.ops("Split", linear(build, x, f"{at}qkv_proj"), sizes, outputs=3, axis=-1)
    else:
        q, k, v = (linear(build, x, f"{at}{n}_proj") for n in "qkv")
    if family.head_norms:
        q, k = (_head_norm(build, family, value, f"{at}{n}_norm", n_heads, width)
                for value, n, n_heads in ((q, "q", heads), (k, "k", kv_heads)))  # fmt: skip
    turned = 2 * getattr(build.net.model.rotary_emb, _frequencies_of(build, index)).shape[-1]
    words = {} if turned == width else {"rotary_embedding_dim": turned}
    q = graph.op("RotaryEmbedding", q, *rope, num_heads=heads, **words)
    k = graph.op("RotaryEmbedding", k, *rope, num_heads=kv_heads, **words)
    past = [
        graph.input(f"{CACHE}.{index}.{n}", torch.float32, ("batch", kv_heads, "past", width)) for n in ("key", "value")
    ]
    y, *present = graph.ops(
        "Attention", q, k, v, mask, *past, outputs=3, q_num_heads=heads, kv_num_heads=kv_heads,
        scale=float((getattr(config, "query_pre_attn_scalar", None) or width) ** -0.5),
        softcap=float(getattr(config, "attn_logit_softcapping", None) or 0.0),
    )  # fmt: skip
    for value, n in zip(present, ("key", "value"), strict=True):
        graph.output(value, f"present.{index}.{n}", ("batch", kv_heads, "total", width))
    return linear(build, y, f"{at}o_proj")


def _frequencies_of(build: Build, index: int) -> str:
    types = getattr(build.net.config, "layer_types", None)
    name = f"{types[index]}_inv_freq" if types else ""
    return name if hasattr(build.net.model.rotary_emb, name) else "inv_freq"


def _head_norm(build: Build, family: Family, x: str, name: str, heads: int, width: int) -> str:
    graph = build.graph
    split = graph.op("Reshape", x, graph.ints(0, 0, heads, width))
    weight = floats(build, f"{name}.weight", family.norm_offset)
    normed = graph.op("RMSNormalization", split, weight, axis=-1, epsilon=build.net.config.rms_norm_eps)
    return graph.op("Reshape", normed, graph.ints(0, 0, -1))
