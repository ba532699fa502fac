"""The loop over blocks: equalize, round, write, prove; and the way back through blocks that are finished already."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.activations import UNKNOWN_SCALE, static_scale
from lowbit.algorithms import METHODS
from lowbit.algorithms.compose import parse_method, settings_of
from lowbit.algorithms.signround import resting_point
from lowbit.allocator import give_back
from lowbit.artifact import Work, disk_errors
from lowbit.calibration import Calibration
from lowbit.clipping import inputs_report
from lowbit.console import note, track
from lowbit.environment import compute_dtype
from lowbit.equalization import Equalized, Equalizer, make_equalizer
from lowbit.errors import InputError
from lowbit.formats.choose import Format
from lowbit.formats.compressed_tensors import unpack_input
from lowbit.kv_scales import block_scales
from lowbit.learning import Learned, learn_block, learn_model, say
from lowbit.losses import Statistics, Units
from lowbit.manifest import shard_name
from lowbit.memory import windows_at_once
from lowbit.model.checkpoint import read_header
from lowbit.model.load import (
    Source,
    compute_buffers,
    materialize,
    release,
)
from lowbit.model.lockstep import Walk
from lowbit.model.original import Correction, Original
from lowbit.model.outside import Outside
from lowbit.model.walk import Blocks, Entry, capture_entries, input_groups, linears
from lowbit.parking import WIDE, aside
from lowbit.preflight import Plan
from lowbit.recipe import Recipe
from lowbit.repair import repair
from lowbit.rounding import Rounded, block_line, replaced, round_linears, round_plain
from lowbit.scheme import Scheme
from lowbit.shards import Later, read_tensor
from lowbit.tensor import InputGrid, QuantizedTensor

HELD_OUT = 16  # one batch in this many checks the method instead of feeding it


@dataclass
class Job:
    """The parts that the loop over blocks works with, and what equalization made of the present block."""

    net: PreTrainedModel
    source: Source
    blocks: Blocks
    plan: Plan
    recipe: Recipe
    work: Work
    layout: Format
    threads: int
    frugal: bool  # activations on disk, and one batch at a time in memory
    equalized: Equalized = field(default_factory=Equalized)
    seen: dict[str, Statistics] = field(default_factory=dict)  # by full name, of linears that are still being learned
    kv_scales: dict[str, Tensor] = field(default_factory=dict)  # of the present block, by the files' names

    @property
    def batch(self) -> int:
        """Calibration windows that pass a block together."""
        return windows_at_once(self.net, self.blocks, self.recipe.seq_len)

    def stored(self, name: str) -> Tensor:
        """A tensor as it is to be quantized or copied."""
        changed = self.equalized.tensors
        return changed[name] if name in changed else self.source.checkpoint.get(name)

    def run(self, calibration: Calibration | None) -> list[dict[str, Any]]:
        """Quantize every block in order, or read it back if it is finished. Returns one report a linear."""
        names = self.blocks.names
        dtype = compute_dtype()
        entries, equalizer = ([], None) if calibration is None else self._enter(calibration, dtype)
        settings = self._settings()
        learns = METHODS[parse_method(self.recipe.method).rounding].learns and bool(entries)
        whole = learns and settings.scope == "model"
        follows = (learns and not whole) or getattr(settings, "follow_original", False)
        original = Original(entries, self.threads) if entries and follows else None
        layers: list[dict[str, Any]] = []
        waiting: list[tuple[str, Equalized, dict[str, Rounded]]] = []  # blocks that are written when all are learned
        for index, name in enumerate(track(names, "quantizing blocks", len(names))):
            started = time.perf_counter()
            shard = shard_name(index, len(names))
            block = materialize(self.net, name, self.source, dtype)
            report = None if whole else self.work.report(shard)
            if report is None:
                if equalizer is not None:
                    schemes, get = self.plan.quantized(name), self.source.checkpoint.get
                    self.equalized = equalizer.equalize(block, name, index, entries, schemes, get)
                rounded = self._round_block(block, index, entries, original)
                if whole:
                    waiting.append((name, self.equalized, rounded))
                    release(block)
                    note(block_line(name, [r.report for r in rounded.values()], time.perf_counter() - started))
                    continue
                stored = [t for t in self.source.checkpoint.tensors if t.startswith(name + ".")]
                report = self._write(shard, stored, {f"{name}.{n}": r for n, r in rounded.items()})
            else:
                self.plan.schemes.update({r["name"]: Scheme.parse(r["scheme"]) for r in report})
                if entries:
                    self._replay(block, index, entries, original, shard)
            release(block)
            give_back(thoroughly=self.frugal)
            layers += report
            note(block_line(name, report, time.perf_counter() - started))
        if waiting and calibration is not None:
            layers = self._learn_whole(calibration, [e.held_out for e in entries], waiting)
        self.equalized = Equalized()
        return layers + self._write_rest()

    def _enter(self, calibration: Calibration, dtype: torch.dtype) -> tuple[list[Entry], Equalizer | None]:
        """The batches in front of the first block, and what a method that equalizes needs to know of the model."""
        outside = Outside(self.net, self.blocks, self.source, dtype)
        materialize(self.net, self.blocks.names[0], self.source, dtype)
        file = self.work.activations if self.frugal else None
        with disk_errors(self.work.path):
            entries = capture_entries(self.net, self.blocks, calibration.tokens.split(self.batch), file)
        storage, tokens = self.source.checkpoint.dtype, calibration.tokens
        equalizer = make_equalizer(self.net, self.blocks, tokens, self.recipe, storage, self.threads)
        outside.close()
        release(self.net)
        compute_buffers(self.net)
        for entry in entries[len(entries) - max(len(entries) // HELD_OUT, 1 if len(entries) > 1 else 0) :]:
            entry.held_out = True
        return entries, equalizer

    def _settings(self) -> Any:
        """Of the part of the method that rounds."""
        method = parse_method(self.recipe.method)
        return settings_of(method, dict(self.recipe.set))[method.rounding]

    def _round_block(
        self, block: nn.Module, index: int, entries: list[Entry], original: Original | None
    ) -> dict[str, Rounded]:
        """Every planned linear of the block, by local name; the entries' hidden states move past the block."""
        name = self.blocks.names[index]
        schemes = self.plan.quantized(name)
        rounded: dict[str, Rounded] = {}
        if entries:
            groups = input_groups(block, entries[0], index, entries[1:])
            if original is not None:
                original.enter(block, index, groups)
            watched = [] if original is None else original.watched
            frugal = self.frugal and original is None
            grids = _dynamic(schemes)
            walk = Walk(block, index, entries, groups, grids, self.threads, watched, recompute=frugal)
            for k, group in enumerate(groups):
                wanted = [n for n in group.names if n in schemes]
                if not wanted:
                    continue
                width = linears(block)[wanted[0]].in_features
                if frugal:
                    _drop(block, wanted)
                statistics = Statistics.collect(walk, k, width)
                correction = None
                if original is not None and statistics.train.rows and self._settings().follow_original:
                    correction = original.correction(walk, k, wanted, statistics.train.mean())
                if METHODS[parse_method(self.recipe.method).rounding].learns and statistics.train.rows:
                    self.seen.update({f"{name}.{n}": statistics for n in wanted})
                for scheme in dict.fromkeys(schemes[n] for n in wanted):
                    same = [n for n in wanted if schemes[n] == scheme]
                    results = self._round(block, name, same, scheme, statistics, correction)
                    if scheme.static and scheme.activation:
                        weights = [self.stored(f"{name}.{n}.weight") for n in same]
                        scale, share = static_scale(walk, k, weights, scheme, self.source.checkpoint.dtype)
                        results = {n: replace(r, input_scale=scale) for n, r in results.items()}
                        for result in results.values():
                            result.report.update(inputs_report(share, result.report))
                        grids.update({n: InputGrid(scheme.activation, scale) for n in same if scale is not None})
                    rounded |= results
                del statistics  # of a wide input a large part of what is in memory
                for n in wanted:
                    _put(block, n, rounded[n].quantized)
            if self.recipe.kv_scheme is not None:
                module = self.source.checkpoint.stored_module
                self.kv_scales = block_scales(block, name, index, entries, grids, self.recipe.kv_scheme, module)
            hidden_states = walk.finish()
            if original is not None:
                original.leave()
            if self.seen and original is not None and self._settings().scope == "block":
                rounded, hidden_states = self._learn_block(block, index, entries, original, rounded, grids)
            for entry, hidden in zip(entries, hidden_states, strict=True):
                entry.hidden = hidden
        for local, scheme in schemes.items():
            if local not in rounded:  # no calibration data, or none that reached it
                empty = Statistics.empty(linears(block)[local].in_features) if entries else None
                rounded |= self._round(block, name, [local], scheme, empty)
                _put(block, local, rounded[local].quantized)
            if scheme.static and rounded[local].input_scale is None:
                raise InputError(f"{name}.{local}: {UNKNOWN_SCALE}")
        return {local: rounded[local] for local in schemes}

    def _round(
        self,
        block: nn.Module,
        name: str,
        same: list[str],
        scheme: Scheme,
        statistics: Statistics | None,
        correction: Correction | None = None,
    ) -> dict[str, Rounded]:
        """Round linears of one input and scheme from their stored weights."""
        weights = {f"{name}.{n}": self.stored(f"{name}.{n}.weight") for n in same}
        goals = {} if correction is None else {f"{name}.{n}": correction.goal(n, weights[f"{name}.{n}"]) for n in same}
        units = {n: Units(self.equalized.columns.get(n), self.equalized.rows.get(n)) for n in weights}
        dtype = self.source.checkpoint.dtype
        by_local = {}
        wide = statistics is not None and statistics.train.width >= WIDE
        with disk_errors(self.work.path), aside(p.data for p in block.parameters() if wide and not p.is_meta):
            results = round_linears(weights, scheme, statistics, self.recipe, dtype, goals, units)
            for n in same:
                full = f"{name}.{n}"
                by_local[n], self.plan.schemes[full] = repair(
                    full, weights[full], scheme, statistics, self.recipe, dtype, results[full]
                )
        for local, result in by_local.items():
            if self.equalized.report:
                result.report["equalization"] = self.equalized.report.get(f"{name}.{local}")
        return by_local

    def _learn_block(
        self,
        block: nn.Module,
        index: int,
        entries: list[Entry],
        original: Original,
        rounded: Mapping[str, Rounded],
        grids: Mapping[str, InputGrid],
    ) -> tuple[dict[str, Rounded], list[Tensor]]:
        """The block's linears rounded again towards the original's output (learning.py), in the block too; and the
        hidden states that it then makes."""
        name = self.blocks.names[index]
        learning = {n: r for n, r in rounded.items() if f"{name}.{n}" in self.seen}
        start = {n: r.quantized for n, r in learning.items()}
        resting = {n: self._resting(f"{name}.{n}", self.stored(f"{name}.{n}.weight"), q) for n, q in start.items()}
        targets = [e.hidden for e in original.entries]
        learned = learn_block(block, index, entries, targets, resting, start, grids, self._settings())
        say(name, learned)
        result = dict(rounded) | {n: self._learned(f"{name}.{n}", r, learned, n) for n, r in learning.items()}
        for n in learning:
            _put(block, n, result[n].quantized)
        self.seen = {}
        return result, Walk(block, index, entries, (), grids, self.threads, recompute=self.frugal).finish()

    def _learn_whole(
        self, calibration: Calibration, held_out: list[bool], waiting: list[tuple[str, Equalized, dict[str, Rounded]]]
    ) -> list[dict[str, Any]]:
        """All blocks rounded again towards the original's answers, and written. Returns one report a linear."""
        net, names = self.net, self.blocks.names
        materialize(net, "", self.source, torch.float32)
        net.tie_weights()
        found: dict[str, Rounded] = {}
        for name, equalized, rounded in waiting:
            for tensor, value in equalized.tensors.items():
                net.get_parameter(tensor).data = value.float()
            found |= {f"{name}.{n}": r for n, r in rounded.items()}
        schemes = {n: self.plan.schemes[n].activation for n in self.seen}
        grids = {n: InputGrid(a, found[n].input_scale) for n, a in schemes.items() if a is not None}
        batches, judges = list(calibration.tokens.split(self.batch)), [i for i, held in enumerate(held_out) if held]
        start = {n: found[n].quantized for n in self.seen}
        resting = {n: self._resting(n, net.get_parameter(f"{n}.weight").data, q) for n, q in start.items()}
        learned = learn_model(net, batches, judges, resting, start, grids, self._settings())
        say("all blocks", learned)
        release(net)
        layers = []
        for index, (name, equalized, rounded) in enumerate(waiting):
            self.equalized = equalized
            final = {f"{name}.{n}": self._learned(f"{name}.{n}", r, learned, f"{name}.{n}") for n, r in rounded.items()}
            stored = [t for t in self.source.checkpoint.tensors if t.startswith(name + ".")]
            layers += self._write(shard_name(index, len(names)), stored, final)
        return layers

    def _resting(self, full: str, weight: Tensor, start: QuantizedTensor) -> Tensor:
        return resting_point(weight, start, self.seen[full].train.mean())

    def _learned(self, full: str, first: Rounded, learned: Learned, key: str) -> Rounded:
        """The linear's result after learning, with its report."""
        if key not in learned.tensors:
            return first
        noted = {
            "learned": {"loss_before": learned.loss_before, "loss_after": learned.loss_after, "kept": learned.kept}
        }
        if not learned.kept:
            return replace(first, report=first.report | noted)
        units = Units(self.equalized.columns.get(full), self.equalized.rows.get(full))
        weight = self.stored(f"{full}.weight")
        return replaced(first, learned.tensors[key], weight, self.seen[full], units, noted)

    def _replay(
        self, block: nn.Module, index: int, entries: list[Entry], original: Original | None, shard: str
    ) -> None:
        """Bring back a block that an earlier run finished, and let the calibration batches pass through it."""
        if original is not None:
            original.enter(block, index, ())
            original.leave()
        name = self.blocks.names[index]
        schemes = self.plan.quantized(name)
        read = self._reader(shard)
        for local, scheme in schemes.items():
            quantized = self.layout.unpack(self.source.checkpoint.stored_module(f"{name}.{local}"), read, scheme)
            _put(block, local, quantized)
        checkpoint, tensors = self.source.checkpoint, read_header(self.work.path / shard)
        for local, parameter in block.named_parameters():  # norms and biases that an equalization changed
            there = checkpoint.stored_tensor(f"{name}.{local}")
            unchanged = f"{name}.{local}" in checkpoint.transposed
            if there in tensors and not unchanged and local.removesuffix(".weight") not in schemes:
                parameter.data = read(there).to(parameter.dtype)
        inputs = {n: unpack_input(checkpoint.stored_module(f"{name}.{n}"), read, s) for n, s in schemes.items()}
        grids = {n: grid for n, grid in inputs.items() if grid is not None}
        walk = Walk(block, index, entries, (), grids, self.threads, recompute=self.frugal)
        for entry, hidden in zip(entries, walk.finish(), strict=True):
            entry.hidden = hidden

    def _write(self, shard: str, stored: Iterable[str], rounded: Mapping[str, Rounded]) -> list[dict[str, Any]]:
        """One shard, packed weights (by full name) and every other tensor of `stored` as the checkpoint has it; then
        proof that the file says what was kept in memory, to the last bit; then the report that makes it finished."""
        checkpoint = self.source.checkpoint
        packed = {f"{name}.weight" for name in rounded}
        tensors: dict[str, Tensor | Later] = {
            checkpoint.stored_tensor(t): self.equalized.tensors[t]
            if t in self.equalized.tensors
            else checkpoint.later(t)
            for t in stored
            if t not in packed
        }
        for name, result in rounded.items():
            module = checkpoint.stored_module(name)
            tensors |= self.layout.pack(module, result.quantized, self.plan.schemes[name])
            if result.input_scale is not None:
                tensors[f"{module}.input_scale"] = result.input_scale.reshape(1).clone()  # several may share it
        tensors |= self.kv_scales
        self.kv_scales = {}
        self.work.write_shard(shard, tensors)
        read = self._reader(shard)
        for name, result in rounded.items():
            back = self.layout.unpack(checkpoint.stored_module(name), read, self.plan.schemes[name])
            if not back.equals(result.quantized):
                raise AssertionError(f"{shard}: {name} reads back differently from what was written")
        report = [result.report for result in rounded.values()]
        self.work.write_report(shard, report)
        return report

    def _reader(self, shard: str) -> Callable[[str], Tensor]:
        """By name, one tensor of a shard that was written."""
        file = self.work.path / shard
        infos = read_header(file)
        return lambda name: read_tensor(file, infos[name].start, infos[name].dtype, infos[name].shape)

    def _write_rest(self) -> list[dict[str, Any]]:
        """The last shard: everything outside the blocks, as the checkpoint has it or as an override asks."""
        checkpoint, names = self.source.checkpoint, self.blocks.names
        rest = [t for t in checkpoint.tensors if not any(t.startswith(n + ".") for n in names)]
        rounded = {}
        for name, scheme in self.plan.schemes.items():
            if scheme.weight is not None and f"{name}.weight" in rest:
                rounded[name] = round_plain(name, checkpoint.get(f"{name}.weight"), scheme, checkpoint.dtype)
        return self._write(shard_name(len(names), len(names)), rest, rounded)


def _put(block: nn.Module, local: str, quantized: QuantizedTensor) -> None:
    """Let a linear of the block compute with what its weight has become."""
    linear = linears(block)[local]
    linear.weight = nn.Parameter(quantized.dequantize(linear.weight.dtype), requires_grad=False)


def _drop(block: nn.Module, names: Iterable[str]) -> None:
    """Let go of weights that are rounded next: no batch passes them before, and they are read from the file for it."""
    for name in names:
        linear = linears(block)[name]
        linear.weight = nn.Parameter(linear.weight.to("meta"), requires_grad=False)


def _dynamic(schemes: Mapping[str, Scheme]) -> dict[str, InputGrid]:
    """The grids of inputs that are rounded with scales found at run time."""
    return {n: InputGrid(s.activation) for n, s in schemes.items() if s.activation is not None and not s.static}
