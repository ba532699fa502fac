"""Rounding a model's weights onto ggml's grids, block by block, each calibrated behind the already quantized ones."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.algorithms.ggml_gptq import gptq_blocks
from lowbit.algorithms.ggml_search import search_blocks
from lowbit.calibration import Calibration
from lowbit.formats import gguf_names as names
from lowbit.ggml import BlockTensor, BlockType, GgmlType
from lowbit.job import HELD_OUT
from lowbit.losses import Statistics
from lowbit.memory import BATCH
from lowbit.model.load import Source, materialize, materialize_outside
from lowbit.model.lockstep import Walk
from lowbit.model.walk import Blocks, Entry, capture_entries, input_groups, linears
from lowbit.workers import one_thread


@dataclass
class Job:
    """One export: the model, where its weights are, and the type of every tensor by its GGUF name."""

    net: PreTrainedModel
    source: Source
    family: names.Family
    method: str
    layout: Mapping[str, tuple[tuple[int, ...], GgmlType]]
    report: list[dict[str, Any]] = field(default_factory=list)


def enter(job: Job, blocks: Blocks, calibration: Calibration, dtype: torch.dtype) -> list[Entry]:
    """The batches in front of the first block; one in HELD_OUT judges instead of teaching."""
    materialize_outside(job.net, blocks, job.source, dtype)
    materialize(job.net, blocks.names[0], job.source, dtype)
    entries = capture_entries(job.net, blocks, calibration.tokens.split(BATCH))
    for entry in entries[len(entries) - max(len(entries) // HELD_OUT, 1 if len(entries) > 1 else 0) :]:
        entry.held_out = True
    return entries


def round_block(job: Job, block: nn.Module, blocks: Blocks, index: int, entries: list[Entry]) -> dict[str, BlockTensor]:
    """The block's linears as block tensors, by full name; the entries move past the quantized block."""
    name = blocks.names[index]
    groups = input_groups(block, entries[0], index)
    walk = Walk(block, index, entries, groups, {}, torch.get_num_threads())
    done: dict[str, BlockTensor] = {}
    for k, group in enumerate(groups):
        modules = {n: linears(block)[n] for n in group.names if type(linears(block)[n]) is nn.Linear}
        if not modules:
            continue
        statistics = Statistics.collect(walk, k, next(iter(modules.values())).in_features)
        for local, module in modules.items():
            full = f"{name}.{local}.weight"
            there = names.gguf_name(job.family, full)
            kind = job.layout[there][1] if there is not None else None
            if not isinstance(kind, BlockType):
                continue
            done[full] = _round(job, full, kind, statistics)
            module.weight = nn.Parameter(done[full].dequantize().to(module.weight.dtype), requires_grad=False)
    for entry, hidden in zip(entries, walk.finish(), strict=True):
        entry.hidden = hidden
    return done


def round_head(
    job: Job, blocks: Blocks, entries: list[Entry], calibration: Calibration | None
) -> dict[str, BlockTensor]:
    """The output head, or the embeddings tied to it, calibrated on what the last block hands on."""
    head = job.net.get_output_embeddings()
    tied = bool(job.net.config.tie_word_embeddings)
    module = job.net.get_input_embeddings() if tied else head
    full = next(n for n, m in job.net.named_modules() if m is module) + ".weight"
    kind = job.layout[str(names.gguf_name(job.family, full))][1]
    if not entries or calibration is None or not isinstance(kind, BlockType):
        return {}
    statistics = Statistics.empty(head.in_features)
    for entry, tokens in zip(entries, calibration.tokens.split(BATCH), strict=True):
        (statistics.held_out if entry.held_out else statistics.train).update(
            _head_input(job.net, blocks, entry, tokens)
        )
    return {full: _round(job, full, kind, statistics)}


class _Reached(Exception):
    pass


def _head_input(net: PreTrainedModel, blocks: Blocks, entry: Entry, tokens: Tensor) -> Tensor:
    """What the output head receives after the blocks end with entry.hidden."""
    found: list[Tensor] = []

    def stop(_module: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0])
        raise _Reached

    class Give(nn.Module):
        attention_type = "full_attention"  # some models choose a mask by it

        def forward(self, *_args: Any, **_kwargs: Any) -> Tensor:
            return entry.hidden

    holder = net.get_submodule(blocks.name)
    assert isinstance(holder, nn.ModuleList)
    originals = list(holder)
    handle = net.get_output_embeddings().register_forward_pre_hook(stop)
    try:
        for i in range(len(originals)):
            holder[i] = Give()
        with contextlib.suppress(_Reached):
            net(input_ids=tokens, use_cache=False)
    finally:
        handle.remove()
        for i, block in enumerate(originals):
            holder[i] = block
    return found[0]


def _round(job: Job, full: str, kind: BlockType, statistics: Statistics) -> BlockTensor:
    """One weight by the job's method; what the whole Hessian brought is kept where held-out windows agree."""
    weight = job.source.checkpoint.get(full).float()
    hessian = statistics.train.mean()
    reached = statistics.train.rows > 0
    found = search_blocks(weight, kind, hessian.diagonal() if reached else None)
    loss, judged = statistics.loss(weight - found.dequantize())
    plain, fallback = loss, None if reached else "no calibration token reached this layer: search without weights"
    if job.method == "gptq" and reached:
        try:
            with one_thread():
                better = gptq_blocks(weight, hessian, kind)
            mine, mine_judged = statistics.loss(weight - better.dequantize())
            if judged is None or mine_judged is None or mine_judged <= judged:
                found, loss = better, mine
            else:
                fallback = "worse than search on held-out windows: search"
        except ValueError as error:
            fallback = f"{error}: search"
    job.report.append(row(full, kind, weight.numel(), loss, plain, fallback))
    return found


def row(
    full: str, kind: GgmlType, weights: int, loss: float | None, plain: float | None, fallback: str | None
) -> dict[str, Any]:
    name, bits = full.removesuffix(".weight"), kind.bits_per_weight
    return {
        "name": name, "type": kind.name, "bits": bits, "weights": weights, "loss": loss, "loss_search": plain,
        "fallback": fallback,
    }  # fmt: skip


def line(job: Job, block: str) -> str:
    rows = [r for r in job.report if r["name"].startswith(block + ".")]
    loss, plain = (sum(r[k] for r in rows if r[k] is not None) for k in ("loss", "loss_search"))
    types = ", ".join(sorted({r["type"] for r in rows})) or "floats"
    return f"{block}: {types}" + (f", output error {loss / plain:.0%} of search's" if plain else "")
