"""quantize: the loop over blocks.

1. open, plan, refuse                     preflight.py
2. calibration windows through the embeddings
3. for each block: statistics -> round, in the order the data flows, each group against inputs from the already
   quantized prefix -> keep the result only where it is no worse than RTN on held-out windows -> write the shard
4. close the directory; reload it and record the logits it computes
"""

import json
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import lowbit
from lowbit.algorithms import METHODS, Method, make_settings
from lowbit.algorithms.rtn import rtn
from lowbit.artifact import MANIFEST, Work, check_output, disk_errors, file_hashes, write_json
from lowbit.calibration import Calibration, load_calibration
from lowbit.card import write_card
from lowbit.console import note, track
from lowbit.errors import InputError
from lowbit.formats.compressed_tensors import pack, quantization_config, unpack
from lowbit.model.checkpoint import DEMO, INDEX, Checkpoint, open_checkpoint
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
from lowbit.model.stream import fingerprint
from lowbit.model.walk import Entry, Lockstep, capture_entries, find_blocks, input_groups, linears
from lowbit.preflight import Plan, check_disk, make_plan
from lowbit.recipe import Recipe
from lowbit.scheme import Scheme
from lowbit.stats import Hessian, quadratic_loss
from lowbit.tensor import QuantizedTensor

BATCH = 4  # windows a batch: activations of a small model stay in the cache
HELD_OUT = 16  # one batch in this many checks the method instead of feeding it


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
    """Quantize `model` into the directory `output`; returns the `quantize` document (see docs/structure.md).

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
    partial = output.with_name(output.name + ".partial")
    written = sum(f.stat().st_size for f in partial.glob("*.safetensors")) if resume and partial.exists() else 0
    check_disk(plan, output, written)
    calibration = _calibration(checkpoint, recipe)
    checkpoint.check_finite()
    identity = {
        "model": checkpoint.digest,
        "calibration": calibration.digest if calibration else None,
        "recipe": recipe.to_dict() | {"calibration": None},  # a moved file with the same windows is the same job
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }
    work = Work(output, identity, resume=resume, force=force)

    source = open_source(net, checkpoint)
    job = _Job(net, source, plan, METHODS[recipe.method], make_settings(recipe.method, dict(recipe.set)), work)
    layers = job.run(blocks.names, calibration)
    job.write_rest(blocks.names)

    _write_small_files(checkpoint, plan, work, len(blocks.names))
    with disk_errors(work.path):
        manifest = {
            "lowbit_version": lowbit.__version__,
            "model": {"name": checkpoint.name, "digest": checkpoint.digest},
            "recipe": recipe.to_dict(),
            "calibration": None
            if calibration is None
            else {"source": calibration.source, "digest": calibration.digest},
            "versions": versions(),
            "layers": layers,
            "fingerprint": fingerprint(open_checkpoint(work.path)),
            "files": file_hashes(work.path),
        }
        document = _document(output, recipe, plan, layers, time.perf_counter() - start)
        write_json(work.path / MANIFEST, manifest | {"summary": document | {"layers": None}})
        write_card(work.path, manifest, document)
    work.close()
    return document


@dataclass
class _Job:
    """The parts that the loop over blocks works with."""

    net: nn.Module
    source: Source
    plan: Plan
    method: Method
    settings: Any
    work: Work

    def run(self, names: tuple[str, ...], calibration: Calibration | None) -> list[dict[str, Any]]:
        """Quantize every block in order; finished ones are read back. Returns one report a linear."""
        entries: list[Entry] = []
        dtype = compute_dtype()
        if calibration is not None:
            materialize_outside(self.net, find_blocks(self.net), self.source, dtype)  # type: ignore[arg-type]
            materialize(self.net, names[0], self.source, dtype)
            batches = list(calibration.tokens.split(BATCH))
            entries = capture_entries(self.net, find_blocks(self.net), batches)
        layers: list[dict[str, Any]] = []
        for i, name in enumerate(track(names, "quantizing blocks", len(names))):
            shard = shard_name(i, len(names))
            started = time.perf_counter()
            block = materialize(self.net, name, self.source, dtype)
            report = self.work.report(shard)
            if report is None:
                report = self._quantize_block(block, name, i, entries, shard)
            else:
                self._install_finished(block, name, i, entries, shard)
            release(block)
            layers += report
            note(_block_line(name, report, time.perf_counter() - started), level=1 if len(names) < 200 else 2)
        return layers

    def _quantize_block(
        self, block: nn.Module, name: str, index: int, entries: list[Entry], shard: str
    ) -> list[dict[str, Any]]:
        schemes = self.plan.quantized(name)
        kept: dict[str, QuantizedTensor] = {}
        reports: dict[str, dict[str, Any]] = {}
        modules = linears(block)

        def install(local: str, quantized: QuantizedTensor, report: dict[str, Any]) -> None:
            modules[local].weight = nn.Parameter(quantized.dequantize(modules[local].weight.dtype), requires_grad=False)
            kept[local], reports[local] = quantized, report

        if entries:
            groups = input_groups(block, entries[0], index)
            walk = Lockstep(block, index, entries, groups, _activations(schemes))
            for k, group in enumerate(groups):
                wanted = [n for n in group.names if n in schemes]
                if wanted:
                    width = modules[wanted[0]].in_features
                    train, held_out = _hessians(walk.inputs(k), width, len(entries))
                    for names in _same_scheme(wanted, schemes):
                        self._round_together(name, names, schemes[names[0]], train, held_out, install)
            for entry, hidden in zip(entries, walk.finish(), strict=True):
                entry.hidden = hidden
        missed = [n for n in schemes if n not in kept]
        for local in missed:
            self._round_alone(name, local, schemes[local], bool(entries), install)

        tensors = self._block_tensors(name, kept, schemes)
        report = [reports[n] for n in schemes]
        self.work.write_shard(shard, tensors, report)
        self._prove(name, kept, schemes, shard)
        return report

    def _round_together(
        self,
        block: str,
        names: list[str],
        scheme: Scheme,
        train: Hessian,
        held_out: Hessian,
        install: Callable[[str, QuantizedTensor, dict[str, Any]], None],
    ) -> None:
        """Linears with one input and one scheme are rows of one matrix: one factorization, one sweep."""
        started = time.perf_counter()
        grid = scheme.weight
        assert grid is not None
        weights = [self.source.checkpoint.get(f"{block}.{n}.weight").float() for n in names]
        sizes = [len(w) for w in weights]
        weight = torch.cat(weights)
        plain = rtn(weight, grid, _scale_dtype(weights, self.source.checkpoint))
        where = f"{block}.{names[0]}"
        if train.rows == 0:
            result, notes, fallback = plain, {}, "no calibration token reached this layer: rtn"
        else:
            if train.bad_rows > 0.1 * (train.rows + train.bad_rows):
                raise InputError(
                    f"{where}: {train.bad_rows} of {train.rows + train.bad_rows} calibration activations are not "
                    "finite. The model overflows on this text; check the checkpoint and the calibration data."
                )
            result, notes, fallback = self._round(weight, train, scheme, plain)
        seconds = (time.perf_counter() - started) / len(names)
        for name, w, mine, theirs in zip(
            names, weights, result.split_rows(sizes), plain.split_rows(sizes), strict=True
        ):
            reason, chosen = fallback, mine
            losses = [_loss(w, q, train, held_out) for q in (theirs, mine)]
            if reason is None and held_out.rows and losses[1][1] > losses[0][1]:
                reason, chosen = "worse than rtn on held-out windows: rtn", theirs
                losses[1] = losses[0]
            report = {
                "name": f"{block}.{name}",
                "scheme": str(scheme),
                "bits": chosen.stored_bits / chosen.codes.numel(),
                "weights": chosen.codes.numel(),
                "loss_rtn": losses[0][0],
                "loss": losses[1][0],
                "seconds": seconds,
                "fallback": reason,
                **notes,
            }
            if train.bad_rows:
                report["bad_rows"] = train.bad_rows
            install(name, chosen, report)

    def _round(
        self, weight: Tensor, train: Hessian, scheme: Scheme, plain: QuantizedTensor
    ) -> tuple[QuantizedTensor, dict[str, Any], str | None]:
        """The method's result; or RTN and the reason, where the statistics do not allow the method."""
        assert scheme.weight is not None
        try:
            result, notes = self.method.rounding(weight, train.mean(), scheme.weight, self.settings, plain.scale.dtype)
        except ValueError as error:
            return plain, {}, f"{error}: rtn"
        return result, notes, None

    def _round_alone(
        self,
        block: str,
        local: str,
        scheme: Scheme,
        calibrated: bool,
        install: Callable[[str, QuantizedTensor, dict[str, Any]], None],
    ) -> None:
        """A linear without statistics: no calibration data (by choice), or none that reached it (a fallback)."""
        started = time.perf_counter()
        grid = scheme.weight
        assert grid is not None
        weight = self.source.checkpoint.get(f"{block}.{local}.weight")
        dtype = _scale_dtype([weight], self.source.checkpoint)
        if self.method.needs_calibration:
            result = rtn(weight, grid, dtype)
        else:
            result, _ = self.method.rounding(weight, None, grid, self.settings, dtype)
        report = {
            "name": f"{block}.{local}",
            "scheme": str(scheme),
            "bits": result.stored_bits / result.codes.numel(),
            "weights": result.codes.numel(),
            "loss_rtn": None,
            "loss": None,
            "seconds": time.perf_counter() - started,
            "fallback": "no calibration token reached this layer: rtn" if calibrated else None,
        }
        install(local, result, report)

    def _install_finished(self, block: nn.Module, name: str, index: int, entries: list[Entry], shard: str) -> None:
        """Bring back a block that an earlier run finished, and let the calibration batches pass through it."""
        if not entries:
            return
        schemes = self.plan.quantized(name)
        tensors = safetensors.torch.load_file(self.work.path / shard)
        modules = linears(block)
        for local, scheme in schemes.items():
            value = unpack(f"{name}.{local}", tensors.__getitem__, scheme).dequantize(modules[local].weight.dtype)
            modules[local].weight = nn.Parameter(value, requires_grad=False)
        walk = Lockstep(block, index, entries, (), _activations(schemes))
        for entry, hidden in zip(entries, walk.finish(), strict=True):
            entry.hidden = hidden

    def _block_tensors(
        self, name: str, kept: dict[str, QuantizedTensor], schemes: dict[str, Scheme]
    ) -> dict[str, Tensor]:
        """The block's shard: packed linears, everything else as the checkpoint has it."""
        packed = {f"{name}.{local}.weight" for local in kept}
        checkpoint = self.source.checkpoint
        tensors = {t: checkpoint.get(t) for t in checkpoint.tensors if t.startswith(name + ".") and t not in packed}
        for local, quantized in kept.items():
            tensors |= pack(f"{name}.{local}", quantized, schemes[local])
        return tensors

    def _prove(self, name: str, kept: dict[str, QuantizedTensor], schemes: dict[str, Scheme], shard: str) -> None:
        """What the file says is what was kept in memory, to the last bit."""
        tensors = safetensors.torch.load_file(self.work.path / shard)
        for local, quantized in kept.items():
            read = unpack(f"{name}.{local}", tensors.__getitem__, schemes[local])
            if not torch.equal(read.dequantize(), quantized.dequantize()):
                raise AssertionError(f"{shard}: {name}.{local} reads back differently from what was written")

    def write_rest(self, names: tuple[str, ...]) -> None:
        """The last shard: everything outside the blocks, as the checkpoint has it."""
        checkpoint = self.source.checkpoint
        rest = [t for t in checkpoint.tensors if not any(t.startswith(n + ".") for n in names)]
        self.work.write_shard(shard_name(len(names), len(names)), {t: checkpoint.get(t) for t in rest}, [])


def _calibration(checkpoint: Checkpoint, recipe: Recipe) -> Calibration | None:
    """The windows the recipe asks for, or None for a method that needs none."""
    if not METHODS[recipe.method].needs_calibration and recipe.calibration is None:
        return None
    source = recipe.calibration
    if source is None and checkpoint.path == DEMO / "model":
        source = str(DEMO / "calibration.txt")
    if source is None:
        raise InputError(
            f"method {recipe.method!r} needs text to calibrate on: --calibration FILE (.txt or .jsonl, best from the "
            "domain the model will be used in), or hub:NAME."
        )
    limit = checkpoint.config.get("max_position_embeddings")
    if isinstance(limit, int) and recipe.seq_len > limit:
        raise InputError(f"--seq-len {recipe.seq_len} is longer than the model's context of {limit} tokens.")
    calibration = load_calibration(source, load_tokenizer(checkpoint), recipe.samples, recipe.seq_len, recipe.seed)
    vocabulary = checkpoint.config.get("vocab_size")
    if isinstance(vocabulary, int) and int(calibration.tokens.max()) >= vocabulary:
        raise InputError(
            f"{checkpoint.path}: the tokenizer makes token {int(calibration.tokens.max())}, but the model has only "
            f"{vocabulary}: they belong to different models."
        )
    return calibration


def _activations(schemes: dict[str, Scheme]) -> dict[str, Any]:
    return {name: s.activation for name, s in schemes.items() if s.activation is not None}


def _hessians(inputs: Any, width: int, batches: int) -> tuple[Hessian, Hessian]:
    """(statistics for the method, statistics of the held-out batches: the last sixteenth, at least one of two)."""
    train, held_out = Hessian(width), Hessian(width)
    first_held_out = batches - max(batches // HELD_OUT, 1 if batches > 1 else 0)
    for n, x in enumerate(inputs):
        (train if n < first_held_out else held_out).update(x)
    return train, held_out


def _same_scheme(names: list[str], schemes: dict[str, Scheme]) -> list[list[str]]:
    """Names grouped by scheme; a scheme whose scales span rows keeps each linear by itself."""
    groups: dict[Any, list[str]] = {}
    for name in names:
        weight = schemes[name].weight
        assert weight is not None
        together = weight.granularity in ("channel", "group")
        groups.setdefault((schemes[name], None if together else name), []).append(name)
    return list(groups.values())


def _loss(weight: Tensor, quantized: QuantizedTensor, train: Hessian, held_out: Hessian) -> tuple[float, float]:
    """The layer's loss under all calibration rows, and under the held-out ones."""
    error = weight - quantized.dequantize()
    every = Hessian(train.width)
    every.merge(train)
    every.merge(held_out)
    return quadratic_loss(error, every.mean()), quadratic_loss(error, held_out.mean())


def _scale_dtype(weights: list[Tensor], checkpoint: Checkpoint) -> torch.dtype:
    return checkpoint.dtype


def shard_name(index: int, blocks: int) -> str:
    return f"model-{index + 1:05d}-of-{blocks + 1:05d}.safetensors"


def versions() -> dict[str, str]:
    import transformers

    return {"lowbit": lowbit.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _block_line(name: str, report: list[dict[str, Any]], seconds: float) -> str:
    loss, plain = (sum(r[k] for r in report if r[k] is not None) for k in ("loss", "loss_rtn"))
    fallbacks = [r for r in report if r["fallback"]]
    text = f"{name}: {len(report)} linears, {seconds:.1f} s"
    if plain:
        text += f", loss {loss:.4g} ({loss / plain:.0%} of rtn)"
    for r in fallbacks:
        text += f"\n  {r['name']}: {r['fallback']}"
    return text


def _write_small_files(checkpoint: Checkpoint, plan: Plan, work: Work, blocks: int) -> None:
    """config.json with its quantization_config, the index, and the tokenizer's files as they were."""
    with disk_errors(work.path):
        config = checkpoint.config | {"quantization_config": quantization_config(plan.schemes)}
        write_json(work.path / "config.json", config)
        weight_map, total = {}, 0
        for i in range(blocks + 1):
            shard = shard_name(i, blocks)
            with (work.path / shard).open("rb") as stream:
                header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            for name, entry in header.items():
                if name != "__metadata__":
                    weight_map[name] = shard
                    total += entry["data_offsets"][1] - entry["data_offsets"][0]
        write_json(
            work.path / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        )
        for pattern in ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
                        "generation_config.json", "*.jinja", "*.model", "LICENSE*"):  # fmt: skip
            for file in checkpoint.path.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, work.path / file.name)


def _document(output: Path, recipe: Recipe, plan: Plan, layers: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    weights = {r["name"]: r["bits"] for r in layers}
    sizes = {r["name"]: r["weights"] for r in layers}
    bits = sum(weights[n] * sizes[n] for n in weights) / sum(sizes.values())
    return {
        "output": str(output),
        "scheme": recipe.scheme,
        "method": recipe.method,
        "seconds": seconds,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "bits_per_weight": bits,
        "layers": layers,
    }
