"""ONNX Runtime as an engine: a decoder in a directory that `lowbit export --format onnx` made, or Optimum.

    input_ids, position_ids, attention_mask, past_key_values.N.key, .value  ->  logits, present.N.key, .value

The graph is a function without memory: keys and values of the tokens so far go in, and come out longer. They stay with
ONNX Runtime between calls, so a step computes one token and copies the cache once, which is what the graph's own
Concat costs. A graph gives logits of every token it reads; prompts are therefore read in pieces.
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.formats.onnx import CACHE, MODEL
from lowbit.model.checkpoint import Checkpoint, read_config
from lowbit.runtime.base import Engine

_CHUNK = 512  # prompt tokens a call
_ITEM_BYTES = {"tensor(float)": 4, "tensor(float16)": 2}
_PRODUCTS = ("MatMulNBits", "MatMulInteger")


def require_onnx() -> tuple[Any, Any]:
    """The packages onnx and onnxruntime. Raises InputError naming the extra."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise InputError(
            f"ONNX needs the package {error.name}, which is not installed: pip install 'lowbit[onnx]'."
        ) from error
    return onnx, onnxruntime


def session(path: Path) -> Any:
    """ONNX Runtime's session of an ONNX directory, on this CPU with torch's number of threads."""
    _, onnxruntime = require_onnx()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path / MODEL), options, providers=["CPUExecutionProvider"])


def open_onnx(model: str | Path) -> Checkpoint:
    """An ONNX directory: its config and tokenizer, and no tensors. Raises InputError for anything else."""
    path = Path(model).expanduser()
    if not (path / MODEL).is_file():
        raise InputError(
            f"{model}: there is no {MODEL}. ONNX Runtime runs ONNX directories; make one: lowbit export {model} "
            "--format onnx -o OUT (with --type float for a model in full precision)."
        )
    return Checkpoint(str(model), path, read_config(path), {})


class OnnxEngine(Engine):
    """A session over `checkpoint.path`. Raises InputError for a damaged graph, and for one without a cache."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        onnx, onnxruntime = require_onnx()
        self.checkpoint = checkpoint
        self.config = SimpleNamespace(**checkpoint.text_config)
        file = checkpoint.path / MODEL
        try:
            graph = onnx.load(file, load_external_data=False).graph
            self._session = session(checkpoint.path)
        except Exception as error:  # both packages raise a dozen types of their own; all mean "not a graph to run"
            reason = str(error).strip().split("\n")[0][:300]
            raise InputError(f"{file}: ONNX Runtime cannot load it ({reason}).") from error
        inputs, outputs = self._session.get_inputs(), [o.name for o in self._session.get_outputs()]
        self._feeds = {i.name for i in inputs}
        self._empty = {i.name: i for i in inputs if i.name.startswith(CACHE)}
        self._outputs = ["logits", *(name.replace(CACHE, "present", 1) for name in self._empty)]
        if not self._empty or not set(self._outputs) <= set(outputs):
            raise InputError(
                f"{file}: has no inputs {CACHE}.* and outputs present.*, so it does not generate token by token. "
                "lowbit export --format onnx writes decoders with them; encoders have no next token to measure."
            )
        self._past: dict[str, Any] | None = None  # what `_compute` left: one sequence
        self.kernels = _products(graph)
        self.runtime = ", ".join([f"ONNX Runtime {onnxruntime.__version__}", *sorted(self.kernels)])
        self.weight_bytes, self.weight_bytes_per_token = _weights(graph)

    def _value(self, array: Any) -> Any:
        _, onnxruntime = require_onnx()
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))

    def _new_past(self, batch: int) -> dict[str, Any]:
        dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        return {
            name: self._value(np.zeros((batch, i.shape[1], 0, i.shape[3]), dtypes[i.type]))
            for name, i in self._empty.items()
        }

    def _step(self, ids: Any, start: int, past: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Logits (batch, tokens, vocabulary) of `ids`, which stand from `start` on, and the cache with them in it."""
        batch, count = ids.shape
        places = np.broadcast_to(np.arange(start, start + count), ids.shape)
        words = {
            "input_ids": ids,
            "position_ids": places,
            "attention_mask": np.ones((batch, start + count), np.int64),
        }
        feeds = {name: self._value(v.astype(np.int64)) for name, v in words.items() if name in self._feeds}
        logits, *present = self._session.run_with_ort_values(self._outputs, feeds | past)
        return torch.from_numpy(logits.numpy()).float(), dict(zip(past, present, strict=True))

    def _read(self, ids: Any, start: int, past: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """The same, piece by piece."""
        for at in range(0, ids.shape[1], _CHUNK):
            logits, past = self._step(ids[:, at : at + _CHUNK], start + at, past)
            yield logits, past

    def logits(self, tokens: Tensor) -> Tensor:
        rows = []
        for window in tokens.numpy():
            rows.append(torch.cat([part[0] for part, _ in self._read(window[None], 0, self._new_past(1))]))
        return torch.stack(rows)

    def _stream(self, prompts: Tensor, max_new_tokens: int) -> Iterator[Tensor]:
        ids, at, past = prompts.numpy(), 0, self._new_past(len(prompts))
        for _ in range(max_new_tokens):
            for logits, after in self._read(ids, at, past):
                last, past = logits[:, -1], after
            token = last.argmax(-1)
            yield token
            at += ids.shape[1]
            ids = token[:, None].numpy()

    def reserve(self, tokens: int) -> None:
        """Nothing to do: the cache grows as it is used."""

    def _compute(self, tokens: list[int], start: int, rows: int, logits: bool) -> tuple[Tensor | None, list[int]]:
        past = self._cut(start)
        parts: list[Tensor] = []
        for part, after in self._read(np.array([tokens[start:]]), start, past):
            parts, past = [torch.cat([*parts, part[0]])[-rows:]], after
        self._past = past
        return parts[0] if logits else None, parts[0].argmax(-1).tolist()

    def _cut(self, length: int) -> dict[str, Any]:
        """The cache with its first `length` tokens only."""
        past, self._past = self._past, None
        if past is None or length == 0:
            assert length == 0
            return self._new_past(1)
        if next(iter(past.values())).shape()[2] == length:
            return past
        return {name: self._value(value.numpy()[:, :, :length]) for name, value in past.items()}

    def kv_bytes(self, context: int) -> int:
        return int(sum(i.shape[1] * i.shape[3] * _ITEM_BYTES[i.type] for i in self._empty.values()) * context)


def _products(graph: Any) -> dict[str, int]:
    """Low-bit products in the graph, by kind."""
    kinds: dict[str, int] = {}
    for node in graph.node:
        if node.op_type in _PRODUCTS:
            bits = next((a.i for a in node.attribute if a.name == "bits"), 8)
            kind = f"{node.op_type} int{bits}"
            kinds[kind] = kinds.get(kind, 0) + 1
    return kinds


def _weights(graph: Any) -> tuple[int, int]:
    """Bytes of all constants, and of those that one token reads: of a table that is only looked up, one row.

    A half-precision constant that is cast before use counts in float32, which ONNX Runtime makes of it at load.
    """
    onnx, _ = require_onnx()
    users: dict[str, set[tuple[str, int]]] = {}
    for node in graph.node:
        for place, name in enumerate(node.input):
            users.setdefault(name, set()).add((node.op_type, place))
    total = read = 0
    for constant in graph.initializer:
        used = users.get(constant.name, set())
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(constant.data_type))
        size = int(np.prod(constant.dims, dtype=np.int64)) * (4 if ("Cast", 0) in used else dtype.itemsize)
        total += size
        read += size // max(1, constant.dims[0]) if used == {("Gather", 0)} else size
    return total, read
