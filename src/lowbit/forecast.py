"""What a quantization will take, said before it begins: peak memory, disk, time.

Memory and disk come from shapes (memory.py, preflight.py). Time is what has passed already, and up to five seconds of
the same work in small (trial.py), each part scaled by how often it will happen:

    passing      calibration tokens through a block and into the Hessians of its inputs
    rounding     each input's matrix: its factorization, its rows, the workers they are given to
    judging      three output errors of each
    handling     reading, packing, writing, comparing, hashing

It is a guess about a machine that may be busy with other things, good enough to tell minutes from hours. The searches
of AWQ and SmoothQuant are not in it.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lowbit.algorithms import METHODS
from lowbit.algorithms.compose import parse_method, settings_of
from lowbit.calibration import Calibration
from lowbit.console import note
from lowbit.memory import Memory, inputs_of, windows_at_once
from lowbit.model.load import Source
from lowbit.model.recompute import WORTH_KEEPING
from lowbit.model.walk import Blocks, linears
from lowbit.preflight import Plan
from lowbit.recipe import Recipe
from lowbit.trial import Passing, Rounding, value_seconds

SMALL = 2e12  # multiplications of the forward passes below which a job is over before it is worth a forecast
_HANDLING = 40  # operations on single values for each weight
_LOSSES = 3  # of the method's result, of plain RTN's, and what they are relative to
_LEARNING_PASSES = 4  # forward, backward by inputs and by weights, and the original's forward
_FILES = 0.03  # seconds a file: to write, to make sure it is on the disk, to read it back


def forecast(
    net: PreTrainedModel,
    source: Source,
    blocks: Blocks,
    plan: Plan,
    recipe: Recipe,
    memory: Memory,
    calibration: Calibration | None,
    *,
    frugal: bool,
    small_too: bool,
    workers: int = 1,
    spent: float = 0.0,
) -> dict[str, Any]:
    """{peak_memory_bytes, output_bytes, seconds, activations}; also told to the user in one line.

    `seconds` are all that the job takes, with those `spent` before; None for a small job, unless `small_too`: finding
    out would take as long as much of the work.
    """
    tokens = calibration.tokens.numel() if calibration is not None and memory.activations > 0 else 0
    peak = memory.least if frugal else memory.peak
    work = tokens * sum(m.weight.numel() for m in linears(net).values())
    seconds = None
    if small_too or work > SMALL:
        passing = None
        if calibration is not None and tokens:
            batch, threads = windows_at_once(net, blocks, recipe.seq_len), torch.get_num_threads()
            passing = Passing.measured(net, blocks, source, calibration.tokens, batch, threads)
        seconds = spent + _seconds(net, blocks, plan, recipe, passing, tokens, frugal, workers)
    duration = "" if seconds is None else f", about {_words(seconds)}"
    note(f"predicted: peak memory {peak / 1e6:.0f} MB, output {plan.output_bytes / 1e6:.0f} MB{duration}")
    return {
        "peak_memory_bytes": peak,
        "output_bytes": plan.output_bytes,
        "seconds": seconds,
        "activations": "disk" if frugal else "memory",
    }


def _words(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _seconds(
    net: nn.Module,
    blocks: Blocks,
    plan: Plan,
    recipe: Recipe,
    passing: Passing | None,
    tokens: int,
    frugal: bool,
    workers: int,
) -> float:
    inputs = {name: inputs_of(net.get_submodule(name)) for name in blocks.names}
    grids = [s.weight for s in plan.schemes.values() if s.weight is not None]  # none: only keys and values are cached
    widths = {width for groups in inputs.values() for _, width in groups}
    rounding = Rounding.measured(grids[0], recipe, widths, workers) if grids else None
    value, weights = value_seconds(), {name: _weights(net.get_submodule(name)) for name in blocks.names}
    seconds = sum(p.numel() for p in net.parameters()) * _HANDLING * value / 2 + _FILES
    for name, groups in inputs.items():
        if rounding is not None:
            seconds += sum(rounding.seconds(rows, width, _LOSSES if tokens else 0) for rows, width in groups)
        seconds += weights[name] * _HANDLING * value + _FILES
        if passing is not None:
            likeness = weights[name] / weights[blocks.names[0]]
            seconds += likeness * (tokens * _each(passing, groups, frugal) + _learned_tokens(recipe) * passing.modules)
    return seconds


def _weights(block: nn.Module) -> int:
    return sum(m.weight.numel() for m in linears(block).values())


def _each(passing: Passing, groups: list[tuple[int, int]], frugal: bool) -> float:
    """Seconds a token: with activations on disk it passes the block up to each input, and once to its end, but few
    linears are computed again."""
    if not frugal:
        return passing.modules + passing.statistics
    again = (len(groups) + 1) / 2 - 1
    narrow = sum(rows * width for rows, width in groups if width < WORTH_KEEPING)
    between = passing.modules - passing.products
    repeated = between + passing.products * narrow / sum(rows * width for rows, width in groups)
    return passing.modules + passing.statistics + again * repeated


def _learned_tokens(recipe: Recipe) -> int:
    """How many tokens' forward passes it is worth to learn a block's rounding."""
    composition = parse_method(recipe.method)
    if not METHODS[composition.rounding].learns:
        return 0
    settings = settings_of(composition, dict(recipe.set))[composition.rounding]
    return int(settings.iterations * settings.batch_size * recipe.seq_len) * _LEARNING_PASSES
