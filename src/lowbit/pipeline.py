"""quantize: the loop over blocks.

1. open, plan, refuse                     preflight.py
2. calibration windows through the embeddings
3. for each block: equalize (equalization.py); statistics -> round, in the order the data flows, each group against
   inputs from the already quantized prefix (model/walk.py, rounding.py) -> write the shard, read it back, compare
4. close the directory; reload it and record the logits it computes
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.activations import UNKNOWN_SCALE, static_scale
from lowbit.algorithms.compose import parse_method, settings_of
from lowbit.artifact import MANIFEST, Work, check_output, check_same, clean, read_manifest, replaces
from lowbit.calibration import Calibration, load_calibration
from lowbit.console import note, track
from lowbit.equalization import Equalized, make_equalizer
from lowbit.errors import InputError
from lowbit.formats.compressed_tensors import pack, unpack, unpack_input
from lowbit.manifest import document_of, finish_directory, shard_name, versions
from lowbit.model.checkpoint import DEMO, Checkpoint, open_checkpoint
from lowbit.model.load import (
    Source,
    compute_dtype,
    load_tokenizer,
    materialize,
    materialize_outside,
    open_source,
    release,
    skeleton,
)
from lowbit.model.lockstep import Walk
from lowbit.model.rotate import rotate
from lowbit.model.walk import Blocks, Entry, capture_entries, find_blocks, input_groups, linears
from lowbit.preflight import Plan, check_disk, make_plan
from lowbit.recipe import Recipe
from lowbit.rounding import Rounded, Statistics, Units, block_line, round_linears
from lowbit.scheme import Scheme
from lowbit.tensor import InputGrid

HELD_OUT = 16  # one batch in this many checks the method instead of feeding it
BATCH = 4  # windows a batch: the activations of a small model stay in the cache


@torch.no_grad()
def quantize(
    model: str | Path,
    output: str | Path,
    recipe: Recipe | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    **words: Any,
) -> dict[str, Any]:
    """Quantize `model` into the directory `output`; returns the `quantize` document.

    The recipe is given whole or as its words (scheme="w4a16", method="gptq", ...). Raises InputError for bad input;
    an interrupted run leaves `output`.partial, which resume=True finishes to the same bytes.
    """
    recipe = recipe or Recipe(**words)
    start = time.perf_counter()
    output = Path(output)
    check_output(output, resume=resume, force=force)
    checkpoint = open_checkpoint(model)
    net = skeleton(checkpoint)
    blocks = find_blocks(net)
    plan = make_plan(net, blocks, checkpoint, recipe)
    check_disk(plan, output, resume=resume)
    calibration = find_calibration(checkpoint, recipe)
    checkpoint.check_finite()
    identity = {
        **recipe.to_dict(),
        "model": checkpoint.digest,
        "calibration": calibration.digest if calibration else None,  # a moved file with the same text is the same job
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }
    if resume and (output / MANIFEST).exists() and not replaces(output):
        manifest = read_manifest(output)
        check_same(output, manifest["identity"], identity)
        clean(output)
        return {**manifest["summary"], "output": str(output), "layers": manifest["layers"]}
    method = parse_method(recipe.method)
    view = checkpoint
    if method.rotation is not None:
        view = rotate(checkpoint, settings_of(method, dict(recipe.set))[method.rotation], recipe.seed)
    work = Work(output, identity, resume=resume, force=force)
    job = _Job(net, open_source(net, view), blocks, plan, recipe, work, torch.get_num_threads())
    layers = job.run(calibration)
    document = document_of(output, recipe, layers, time.perf_counter() - start)
    finish_directory(work, checkpoint, plan.schemes, recipe, calibration, identity, document)
    work.close()
    return document


@dataclass
class _Job:
    """The parts that the loop over blocks works with, and what equalization made of the present block."""

    net: PreTrainedModel
    source: Source
    blocks: Blocks
    plan: Plan
    recipe: Recipe
    work: Work
    threads: int
    equalized: Equalized = field(default_factory=Equalized)

    def stored(self, name: str) -> Tensor:
        """A tensor as it is to be quantized or copied."""
        changed = self.equalized.tensors
        return changed[name] if name in changed else self.source.checkpoint.get(name)

    def run(self, calibration: Calibration | None) -> list[dict[str, Any]]:
        """Quantize every block in order, or read it back if it is finished. Returns one report a linear."""
        names = self.blocks.names
        dtype = compute_dtype()
        entries = [] if calibration is None else self._enter(calibration, dtype)
        equalizer = (
            None
            if calibration is None
            else make_equalizer(
                self.net, self.blocks, calibration.tokens, self.recipe, self.source.checkpoint.dtype, self.threads
            )
        )
        layers: list[dict[str, Any]] = []
        for index, name in enumerate(track(names, "quantizing blocks", len(names))):
            started = time.perf_counter()
            shard = shard_name(index, len(names))
            block = materialize(self.net, name, self.source, dtype)
            report = self.work.report(shard)
            if report is None:
                if equalizer is not None:
                    schemes = self.plan.quantized(name)
                    self.equalized = equalizer.equalize(
                        block, name, index, entries, schemes, self.source.checkpoint.get
                    )
                rounded = self._round_block(block, index, entries)
                report = self._write(shard, name, rounded)
            elif entries:
                self._replay(block, index, entries, shard)
            release(block)
            layers += report
            note(block_line(name, report, time.perf_counter() - started))
        self._write_rest()
        return layers

    def _enter(self, calibration: Calibration, dtype: torch.dtype) -> list[Entry]:
        materialize_outside(self.net, self.blocks, self.source, dtype)
        materialize(self.net, self.blocks.names[0], self.source, dtype)
        entries = capture_entries(self.net, self.blocks, calibration.tokens.split(BATCH))
        for entry in entries[len(entries) - max(len(entries) // HELD_OUT, 1 if len(entries) > 1 else 0) :]:
            entry.held_out = True
        return entries

    def _round_block(self, block: nn.Module, index: int, entries: list[Entry]) -> dict[str, Rounded]:
        """Every planned linear of the block, by local name; the entries' hidden states move past the block."""
        name = self.blocks.names[index]
        schemes = self.plan.quantized(name)
        rounded: dict[str, Rounded] = {}
        if entries:
            groups = input_groups(block, entries[0], index)
            grids = _dynamic(schemes)
            walk = Walk(block, index, entries, groups, grids, self.threads)
            for k, group in enumerate(groups):
                wanted = [n for n in group.names if n in schemes]
                if not wanted:
                    continue
                width = linears(block)[wanted[0]].in_features
                statistics = Statistics.collect(walk, k, width)
                for scheme in dict.fromkeys(schemes[n] for n in wanted):
                    same = [n for n in wanted if schemes[n] == scheme]
                    results = self._round(block, name, same, scheme, statistics)
                    if scheme.static and scheme.activation:
                        weights = [self.stored(f"{name}.{n}.weight") for n in same]
                        scale = static_scale(walk, k, weights, scheme, self.source.checkpoint.dtype)
                        results = {n: replace(r, input_scale=scale) for n, r in results.items()}
                        grids.update({n: InputGrid(scheme.activation, scale) for n in same if scale is not None})
                    rounded |= results
            for entry, hidden in zip(entries, walk.finish(), strict=True):
                entry.hidden = hidden
        for local, scheme in schemes.items():
            if local not in rounded:  # no calibration data, or none that reached it
                empty = Statistics.empty(linears(block)[local].in_features) if entries else None
                rounded |= self._round(block, name, [local], scheme, empty)
            if scheme.static and rounded[local].input_scale is None:
                raise InputError(f"{name}.{local}: {UNKNOWN_SCALE}")
        return {local: rounded[local] for local in schemes}

    def _round(
        self, block: nn.Module, name: str, same: list[str], scheme: Scheme, statistics: Statistics | None
    ) -> dict[str, Rounded]:
        """Round linears of one input and scheme from their stored weights, and put the results into the block."""
        weights = {f"{name}.{n}": self.stored(f"{name}.{n}.weight") for n in same}
        units = {n: Units(self.equalized.columns.get(n), self.equalized.rows.get(n)) for n in weights}
        dtype = self.source.checkpoint.dtype
        results = round_linears(weights, scheme, statistics, self.recipe, dtype, units)
        by_local = {n: results[f"{name}.{n}"] for n in same}
        for local, result in by_local.items():
            if self.equalized.report:
                result.report["equalization"] = self.equalized.report.get(f"{name}.{local}")
            _put(block, local, result.quantized.dequantize(linears(block)[local].weight.dtype))
        return by_local

    def _replay(self, block: nn.Module, index: int, entries: list[Entry], shard: str) -> None:
        """Bring back a block that an earlier run finished, and let the calibration batches pass through it."""
        name = self.blocks.names[index]
        schemes = self.plan.quantized(name)
        tensors = safetensors.torch.load_file(self.work.path / shard)
        for local, scheme in schemes.items():
            quantized = unpack(f"{name}.{local}", tensors.__getitem__, scheme)
            _put(block, local, quantized.dequantize(linears(block)[local].weight.dtype))
        for local, parameter in block.named_parameters():  # norms and biases that an equalization changed
            if f"{name}.{local}" in tensors and local.removesuffix(".weight") not in schemes:
                parameter.data = tensors[f"{name}.{local}"].to(parameter.dtype)
        inputs = {n: unpack_input(f"{name}.{n}", tensors.__getitem__, s) for n, s in schemes.items()}
        grids = {n: grid for n, grid in inputs.items() if grid is not None}
        walk = Walk(block, index, entries, (), grids, self.threads)
        for entry, hidden in zip(entries, walk.finish(), strict=True):
            entry.hidden = hidden

    def _write(self, shard: str, name: str, rounded: Mapping[str, Rounded]) -> list[dict[str, Any]]:
        """The block's shard, packed linears and everything else as the checkpoint has it; then proof that the file
        says what was kept in memory, to the last bit; then the report that makes the block count as finished."""
        checkpoint = self.source.checkpoint
        packed = {f"{name}.{local}.weight" for local in rounded}
        tensors: dict[str, Tensor] = {
            t: self.stored(t) for t in checkpoint.tensors if t.startswith(name + ".") and t not in packed
        }
        for local, result in rounded.items():
            scheme = self.plan.schemes[f"{name}.{local}"]
            tensors |= pack(f"{name}.{local}", result.quantized, scheme, result.input_scale)
        self.work.write_shard(shard, tensors)
        read = safetensors.torch.load_file(self.work.path / shard)
        for local, result in rounded.items():
            back = unpack(f"{name}.{local}", read.__getitem__, self.plan.schemes[f"{name}.{local}"])
            if not torch.equal(back.dequantize(), result.quantized.dequantize()):
                raise AssertionError(f"{shard}: {name}.{local} reads back differently from what was written")
        report = [result.report for result in rounded.values()]
        self.work.write_report(shard, report)
        return report

    def _write_rest(self) -> None:
        """The last shard: everything outside the blocks, as the checkpoint has it."""
        checkpoint, names = self.source.checkpoint, self.blocks.names
        rest = [t for t in checkpoint.tensors if not any(t.startswith(n + ".") for n in names)]
        self.work.write_shard(shard_name(len(names), len(names)), {t: checkpoint.get(t) for t in rest})


def find_calibration(checkpoint: Checkpoint, recipe: Recipe) -> Calibration | None:
    """The windows the recipe asks for, or None for a method that needs none. Raises InputError as documented there."""
    schemes = [Scheme.parse(s) for s in (recipe.scheme, *(s for _, s in recipe.override))]
    needed = parse_method(recipe.method).needs_calibration or any(s.static for s in schemes)
    if not needed and recipe.calibration is None:
        return None
    source = recipe.calibration
    if source is None and checkpoint.path == DEMO / "model":
        source = str(DEMO / "calibration.txt")
    if source is None:
        what = f"method {recipe.method!r}" if parse_method(recipe.method).needs_calibration else "a static scheme"
        raise InputError(
            f"{what} needs text to calibrate on: --calibration FILE (.txt or .jsonl, best from the domain the model "
            "will be used in), or hub:NAME."
        )
    limit = checkpoint.config.get("max_position_embeddings")
    if isinstance(limit, int) and recipe.seq_len > limit:
        raise InputError(f"--seq-len {recipe.seq_len} is longer than the model's context of {limit} tokens.")
    calibration = load_calibration(source, load_tokenizer(checkpoint), recipe.samples, recipe.seq_len, recipe.seed)
    if recipe.calibration is None:
        calibration = replace(calibration, source="the demo's text")
    vocabulary = checkpoint.config.get("vocab_size")
    if isinstance(vocabulary, int) and int(calibration.tokens.max()) >= vocabulary:
        raise InputError(
            f"{checkpoint.path}: the tokenizer makes token {int(calibration.tokens.max())}, but the model has only "
            f"{vocabulary}: they belong to different models."
        )
    return calibration


def _put(block: nn.Module, local: str, weight: Tensor) -> None:
    linears(block)[local].weight = nn.Parameter(weight, requires_grad=False)


def _dynamic(schemes: Mapping[str, Scheme]) -> dict[str, InputGrid]:
    """The grids of inputs that are rounded with scales found at run time."""
    return {n: InputGrid(s.activation) for n, s in schemes.items() if s.activation is not None and not s.static}
