"""An ONNX graph as it is written: nodes in order, small constants inside, weights streamed to a file beside it.

A graph is one protobuf message, which may not exceed 2 GiB and is held in memory whole; weights therefore lie in
`model.onnx.data`, each at an offset that the graph names. Every value is float32 unless said otherwise.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from lowbit.formats.onnx import DATA, MODEL
from lowbit.runtime.onnx import require_onnx

MICROSOFT = "com.microsoft"
OPSET = 23  # RMSNormalization, RotaryEmbedding and Attention with a cache are standard from here on
_IR_VERSION = 11
_ALIGNMENT = 4096  # so that a runtime can map weights instead of reading them


class Graph:
    """A graph under construction, whose weights go to `data`."""

    def __init__(self, data: BinaryIO) -> None:
        self._onnx, _ = require_onnx()
        self._data = data
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._types = {
            torch.float32: self._onnx.TensorProto.FLOAT,
            torch.bfloat16: self._onnx.TensorProto.BFLOAT16,
            torch.float16: self._onnx.TensorProto.FLOAT16,
            torch.int64: self._onnx.TensorProto.INT64,
            torch.int32: self._onnx.TensorProto.INT32,
            torch.int8: self._onnx.TensorProto.INT8,
            torch.uint8: self._onnx.TensorProto.UINT8,
            torch.bool: self._onnx.TensorProto.BOOL,
        }

    def op(self, kind: str, *inputs: str, name: str | None = None, domain: str = "", **attributes: Any) -> str:
        """A node with one output; "" is an input left out."""
        return self.ops(kind, *inputs, name=name, domain=domain, **attributes)[0]

    def ops(
        self, kind: str, *inputs: str, outputs: int = 1, name: str | None = None, domain: str = "", **attributes: Any
    ) -> list[str]:
        """A node with several outputs."""
        label = name or f"{kind}_{len(self._nodes)}"
        made = [f"{label}:{i}" for i in range(outputs)]
        self._nodes.append(
            self._onnx.helper.make_node(kind, list(inputs), made, name=label, domain=domain, **attributes)
        )
        return made

    def cast(self, value: str, dtype: torch.dtype) -> str:
        return self.op("Cast", value, to=self._types[dtype])

    def input(self, name: str, dtype: torch.dtype, shape: Sequence[str | int]) -> str:
        self._inputs.append(self._onnx.helper.make_tensor_value_info(name, self._types[dtype], list(shape)))
        return name

    def output(self, value: str, name: str, shape: Sequence[str | int]) -> None:
        """Give a float32 value out under a name of its own; caches come last."""
        self._nodes.append(self._onnx.helper.make_node("Identity", [value], [name], name=name))
        self._outputs.append(self._onnx.helper.make_tensor_value_info(name, self._types[torch.float32], list(shape)))
        self._outputs.sort(key=lambda o: o.name.startswith("present."))

    def ints(self, *values: int) -> str:
        return self._constant(f"ints_{'_'.join(map(str, values))}", np.array(values, np.int64))

    def number(self, value: float) -> str:
        return self._constant(f"number_{value!r}", np.array(value, np.float32))

    def _constant(self, name: str, value: Any) -> str:
        if name not in self._initializers:
            self._initializers[name] = self._onnx.numpy_helper.from_array(value, name)
        return name

    def has(self, name: str) -> bool:
        return name in self._initializers

    def weight(self, name: str, tensor: Tensor) -> str:
        """A constant in the data file, in its own dtype; one that is there already is not written again."""
        if name in self._initializers:
            return name
        start = -(-self._data.tell() // _ALIGNMENT) * _ALIGNMENT
        self._data.write(b"\0" * (start - self._data.tell()))
        self._data.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        proto = self._onnx.TensorProto(name=name, data_type=self._types[tensor.dtype], dims=list(tensor.shape))
        proto.data_location = self._onnx.TensorProto.EXTERNAL
        for key, value in (("location", DATA), ("offset", start), ("length", tensor.nbytes)):
            proto.external_data.add(key=key, value=str(value))
        self._initializers[name] = proto
        return name

    def serialize(self, name: str, metadata: Mapping[str, str]) -> bytes:
        """The checked model as bytes."""
        helper = self._onnx.helper
        graph = helper.make_graph(self._nodes, name, self._inputs, self._outputs, list(self._initializers.values()))
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="lowbit")
        helper.set_model_props(model, dict(metadata))
        data: bytes = model.SerializeToString()
        return data


def stored_products(path: Path) -> Iterator[tuple[str, str, dict[str, Tensor], dict[str, int]]]:
    """Of every low-bit product in the file: its name, its kind, its constants by their last word, its attributes."""
    onnx, _ = require_onnx()
    model = onnx.load(path / MODEL, load_external_data=False)
    constants = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in ("MatMulNBits", "MatMulInteger"):
            continue
        names = [i for i in node.input if i in constants]
        tensors = {n.rpartition(".")[2]: _read(onnx, constants[n], path) for n in names}
        scales = f"{node.name}.scales"
        tensors.setdefault("scales", _read(onnx, constants[scales], path) if scales in constants else torch.ones(1))
        yield node.name, node.op_type, tensors, {a.name: a.i for a in node.attribute}


def _read(onnx: Any, proto: Any, path: Path) -> Tensor:
    array: Any = onnx.numpy_helper.to_array(proto, base_dir=str(path))
    return torch.from_numpy(np.array(array))
