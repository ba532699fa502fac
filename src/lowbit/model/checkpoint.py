"""Checkpoints on disk: open a model directory, check it, read one tensor at a time.

A model is named by a Hugging Face directory, a hub id (`org/name`, fetched when online), a GGUF file, or the word
`demo` (the small model that comes with the package). No pickle is read: it can run code.
"""

import hashlib
import json
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowbit.errors import InputError
from lowbit.formats.gguf_file import read_gguf
from lowbit.formats.gguf_model import GGUFModel, open_model
from lowbit.shards import Later, read_tensor

DEMO = Path(__file__).resolve().parent.parent / "demo"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TRUST = "LOWBIT_TRUST_REMOTE_CODE"
FLOAT_TYPES = {"F64", "F32", "F16", "BF16"}
_QUANTIZATION_FILES = {"quantize_config.json": "gptq", "hf_quant_config.json": "modelopt"}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is, from the file's header alone."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    start: int  # its first byte in the file


@dataclass(frozen=True)
class Checkpoint:
    """An opened model directory: its config, and every tensor's header. Nothing else is in memory."""

    name: str
    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo] = field(repr=False)
    trust_remote_code: bool = False
    # set by model/names.py, where the model's names differ from the files'
    stored: Mapping[str, str] = field(default_factory=dict, repr=False)
    stored_modules: Mapping[str, str] = field(default_factory=dict, repr=False)
    transposed: frozenset[str] = field(default=frozenset(), repr=False)  # weights (out, in) that lie there as (in, out)
    gguf: GGUFModel | None = field(default=None, repr=False)  # for a GGUF file, where tensors come from

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """The float type that most of the weights are stored in."""
        sizes: dict[str, int] = {}
        for info in self.tensors.values():
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
        largest = max((d for d in sizes if d in FLOAT_TYPES), key=lambda d: sizes[d], default="BF16")
        return {"F16": torch.float16, "BF16": torch.bfloat16}.get(largest, torch.float32)

    @cached_property
    def quantization(self) -> dict[str, Any] | None:
        """How the weights are quantized, in the words of the tool that did it; None for an ordinary model."""
        if self.gguf is not None:
            return None if self.gguf.plain else {"quant_method": "gguf", "bits": self.gguf.bits}
        config = self.config.get("quantization_config")
        for file, method in _QUANTIZATION_FILES.items():  # older GPTQ and ModelOpt files say it here only
            if config is None and (self.path / file).exists():
                config = {"quant_method": method} | _read_object(self.path / file)
        if config is not None and not isinstance(config, dict):
            raise InputError(f"{self.path / 'config.json'}: quantization_config is no object.")
        return config

    @property
    def text_config(self) -> dict[str, Any]:
        """The part of the config that describes the language model: all of it, unless the model also sees or hears."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @property
    def context_length(self) -> int | None:
        """The most tokens the model takes, if its config says so."""
        for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
            value = self.text_config.get(key)
            if isinstance(value, int):
                return value
        return None

    @property
    def shards(self) -> list[str]:
        return sorted({info.shard for info in self.tensors.values()})

    def stored_module(self, module: str) -> str:
        """The name that a module's tensors begin with in the files."""
        return self.stored_modules.get(module, module)

    def stored_tensor(self, name: str) -> str:
        """The name in the files of a tensor, also of one that is not there yet (a packed weight)."""
        module, dot, tail = name.rpartition(".")
        return self.stored.get(name) or self.stored_module(module) + dot + tail

    def get(self, name: str) -> Tensor:
        """One tensor, copied out of its shard. Raises InputError if it is unreadable or not finite."""
        tensor = self.as_stored(name)
        return tensor.T.contiguous() if name in self.transposed else tensor

    def later(self, name: str) -> Later:
        """`as_stored`, to be read when it is needed."""
        info = self.tensors[name]
        shape = info.shape[::-1] if name in self.transposed else info.shape
        return Later(info.dtype, shape, lambda: self.as_stored(name))

    def as_stored(self, name: str) -> Tensor:
        """`get`, but a transposed weight as it lies in the file."""
        if self.gguf is not None:
            return self.gguf.get(name)
        info = self.tensors[name]
        try:
            shape = info.shape[::-1] if name in self.transposed else info.shape
            tensor = read_tensor(self.path / info.shard, info.start, info.dtype, shape)
        except (KeyError, OSError) as error:
            raise InputError(f"{self.path / info.shard}: cannot read tensor {name!r}: {error}.") from error
        if tensor.is_floating_point() and tensor.element_size() > 1 and not bool(torch.isfinite(tensor.sum())):
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                raise InputError(
                    f"{self.path / info.shard}: tensor {name!r} has {bad} NaN or infinite values among "
                    f"{tensor.numel()}. The checkpoint is damaged or was saved after a diverged training step; "
                    "get a clean copy."
                )
        return tensor

    def mapped(self, name: str) -> Tensor:
        """One tensor as a view of its file: pages come into memory when they are read. Not to be written to."""
        if self.gguf is not None:
            return self.gguf.get(name)
        info = self.tensors[name]
        try:
            with safe_open(self.path / info.shard, framework="pt") as shard:
                tensor: Tensor = shard.get_tensor(self.stored_tensor(name))
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.path / info.shard}: cannot read tensor {name!r}: {error}.") from error
        return tensor.T if name in self.transposed else tensor

    def check_finite(self) -> None:
        """Read every float tensor once. Raises InputError naming the first that has NaN or infinite values."""
        for name, info in self.tensors.items():
            if info.dtype in FLOAT_TYPES:
                self.get(name)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the weights' and the config's bytes: what 'the same model' means for resuming."""
        total = hashlib.sha256()
        for file in ["config.json", *self.shards] if self.gguf is None else [""]:
            with (self.path / file).open("rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
        return total.hexdigest()


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Open the model that `model` names. Raises InputError, in one paragraph, for everything wrong with it.

    Code that comes with a model runs only where the environment has LOWBIT_TRUST_REMOTE_CODE=1, which is what
    --trust-remote-code sets, so that processes started from here see it too.
    """
    name = str(model)
    if name.endswith(".gguf"):
        return _open_gguf(name)
    path = _locate(name)
    config = read_config(path)
    shards = _shard_files(path)
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(shards.values())):
        for tensor, info in read_header(path / shard).items():
            if tensor in tensors:
                raise InputError(
                    f"{path}: tensor {tensor!r} is in both {tensors[tensor].shard} and {shard}. Which one is meant "
                    "cannot be known; remove the stale shard."
                )
            tensors[tensor] = info
    absent = sorted(t for t in shards if t != "*" and t not in tensors)
    if absent:
        raise InputError(
            f"{path}: the index {INDEX} lists {len(absent)} tensors that no shard holds, the first is {absent[0]!r}. "
            "The download is incomplete or the index belongs to another model."
        )
    if not tensors:
        raise InputError(f"{path}: the safetensors files hold no tensors.")
    return Checkpoint(name, path, config, tensors, os.environ.get(TRUST) == "1")


def _open_gguf(name: str) -> Checkpoint:
    path = Path(name).expanduser()
    if not path.is_file():
        raise InputError(f"{name}: no such file.")
    model = open_model(read_gguf(path))
    tensors = {n: TensorInfo(path.name, dtype, shape, size, 0) for n, (_, dtype, shape, size) in model.places.items()}
    return Checkpoint(name, path, model.config, tensors, gguf=model)


def _locate(name: str) -> Path:
    if name == "demo":
        return DEMO / "model"
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{name}: this is a file. A model is a directory with config.json and *.safetensors.")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith((".", "/")):
        return _download(name)
    raise InputError(
        f"{name}: no such directory. Give a Hugging Face model directory, a hub id such as org/name, or 'demo'."
    )


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja", "LICENSE*"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises a dozen unrelated types; all mean "not to be had"
        reason = str(error).strip().split("\n")[0][:300] or type(error).__name__
        raise InputError(
            f"{name}: no such directory here, and it could not be fetched from the hub ({reason}). "
            "Check the spelling, the network, or give a local directory."
        ) from error


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not readable as JSON ({error}).") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}).") from error


def read_config(path: Path) -> dict[str, Any]:
    """config.json. Raises InputError where there is none, or no JSON object in it."""
    file = path / "config.json"
    if not file.exists():
        raise InputError(f"{path}: there is no config.json, so this is not a Hugging Face model directory.")
    return _read_object(file)


def _read_object(file: Path) -> dict[str, Any]:
    config = _read_json(file)
    if not isinstance(config, dict):
        raise InputError(f"{file}: expected a JSON object, got {type(config).__name__}.")
    if not isinstance(config.get("quantization_config", {}), dict):
        raise InputError(f"{file}: quantization_config is {config['quantization_config']!r}, expected an object.")
    return config


def _shard_files(path: Path) -> dict[str, str]:
    """tensor -> shard from the index, or {'*': the one file}. Every named shard exists and lies in the directory."""
    if not (path / INDEX).exists():
        if (path / SINGLE).exists():
            return {"*": SINGLE}
        if (path / "model.onnx").exists():
            raise InputError(
                f"{path}: an ONNX model and no safetensors: evaluate, bench and chat run it with --runtime onnx. What "
                "needs weights, and evaluate's --against, is the model that it was exported from."
            )
        if (pickles := sorted(f.name for f in path.glob("*.bin"))) or (
            pickles := sorted(f.name for f in path.glob("*.pt*"))
        ):
            raise InputError(
                f"{path}: only pickle files ({pickles[0]}) and no safetensors. lowbit does not load pickles, because "
                "they can run code. Convert once in a place you trust: "
                "AutoModel.from_pretrained(...).save_pretrained(DIR)."
            )
        raise InputError(f"{path}: neither {SINGLE} nor {INDEX}: there are no weights here.")
    index = _read_json(path / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError(f"{path / INDEX}: expected an object 'weight_map' from tensor names to file names.")
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise InputError(f"{path / INDEX}: shard name {shard!r} leaves the directory; refusing to follow it.")
        if not (path / shard).exists():
            raise InputError(
                f"{path}: shard {shard} is named in the index but missing. The download is incomplete; fetch it again."
            )
    return weight_map


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, checked against the file's true size. Reads only the header."""
    size = file.stat().st_size
    if size == 0:
        raise InputError(f"{file}: the file is empty (0 bytes). Fetch it again.")
    try:
        with safe_open(file, framework="np"):  # the library's own validation: lengths, offsets, overlaps, dtypes
            pass
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, struct.error, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(
            f"{file}: not a whole safetensors file ({size} bytes): {error}. Cut short or damaged; fetch it again."
        ) from error
    return {
        name: TensorInfo(file.name, e["dtype"], tuple(e["shape"]), end - start, 8 + length + start)
        for name, e in header.items()
        if name != "__metadata__"
        for start, end in [e["data_offsets"]]
    }
