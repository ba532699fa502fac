"""quantize: from a checkpoint to a directory.

1. open, plan, refuse                     preflight.py
2. calibration windows through the embeddings
3. for each block: equalize (equalization.py); statistics -> round, in the order the data flows, each group against
   inputs from the already quantized prefix (model/walk.py, rounding.py) -> write the shard, read it back, compare
   (job.py)
4. close the directory; reload it and record the logits it computes
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lowbit.algorithms import METHODS
from lowbit.algorithms.compose import parse_method, settings_of
from lowbit.allocator import give_back, return_at_once, settled
from lowbit.artifact import MANIFEST, Work, check_output, check_same, clean, read_manifest, replaces
from lowbit.calibration import Calibration, load_calibration
from lowbit.errors import InputError
from lowbit.forecast import forecast
from lowbit.formats import kv_cache
from lowbit.formats.choose import format_for
from lowbit.job import Job
from lowbit.kv_scales import kv_report
from lowbit.manifest import document_of, finish_directory, named_twice, versions
from lowbit.memory import choose_frugal, estimate_memory
from lowbit.model.checkpoint import DEMO, Checkpoint, open_checkpoint
from lowbit.model.load import (
    load_tokenizer,
    open_source,
    skeleton,
)
from lowbit.model.rotate import rotate
from lowbit.model.stream import probe
from lowbit.model.walk import find_blocks
from lowbit.parking import parking_in
from lowbit.preflight import check_disk, make_plan
from lowbit.recipe import Recipe
from lowbit.scheme import Scheme
from lowbit.workers import check_workers, default_workers, using


@torch.no_grad()
def quantize(
    model: str | Path,
    output: str | Path,
    recipe: Recipe | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    max_memory: int | None = None,
    dry_run: bool = False,
    workers: int | None = None,
    **words: Any,
) -> dict[str, Any]:
    """Quantize `model` into the directory `output`; returns the `quantize` document.

    The recipe is given whole or as its words (scheme="w4a16", method="gptq", ...). Raises InputError for bad input;
    an interrupted run leaves `output`.partial, which resume=True finishes to the same bytes. `max_memory` (bytes, by
    default what is available) decides whether activations stay in memory, `workers` how many processes round weights
    (lowbit/workers.py; by default one a core); neither changes the result. With `dry_run` nothing is written, and the
    document holds the forecast only.
    """
    recipe = recipe or Recipe(**words)
    start = time.perf_counter()
    output = Path(output)
    processes = workers or default_workers()
    check_workers(processes if workers is None else workers)
    check_output(output, resume=resume, force=force)
    checkpoint = open_checkpoint(model)
    net = skeleton(checkpoint)
    source = open_source(net, checkpoint)
    checkpoint = source.checkpoint
    blocks = find_blocks(net)
    plan = make_plan(net, blocks, checkpoint, recipe)
    check_disk(plan, output, resume=resume)
    probe(net, source, blocks)
    calibration = find_calibration(checkpoint, recipe)
    give_back(thoroughly=False)
    memory = estimate_memory(net, blocks, recipe, checkpoint.dtype, torch.get_num_threads(), processes)
    if workers is None and max_memory is not None and memory.least > max_memory:
        processes = 1
        memory = estimate_memory(net, blocks, recipe, checkpoint.dtype, torch.get_num_threads(), processes)
    frugal = choose_frugal(memory, max_memory)
    check_disk(plan, output, resume=resume, spilled=memory.spilled if frugal else 0)
    return_at_once(1 << 20 if frugal else 4 << 20)  # asking the system anew for every small one takes a tenth longer
    predicted = forecast(
        net,
        source,
        blocks,
        plan,
        recipe,
        memory,
        calibration,
        frugal=frugal,
        small_too=dry_run,
        workers=processes,
        spent=time.perf_counter() - start,
    )
    if dry_run:
        return {"output": str(output), "scheme": recipe.scheme, "method": recipe.method, "predicted": predicted}
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
    if frugal:
        give_back(thoroughly=True)  # what the forecast has tried
    method = parse_method(recipe.method)
    if method.rotation is not None:
        turned = rotate(checkpoint, settings_of(method, dict(recipe.set))[method.rotation], recipe.seed)
        source = open_source(net, turned)
    work = Work(output, identity, resume=resume, force=force)
    layout = format_for(plan.schemes.values(), own_layout=METHODS[method.rounding].own_layout)
    job = Job(net, source, blocks, plan, recipe, work, layout, torch.get_num_threads(), frugal)
    with using(processes), parking_in(work.activations.parent if frugal else None), settled():
        layers = job.run(calibration)
    document = document_of(output, recipe, layers, time.perf_counter() - start, 8 * checkpoint.dtype.itemsize)
    if recipe.kv_scheme is not None:
        document["kv_cache"] = kv_report(recipe.kv_scheme, work.path)
    rotated = [checkpoint.stored_module(r["name"]) for r in layers if r["rotated"]]
    quantization = layout.quantization_config(named_twice(plan.schemes, checkpoint), rotated)
    config = kv_cache.write_config({"quantization_config": quantization}, recipe.kv_scheme, products=recipe.products)
    finish_directory(work, checkpoint, config, recipe, calibration, identity, document)
    work.close()
    return document


def find_calibration(checkpoint: Checkpoint, recipe: Recipe) -> Calibration | None:
    """The windows the recipe asks for, or None for a method that needs none. Raises InputError as documented there."""
    schemes = [Scheme.parse(s) for s in (recipe.scheme, *(s for _, s in recipe.override))]
    static = any(s.static for s in schemes)
    needed = parse_method(recipe.method).needs_calibration or static or recipe.stores_kv_scales
    if not needed and recipe.calibration is None:
        return None
    source = recipe.calibration
    if source is None and checkpoint.path == DEMO / "model":
        source = str(DEMO / "calibration.txt")
    if source is None:
        what = "a static scheme" if static else f"a key-value cache in {recipe.kv}"
        what = f"method {recipe.method!r}" if parse_method(recipe.method).needs_calibration else what
        raise InputError(
            f"{what} needs text to calibrate on: --calibration FILE (.txt or .jsonl, best from the domain the model "
            "will be used in), or hub:NAME."
        )
    limit = checkpoint.context_length
    if limit is not None and recipe.seq_len > limit:
        raise InputError(f"--seq-len {recipe.seq_len} is longer than the model's context of {limit} tokens.")
    calibration = load_calibration(source, load_tokenizer(checkpoint), recipe.samples, recipe.seq_len, recipe.seed)
    if recipe.calibration is None:
        calibration = replace(calibration, source="the demo's text")
    vocabulary = checkpoint.text_config.get("vocab_size")
    if isinstance(vocabulary, int) and int(calibration.tokens.max()) >= vocabulary:
        raise InputError(
            f"{checkpoint.path}: the tokenizer makes token {int(calibration.tokens.max())}, but the model has only "
            f"{vocabulary}: they belong to different models."
        )
    return calibration
