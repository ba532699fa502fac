"""BERT and RoBERTa as an ONNX graph.

input_ids, attention_mask (batch, sequence), token_type_ids where the model has them, int64  ->  the model's output:
logits of a model with a head, else last_hidden_state (and pooler_output)
"""

from typing import Any

import torch

from lowbit.errors import InputError
from lowbit.exporting.onnx_graph import Graph
from lowbit.exporting.onnx_layers import Build, activation, check_activation, layer_norm, linear, lookup

FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert")


def check_encoder(where: str, net: Any) -> None:
    """Raises InputError for what the graph cannot express."""
    check_activation(where, net.config.hidden_act)
    if getattr(net.config, "is_decoder", False):
        raise InputError(f"{where}: is_decoder is set; as ONNX, {net.config.model_type} is written as an encoder.")
    if not any(_has(net, name) for name in ("classifier", "qa_outputs", "cls.predictions", "lm_head", "embeddings")):
        raise InputError(f"{where}: the head of {type(net).__name__} cannot be written as ONNX.")
    if _has(net, "cls.seq_relationship"):
        raise InputError(f"{where}: {type(net).__name__} has two heads; save it as BertModel or BertForMaskedLM.")


def _has(net: Any, path: str) -> bool:
    for word in path.split("."):
        net = getattr(net, word, None)
    return net is not None


def encoder(build: Build) -> None:
    """Put the whole model into build.graph."""
    graph, net = build.graph, build.net
    base = f"{net.base_model_prefix}." if _has(net, net.base_model_prefix) else ""
    ids = graph.input("input_ids", torch.int64, ("batch", "sequence"))
    seen = graph.input("attention_mask", torch.int64, ("batch", "sequence"))
    x = _embeddings(build, f"{base}embeddings", ids)
    length = graph.op("Shape", ids, start=1)
    shape = graph.op("Concat", graph.ints(1, 1), length, graph.ints(1), axis=0)
    mask = graph.op("Expand", graph.op("Unsqueeze", graph.cast(seen, torch.bool), graph.ints(1, 2)), shape)
    for i in range(net.config.num_hidden_layers):
        x = _block(build, x, f"{base}encoder.layer.{i}", mask)
    _head(build, x, base)


def _embeddings(build: Build, at: str, ids: str) -> str:
    graph, config = build.graph, build.net.config
    length = graph.op("Squeeze", graph.op("Shape", ids, start=1, end=2))
    if config.model_type == "bert":
        one, zero = (graph.op("Squeeze", graph.ints(v)) for v in (1, 0))
        positions = graph.op("Unsqueeze", graph.op("Range", zero, length, one), graph.ints(0))
    else:  # RoBERTa counts real tokens from the padding's own position on
        padding = graph.ints(config.pad_token_id)
        real = graph.cast(graph.op("Not", graph.op("Equal", ids, padding)), torch.int32)
        counted = graph.op("CumSum", real, graph.op("Squeeze", graph.ints(1)))
        positions = graph.op("Add", graph.cast(graph.op("Mul", counted, real), torch.int64), padding)
    x = graph.op(
        "Add", lookup(build, ids, f"{at}.word_embeddings"), lookup(build, positions, f"{at}.position_embeddings")
    )
    kinds = graph.input("token_type_ids", torch.int64, ("batch", "sequence"))
    x = graph.op("Add", x, lookup(build, kinds, f"{at}.token_type_embeddings"))
    return layer_norm(build, x, f"{at}.LayerNorm")


def _block(build: Build, x: str, at: str, mask: str) -> str:
    graph, config = build.graph, build.net.config
    heads = config.num_attention_heads
    q, k, v = (linear(build, x, f"{at}.attention.self.{n}") for n in ("query", "key", "value"))
    attended = graph.op("Attention", q, k, v, mask, q_num_heads=heads, kv_num_heads=heads)
    attended = linear(build, attended, f"{at}.attention.output.dense")
    x = layer_norm(build, graph.op("Add", attended, x), f"{at}.attention.output.LayerNorm")
    inner = activation(graph, linear(build, x, f"{at}.intermediate.dense"), config.hidden_act)
    inner = linear(build, inner, f"{at}.output.dense")
    return layer_norm(build, graph.op("Add", inner, x), f"{at}.output.LayerNorm")


def _head(build: Build, x: str, base: str) -> None:
    graph, net = build.graph, build.net
    if _has(net, "cls.predictions"):
        logits = _language(build, x, "cls.predictions", ("transform.dense", "transform.LayerNorm"))
    elif _has(net, "lm_head"):
        logits = _language(build, x, "lm_head", ("dense", "layer_norm"))
    elif _has(net, "classifier.out_proj"):  # RoBERTa's
        inner = graph.op("Tanh", linear(build, _first(graph, x), "classifier.dense"))
        logits = linear(build, inner, "classifier.out_proj")
    elif _has(net, "qa_outputs"):
        logits = linear(build, x, "qa_outputs")
    elif _has(net, "classifier"):
        pooled = _has(net, f"{base}pooler")
        logits = linear(build, _pooled(build, x, base) if pooled else x, "classifier")
    else:
        width = net.config.hidden_size
        graph.output(x, "last_hidden_state", ("batch", "sequence", width))
        if _has(net, f"{base}pooler"):
            graph.output(_pooled(build, x, base), "pooler_output", ("batch", width))
        return
    tokens = not (_has(net, "classifier.out_proj") or (_has(net, "classifier") and _has(net, f"{base}pooler")))
    graph.output(logits, "logits", ("batch", "sequence", "labels") if tokens else ("batch", "labels"))


def _first(graph: Graph, x: str) -> str:
    return graph.op("Gather", x, graph.op("Squeeze", graph.ints(0)), axis=1)


def _pooled(build: Build, x: str, base: str) -> str:
    return build.graph.op("Tanh", linear(build, _first(build.graph, x), f"{base}pooler.dense"))


def _language(build: Build, x: str, at: str, names: tuple[str, str]) -> str:
    """The masked language model's head: a dense layer, a norm, the vocabulary."""
    dense, norm = (f"{at}.{n}" for n in names)
    activity = build.net.config.hidden_act if at == "cls.predictions" else "gelu"
    inner = activation(build.graph, linear(build, x, dense), activity)
    return linear(build, layer_norm(build, inner, norm), f"{at}.decoder")
