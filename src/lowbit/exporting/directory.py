"""Export to a model directory in another tool's layout: the same codes and scales, packed as that tool packs them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lowbit
from lowbit.artifact import disk_errors, whole_or_nothing, write_json
from lowbit.console import track
from lowbit.errors import InputError
from lowbit.formats import awq, gptq, modelopt
from lowbit.manifest import copy_small_files, index_of, shard_name
from lowbit.model.checkpoint import INDEX, Checkpoint, open_checkpoint
from lowbit.model.load import Source, open_source, skeleton
from lowbit.model.walk import find_blocks, linears
from lowbit.scheme import Scheme
from lowbit.tensor import QuantizedTensor

Files = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Layout:
    """How one tool stores a linear, and what its small files say."""

    pack: Callable[[str, QuantizedTensor], dict[str, Tensor]]
    config: dict[str, Any]  # config.json's quantization_config
    files: Files


def _gptq(schemes: Mapping[str, Scheme]) -> Layout:
    version = 1 if gptq.single_scheme(schemes, "a GPTQ file").symmetric else 2
    config = gptq.quantization_config(schemes, version)
    return Layout(lambda name, q: gptq.pack(name, q, version), config, {"quantize_config.json": config})


def _awq(schemes: Mapping[str, Scheme]) -> Layout:
    return Layout(awq.pack, awq.quantization_config(schemes), {})


def _modelopt(schemes: Mapping[str, Scheme]) -> Layout:
    words = modelopt.hf_quant_config(schemes, lowbit.__version__)
    return Layout(modelopt.pack, modelopt.quantization_config(schemes), {"hf_quant_config.json": words})


LAYOUTS = {"gptq": _gptq, "awq": _awq, "modelopt": _modelopt}


@torch.no_grad()
def export_directory(checkpoint: Checkpoint, output: Path, layout_name: str, *, force: bool) -> dict[str, Any]:
    """Write a quantized checkpoint as the directory `output`, then read every linear back and compare its values.

    Raises InputError for a model that is not quantized, or layers the layout cannot hold together.
    """
    net = skeleton(checkpoint)
    source = open_source(net, checkpoint)
    schemes = {n: source.schemes.get(n, Scheme(None)) for n in linears(net)}
    layout = LAYOUTS[layout_name](schemes)
    identity = {"export": layout_name, "model": checkpoint.digest}
    blocks = find_blocks(net)
    parts = [*(f"{n}." for n in blocks.names), ""]
    names = list(checkpoint.tensors)
    with whole_or_nothing(output, identity, force=force) as work:
        for i, part in enumerate(track(parts, f"exporting to {layout_name}", len(parts))):
            mine = [n for n in names if n.startswith(part)]
            names = [n for n in names if not n.startswith(part)]
            work.write_shard(shard_name(i, len(parts) - 1), _shard(source, layout, mine))
        with disk_errors(work.path):
            config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
            write_json(work.path / "config.json", config | {"quantization_config": layout.config})
            write_json(work.path / INDEX, index_of(work.path))
            for file, words in layout.files.items():
                write_json(work.path / file, words)
            copy_small_files(checkpoint, work.path)
        lost = _prove(source, work.path)
    size = sum(f.stat().st_size for f in output.iterdir())
    return {"bytes": size, "linears": len(source.schemes), "largest_difference": lost, "config": layout.config}


def _shard(source: Source, layout: Layout, names: list[str]) -> dict[str, Tensor]:
    """Those tensors, quantized linears packed anew (all of whose old tensors are among them)."""
    owners = {n.rpartition(".")[0] for n in names} & set(source.schemes)
    tensors: dict[str, Tensor] = {}
    for name in names:
        owner, _, kind = name.rpartition(".")
        if owner not in owners or kind == "bias":
            tensors[name] = source.checkpoint.get(name)
    for owner in sorted(owners):
        quantized = source.linear(owner)
        assert quantized is not None
        tensors |= layout.pack(owner, quantized)
    return tensors


def _prove(source: Source, path: Path) -> float:
    """The largest difference between a weight there and here: 0, or half precision's rounding of tiny scales."""
    checkpoint = open_checkpoint(path)
    written = open_source(skeleton(checkpoint), checkpoint)
    if set(written.schemes) != set(source.schemes):
        raise AssertionError(f"{path}: {set(written.schemes) ^ set(source.schemes)} read back otherwise")
    largest = 0.0
    for name in source.schemes:
        here, there = source.linear(name), written.linear(name)
        assert here is not None
        assert there is not None
        difference = float((here.dequantize() - there.dequantize()).abs().max())
        if difference > 2**-17:
            raise InputError(
                f"{name}: differs by {difference:.3g} after half precision's scales; it cannot be carried."
            )
        largest = max(largest, difference)
    return largest
