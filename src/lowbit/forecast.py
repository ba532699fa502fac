"""What a quantization will take, said before it begins: peak memory, disk, time.

Memory and disk come from shapes (memory.py, preflight.py). Time comes from up to five seconds of the same work in
small, each part scaled by how often it will happen:

    forward      tokens x weights, at the rate of a product in the compute dtype, and the work on single values
    statistics   tokens x in² / 2 for each input
    rounding     F(in) + rows P(in) for each input: F ~ in³ is the factorization, P ~ in (a + b in) a row's columns;
                 F, a, b from the method itself on slices of two widths and two heights
    judging      three errors: rows x in² / 2 each
    handling     reading, packing, writing, comparing, hashing

It is a guess about a machine that may be busy with other things, good enough to tell minutes from hours.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowbit.algorithms import METHODS
from lowbit.algorithms.compose import parse_method, settings_of
from lowbit.console import note
from lowbit.memory import Memory, inputs_of
from lowbit.model.load import compute_dtype
from lowbit.model.recompute import WORTH_KEEPING
from lowbit.model.walk import Blocks, linears
from lowbit.preflight import Plan
from lowbit.recipe import Recipe
from lowbit.scheme import TensorScheme
from lowbit.tensor import rows_at_once
from lowbit.workers import one_thread

SMALL = 2e12  # multiplications of the forward passes below which a job is over before it is worth a forecast
_WIDTHS = (512, 1024)  # of the slices that are rounded to see how long it takes
_HEIGHTS = (128, 1024)
_VALUES = 40  # single-value operations on each activation in a block: norms, softmax, rotary, gates, conversions
_HANDLING = 60  # the same for each weight
_LEARNING_PASSES = 4  # forward, backward by inputs and by weights, and the original's forward


def forecast(
    model: nn.Module,
    blocks: Blocks,
    plan: Plan,
    recipe: Recipe,
    memory: Memory,
    *,
    frugal: bool,
    small_too: bool,
    workers: int = 1,
) -> dict[str, Any]:
    """{peak_memory_bytes, output_bytes, seconds, activations}; also told to the user in one line.

    `seconds` is None for a small job, unless `small_too`: finding out would take as long as much of the work.
    """
    calibrates = memory.activations > 0
    tokens = recipe.samples * recipe.seq_len if calibrates else 0
    peak = memory.least if frugal else memory.peak
    work = tokens * sum(m.weight.numel() for m in linears(model).values())
    seconds = _seconds(model, blocks, plan, recipe, tokens, frugal, workers) if small_too or work > SMALL else None
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
    model: nn.Module, blocks: Blocks, plan: Plan, recipe: Recipe, tokens: int, frugal: bool, workers: int
) -> float:
    with one_thread():
        rates = _Rates.measured()
        grids = {s.weight for s in plan.schemes.values() if s.weight is not None}
        costs = {grid: _Rounding.measured(grid, recipe) for grid in sorted(grids, key=str)[:2]}
    common = next(iter(costs.values()))
    threads = torch.get_num_threads()
    seconds, share = 0.0, _active(model)
    for name in blocks.names:
        block, groups = model.get_submodule(name), inputs_of(model.get_submodule(name))
        weights = sum(m.weight.numel() for m in linears(block).values())
        for rows, width in groups:
            seconds += common.seconds(rows, width, workers)
            if tokens:
                seconds += (share * tokens + 3 * rows) * width * width / 2 * rates.product / threads
        if tokens:
            passes = (len(groups) + 1) / 2 if frugal else 1  # up to each group, and one to the end
            again = sum(rows * width for rows, width in groups if width < WORTH_KEEPING) * (passes - 1)
            values = sum(m.in_features + m.out_features for m in linears(block).values()) * _VALUES * passes
            seconds += tokens * ((weights + again) * share * rates.forward + values * rates.value) / threads
            seconds += _learned_tokens(recipe) * _LEARNING_PASSES * weights * rates.forward / threads
        seconds += weights * _HANDLING * rates.value
    everything = sum(p.numel() for p in model.parameters())
    return seconds + everything * _HANDLING * rates.value / 2


def _active(model: nn.Module) -> float:
    """The share of a block's weights that one token meets: of a mixture's, its experts'."""
    words = getattr(model, "config", None)
    text = words.get_text_config() if words is not None else None
    chosen = getattr(text, "num_experts_per_tok", None)
    count = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    return min(chosen / count, 1.0) if chosen and count else 1.0


def _learned_tokens(recipe: Recipe) -> int:
    """How many tokens pass each linear while its rounding is learned."""
    composition = parse_method(recipe.method)
    if not METHODS[composition.rounding].learns:
        return 0
    settings = settings_of(composition, dict(recipe.set))[composition.rounding]
    return int(settings.iterations * settings.batch_size * recipe.seq_len)


@dataclass(frozen=True)
class _Rates:
    """Seconds of one multiplication in a product (float32; the compute dtype) and of one single-value operation."""

    product: float
    forward: float
    value: float

    @staticmethod
    def measured() -> "_Rates":
        x, w = torch.randn(1024, 1024), torch.randn(1024, 1024)
        low = x.to(compute_dtype())
        weight = nn.Parameter(w.to(compute_dtype()), requires_grad=False)
        return _Rates(
            product=_time(lambda: x.T @ w) / 1024**3,
            forward=_time(lambda: nn.functional.linear(low, weight)) / 1024**3,
            value=_time(lambda: x.mul(2.0)) / 1024**2,
        )


@dataclass(frozen=True)
class _Rounding:
    """Seconds of rounding: `factor` in³, and for each row  in (`column` + `product` in)."""

    factor: float
    column: float
    product: float

    def seconds(self, rows: int, width: int, workers: int) -> float:
        side_by_side = min(workers, -(-rows // rows_at_once(width)))
        return self.factor * width**3 + rows * width * (self.column + self.product * width) / side_by_side

    @staticmethod
    def measured(grid: TensorScheme, recipe: Recipe) -> "_Rounding":
        """From the method on slices; a grid whose scales span rows takes whole tiles of them anyway."""
        composition = parse_method(recipe.method)
        method = METHODS[composition.rounding]
        settings = settings_of(composition, dict(recipe.set))[composition.rounding]
        spent = {}
        for width in _WIDTHS:
            columns = width if grid.granularity != "group" else max(width // grid.group_size, 1) * grid.group_size
            curvature = torch.eye(columns) + 0.1 if method.needs_calibration else None
            for rows in _HEIGHTS:
                weight = torch.randn(rows, columns)
                start = time.perf_counter()
                method.rounding(weight, curvature, grid, settings, torch.bfloat16)
                spent[rows, width] = time.perf_counter() - start
        low, high = _HEIGHTS
        by_row = [max(spent[high, w] - spent[low, w], 1e-9) / (high - low) / w for w in _WIDTHS]
        product = max((by_row[1] - by_row[0]) / (_WIDTHS[1] - _WIDTHS[0]), 0.0)
        column = max(by_row[0] - product * _WIDTHS[0], 0.0)
        widest = _WIDTHS[1]
        once = max(spent[low, widest] - low * widest * by_row[1], 0.0)
        return _Rounding(once / widest**3, column, product)


def _time(work: Callable[[], Any]) -> float:
    """Seconds of one run, the best of as many as fit in 0.3 s."""
    work()
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < 0.3:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
