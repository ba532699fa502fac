"""The layers that every exported graph is made of: products, lookups, norms, activations.

A linear whose codes ONNX Runtime can multiply by becomes such a product under its own name; all others are stored in
the type they have, bfloat16 included, and cast to float32 where they are used (which ONNX Runtime does once, at load).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import InputError
from lowbit.exporting.onnx_graph import MICROSOFT, Graph
from lowbit.formats import onnx as onnx_format
from lowbit.model.load import Source
from lowbit.numerics import choose_qparams, quantize
from lowbit.scheme import Scheme
from lowbit.tensor import QuantizedTensor

INT8 = Scheme.parse("w8a8")
_GELU = {"gelu": "none", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "gelu_fast": "tanh"}
ACTIVATIONS = ("silu", "swish", "relu", "tanh", *_GELU)


@dataclass
class Build:
    """A graph in the making. With `int8`, every matrix that is not quantized is rounded to the nearest w8a8 grid."""

    graph: Graph
    net: Any
    source: Source
    int8: bool = False
    _rounded: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)

    def stored(self, module: str) -> str:
        """The module whose weight this one shares, else itself."""
        tied = self.net.all_tied_weights_keys.get(f"{module}.weight", f"{module}.weight")
        return module if module in self.source.schemes else tied.removesuffix(".weight")

    def quantized(self, module: str) -> QuantizedTensor | None:
        found = self.source.linear(module)
        if found is not None or not self.int8:
            return found
        weight, scheme = self.tensor(f"{module}.weight").float(), INT8.weight
        assert scheme is not None
        scale, _ = choose_qparams(weight, scheme, torch.float32)
        return QuantizedTensor(quantize(weight, scale, None, scheme), scale, None, scheme)

    def tensor(self, name: str) -> Tensor:
        return self.source.checkpoint.get(self.net.all_tied_weights_keys.get(name, name))


def linear(build: Build, x: str, module: str) -> str:
    """x (..., in) -> (..., out), bias included."""
    graph, stored = build.graph, build.stored(module)
    quantized = build.quantized(stored)
    scheme = build.source.schemes.get(stored, INT8)
    if quantized is None:
        y = graph.op("MatMul", x, _matrix(build, stored))
    elif onnx_format.is_integer_product(scheme):
        y = _integer_product(build, x, module, stored, quantized, scheme)
    else:
        y = _n_bits(build, x, module, stored, quantized, scheme)
    layer = build.net.get_submodule(module)
    if getattr(layer, "bias", None) is None:
        return y
    return graph.op("Add", y, floats(build, f"{module}.bias"))


def _matrix(build: Build, stored: str) -> str:
    """The float32 weight (in, out)."""
    graph, name = build.graph, f"{stored}.weight"
    weight, shared = build.tensor(name), build.graph.has(name)  # a lookup has it as (out, in)
    value = name if shared else graph.weight(name, weight.T)
    if weight.dtype != torch.float32:
        value = graph.cast(value, torch.float32)
    return graph.op("Transpose", value, perm=[1, 0]) if shared else value


def _n_bits(build: Build, x: str, module: str, stored: str, quantized: QuantizedTensor, scheme: Scheme) -> str:
    graph, (out, width) = build.graph, quantized.shape
    packed = onnx_format.pack(quantized)
    operands = [graph.weight(f"{stored}.codes", packed.codes), graph.weight(f"{stored}.scales", packed.scales)]
    if packed.zeros is not None:
        operands.append(graph.weight(f"{stored}.zeros", packed.zeros))
    words = {"K": width, "N": out, "bits": packed.bits, "block_size": packed.block}
    if scheme.activation is not None:
        words["accuracy_level"] = 4
    return graph.op("MatMulNBits", x, *operands, name=module, domain=MICROSOFT, **words)


def _integer_product(build: Build, x: str, module: str, stored: str, quantized: QuantizedTensor, scheme: Scheme) -> str:
    graph, rows = build.graph, f"{stored}.rows_codes"
    codes, scale = _rounded_input(build, x, stored, scheme)
    if graph.has(rows):  # shared with a lookup; ONNX Runtime computes it once
        above = graph.op("Add", graph.cast(rows, torch.float32), graph.number(float(onnx_format.UNSIGNED)))
        weight = graph.op("Transpose", graph.cast(above, torch.uint8), perm=[1, 0])
    else:
        weight = graph.weight(f"{stored}.codes", onnx_format.unsigned(quantized.codes.T))
    zero = _zero(graph)
    product = graph.cast(graph.op("MatMulInteger", codes, weight, zero, zero, name=module), torch.float32)
    step = quantized.step.expand(quantized.shape[0], 1)
    return graph.op("Mul", graph.op("Mul", product, scale), graph.weight(f"{stored}.scales", step.flatten()))


def _rounded_input(build: Build, x: str, stored: str, scheme: Scheme) -> tuple[str, str]:
    """x as uint8 codes and its scale: max|token| / 127, or the stored one. Linears that share x share this."""
    graph = build.graph
    if scheme.static:
        grid = build.source.input_grid(stored)
        assert grid is not None
        assert grid.scale is not None
        scale = graph.number(float(grid.scale))
        if (x, scale) not in build._rounded:
            build._rounded[x, scale] = graph.op("QuantizeLinear", x, scale, _zero(graph)), scale
        return build._rounded[x, scale]
    if (x, "") not in build._rounded:
        largest = graph.op("ReduceMax", graph.op("Abs", x), graph.ints(-1))
        empty = graph.op("Equal", largest, graph.number(0.0))
        scale = graph.op("Where", empty, graph.number(1.0), graph.op("Div", largest, graph.number(127.0)))
        codes = graph.op("Add", graph.op("Round", graph.op("Div", x, scale)), graph.number(float(onnx_format.UNSIGNED)))
        build._rounded[x, ""] = graph.cast(codes, torch.uint8), scale
    return build._rounded[x, ""]


def _zero(graph: Graph) -> str:
    """The zero point of both sides of an integer product."""
    return graph.weight("uint8_zero", torch.tensor(onnx_format.UNSIGNED, dtype=torch.uint8))


def lookup(build: Build, ids: str, module: str) -> str:
    """Rows of an embedding table, float32."""
    graph, quantized = build.graph, build.quantized(module)
    if quantized is None:
        name = f"{module}.weight"
        table = build.tensor(name)
        rows = graph.op("Gather", graph.weight(name, table), ids)
        return rows if table.dtype == torch.float32 else graph.cast(rows, torch.float32)
    groups = quantized.step.shape[1]
    codes = graph.op("Gather", graph.weight(f"{module}.rows_codes", quantized.codes), ids)
    rows = graph.op("Reshape", graph.cast(codes, torch.float32), graph.ints(0, 0, groups, -1))
    axis = graph.ints(-1)
    if quantized.zero_point is not None:
        zeros = graph.op("Gather", graph.weight(f"{module}.rows_zeros", quantized.zero_point), ids)
        rows = graph.op("Sub", rows, graph.op("Unsqueeze", graph.cast(zeros, torch.float32), axis))
    steps = graph.op("Gather", graph.weight(f"{module}.rows_scales", quantized.step), ids)
    return graph.op("Reshape", graph.op("Mul", rows, graph.op("Unsqueeze", steps, axis)), graph.ints(0, 0, -1))


def floats(build: Build, name: str, offset: float = 0.0) -> str:
    """A small tensor, as float32."""
    return build.graph.weight(name, build.tensor(name).float() + offset)


def rms_norm(build: Build, x: str, module: str, epsilon: float, offset: float) -> str:
    return build.graph.op("RMSNormalization", x, floats(build, f"{module}.weight", offset), axis=-1, epsilon=epsilon)


def layer_norm(build: Build, x: str, module: str) -> str:
    norm = build.net.get_submodule(module)
    assert isinstance(norm, nn.LayerNorm)
    weights = floats(build, f"{module}.weight"), floats(build, f"{module}.bias")
    return build.graph.op("LayerNormalization", x, *weights, axis=-1, epsilon=norm.eps)


def activation(graph: Graph, x: str, name: str) -> str:
    if name in ("silu", "swish"):
        return graph.op("Mul", x, graph.op("Sigmoid", x))
    if name in _GELU:
        return graph.op("Gelu", x, approximate=_GELU[name])
    return graph.op({"relu": "Relu", "tanh": "Tanh"}[name], x)


def check_activation(where: str, name: str) -> None:
    """Raises InputError for a function that `activation` does not know."""
    if name not in ACTIVATIONS:
        raise InputError(f"{where}: activation {name!r} cannot be written as ONNX; known are {', '.join(ACTIVATIONS)}.")
