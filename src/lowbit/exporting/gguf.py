"""Export to GGUF, for llama.cpp and what is built on it.

Three ways in. A lowbit result whose grids a GGUF type can carry is carried over, code for code. A full-precision model
is quantized here, onto llama.cpp's own block types: `search` finds each block's parameters under the Hessian's
diagonal, `gptq` adds error feedback and descent under the whole Hessian (algorithms/ggml_search.py, ggml_gptq.py). The
blocks of the model are visited in order, each calibrated behind the already quantized ones, and written as they come.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.algorithms.ggml_search import search_blocks
from lowbit.calibration import Calibration
from lowbit.console import note, track
from lowbit.environment import compute_dtype
from lowbit.errors import InputError, nearest
from lowbit.exporting.calibrated import Job, enter, line, round_block, round_head, row
from lowbit.formats import gguf_names as names
from lowbit.formats.gguf_file import read_gguf, stored_bytes
from lowbit.formats.gguf_grids import carrier, carry
from lowbit.formats.gguf_tokens import tokenizer_metadata
from lowbit.formats.gguf_write import Typed, write_gguf
from lowbit.ggml import BlockTensor, FloatType, GgmlType, find_type
from lowbit.model.checkpoint import Checkpoint
from lowbit.model.load import (
    Source,
    load_tokenizer,
    materialize,
    open_source,
    release,
    skeleton,
)
from lowbit.model.walk import Entry, find_blocks
from lowbit.pipeline import find_calibration
from lowbit.recipe import Recipe, matches

METHODS = ("gptq", "search")
DEFAULT_TYPE = "q4_k_m"
_CARRIED = ("copied", "carried over")


@dataclass(frozen=True)
class Request:
    """What the user asked for. `type` None: carry a quantized model over, or the default for a full-precision one.
    `method` None: gptq if there is text to calibrate on, else search."""

    type: str | None = None
    method: str | None = None
    calibration: str | None = None
    samples: int = 128
    seq_len: int = 512
    seed: int = 0
    override: tuple[tuple[str, str], ...] = ()


@torch.no_grad()
def export_gguf(checkpoint: Checkpoint, output: Path, request: Request) -> dict[str, Any]:
    """Write `checkpoint` as the file `output`; returns the part of the `export` document that is about GGUF.

    Raises InputError for an architecture, scheme, type or tokenizer that GGUF cannot carry, before any heavy work.
    """
    net = skeleton(checkpoint)
    source = open_source(net, checkpoint)
    family = names.find_family(net.config)
    calibration, method = _how(checkpoint, source, request)
    layout = _layout(net, source, family, request)
    tokenizer = load_tokenizer(checkpoint)
    label = request.type or ("f16" if source.schemes else DEFAULT_TYPE)
    metadata = _metadata(checkpoint, net, family, label) | tokenizer_metadata(tokenizer, net.config.vocab_size)
    job = Job(net, source, family, method, layout)
    write_gguf(output, metadata, layout, job_tensors(job, calibration))
    _prove(output, layout)
    linear = [r for r in job.report if r["bits"] is not None]
    weights = sum(r["weights"] for r in linear)
    return {
        "type": request.type or (_CARRIED[1] if source.schemes else DEFAULT_TYPE),
        "method": method,
        "bytes": output.stat().st_size,
        "bits_per_weight": sum(r["bits"] * r["weights"] for r in linear) / weights if weights else None,
        "tensors": [{"name": n, "type": k.name, "bytes": stored_bytes(shape, k)} for n, (shape, k) in layout.items()],
        "layers": job.report,
    }


def _how(checkpoint: Checkpoint, source: Source, request: Request) -> tuple[Calibration | None, str]:
    """The calibration windows, if any, and the method."""
    if request.method is not None and request.method not in METHODS:
        raise InputError(f"unknown method {request.method!r} for GGUF. {nearest(request.method, METHODS)}")
    mixture = request.type or DEFAULT_TYPE
    if mixture.lower() not in names.MIXTURES:
        raise InputError(f"unknown GGUF type {mixture!r}. {nearest(mixture, names.MIXTURES)}")
    if source.schemes:
        if request.type is not None and not isinstance(find_type_of(request.type), FloatType):
            raise InputError(
                f"{checkpoint.name}: already quantized; quantizing it again to {request.type} would add the errors up. "
                "Leave --type away to carry it over as it is, or export the original model."
            )
        return None, _CARRIED[1]
    if isinstance(find_type_of(mixture), FloatType):
        return None, _CARRIED[0]
    recipe = Recipe(
        method="gptq", calibration=request.calibration, samples=request.samples, seq_len=request.seq_len,
        seed=request.seed,
    )  # fmt: skip
    if request.method == "search" and request.calibration is None:
        with contextlib.suppress(InputError):  # the demo brings its own text; others are searched without
            return find_calibration(checkpoint, recipe), "search"
        return None, "search"
    return find_calibration(checkpoint, recipe), request.method or "gptq"


def find_type_of(mixture: str) -> GgmlType:
    """The base type of a mixture: q4_k for q4_k_m."""
    mixture = mixture.lower()
    return find_type(mixture[:4] if mixture[4:] in ("_s", "_m", "_l") else mixture)


def _layout(
    net: PreTrainedModel, source: Source, family: names.Family, request: Request
) -> dict[str, tuple[tuple[int, ...], GgmlType]]:
    """GGUF name -> shape, type of every tensor to write. Raises InputError for one that cannot be written."""
    plain = {torch.bfloat16: "bf16", torch.float16: "f16"}.get(source.checkpoint.dtype, "f32")
    mixture = (request.type or (plain if source.schemes else DEFAULT_TYPE)).lower()
    overrides = [(glob, find_type(kind)) for glob, kind in request.override]
    layout: dict[str, tuple[tuple[int, ...], GgmlType]] = {}
    used = set()
    for name, parameter in net.named_parameters():
        if name in net.all_tied_weights_keys:
            continue
        there = names.gguf_name(family, name)
        if there is None:
            raise InputError(
                f"{source.checkpoint.name}: {name!r} has no place in a GGUF file of {family.architecture}."
            )
        shape = tuple(parameter.shape)
        shape = shape[::-1] if _is_conv1d(net, name) else shape
        kind = names.choose_type(mixture, there, shape, net.config)
        linear = name.removesuffix(".weight")
        if linear in source.schemes:
            kind = carrier(linear, source.schemes[linear])
        for glob, wanted in overrides:
            if matches(glob, linear) and len(shape) == 2:
                kind = wanted
                used.add(glob)
        stored_bytes(shape, kind)
        layout[there] = (shape, kind)
    for glob, _ in request.override:
        if glob not in used:
            raise InputError(f"--override {glob}: no weight matrix has such a name.")
    divisors = _divisors(net)
    if divisors is not None:
        layout["rope_freqs.weight"] = (tuple(divisors.shape), find_type("f32"))
    return layout


def _is_conv1d(net: nn.Module, name: str) -> bool:
    module, _, kind = name.rpartition(".")
    return kind == "weight" and type(net.get_submodule(module)).__name__ == "Conv1D"


def _divisors(net: Any) -> Tensor | None:
    rotary = getattr(getattr(net, "model", None), "rotary_emb", None)
    return None if rotary is None else names.rope_divisors(net.config, getattr(rotary, "inv_freq", torch.ones(1)))


def _metadata(checkpoint: Checkpoint, net: Any, family: names.Family, label: str) -> dict[str, Typed]:
    return names.hyperparameters(net.config, family) | {
        "general.type": ("str", "model"),
        "general.name": ("str", checkpoint.path.resolve().name),
        "general.file_type": ("u32", names.file_type(label.lower())),
        "general.quantization_version": ("u32", 2),
    }


def job_tensors(job: Job, calibration: Calibration | None) -> Iterator[tuple[str, Tensor | BlockTensor]]:
    """Every tensor of the layout, block by block, then what is outside the blocks."""
    blocks = find_blocks(job.net)
    dtype = compute_dtype()
    entries: list[Entry] = []
    if calibration is not None:
        entries = enter(job, blocks, calibration, dtype)
    for index, name in enumerate(track(blocks.names, "exporting blocks", len(blocks.names))):
        done: dict[str, BlockTensor] = {}
        if entries:
            block = materialize(job.net, name, job.source, dtype)
            done = round_block(job, block, blocks, index, entries)
            release(block)
        yield from _tensors(job, [n for n, _ in _parameters(job) if n.startswith(name + ".")], done)
        note(line(job, name))
    outside = [n for n, _ in _parameters(job) if not n.startswith(blocks.name + ".")]
    yield from _tensors(job, outside, round_head(job, blocks, entries, calibration))
    divisors = _divisors(job.net)
    if divisors is not None:
        yield "rope_freqs.weight", divisors


def _parameters(job: Job) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in job.net.named_parameters() if n not in job.net.all_tied_weights_keys]


def _tensors(
    job: Job, parameters: list[str], done: Mapping[str, BlockTensor]
) -> Iterator[tuple[str, Tensor | BlockTensor]]:
    """Each parameter as it goes into the file, under its name there."""
    for full in parameters:
        there = str(names.gguf_name(job.family, full))
        tensor = _value(job, full, job.layout[there][1], done)
        heads = names.permuted_heads(job.family, there, job.net.config)
        if heads:
            rows = tensor.codes.shape[0] if isinstance(tensor, BlockTensor) else tensor.shape[0]
            index = names.permute_heads(torch.arange(rows), heads)
            tensor = tensor.rows(index) if isinstance(tensor, BlockTensor) else tensor[index]
        yield there, tensor


def _value(job: Job, full: str, kind: GgmlType, done: Mapping[str, BlockTensor]) -> Tensor | BlockTensor:
    linear, source = full.removesuffix(".weight"), job.source
    if full in done:
        return done[full]
    if full.endswith(".weight") and linear in source.schemes:
        quantized = source.linear(linear)
        assert quantized is not None
        if isinstance(kind, FloatType):
            return quantized.dequantize()
        job.report.append(row(full, kind, quantized.codes.numel(), None, None, None))
        return carry(linear, quantized, kind)
    value = source.checkpoint.get(full)
    if _is_conv1d(job.net, full):
        value = value.T.contiguous()
    if job.family.norm_offset and "norm" in full.split(".")[-2]:
        value = value.float() + job.family.norm_offset
    if isinstance(kind, FloatType):
        return value
    job.report.append(row(full, kind, value.numel(), None, None, None))
    return search_blocks(value, kind, None)


def _prove(output: Path, layout: Mapping[str, tuple[tuple[int, ...], GgmlType]]) -> None:
    """The file reads back with the announced tensors, and all of them are finite."""
    file = read_gguf(output)
    for name, (shape, kind) in layout.items():
        entry = file.tensors[name]
        if entry.shape != shape or entry.type_id != kind.id:
            raise AssertionError(f"{output}: {name} reads back as {entry}, was written as {kind.name} {shape}")
        file.values(name)
