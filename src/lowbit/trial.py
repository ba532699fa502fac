"""The parts of a quantization in small, timed: what forecast.py multiplies.

A few seconds altogether, with the job's own functions on the model's own shapes where those are small, and on smaller
ones of the same kind where they are not.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.algorithms import METHODS
from lowbit.algorithms.compose import parse_method, settings_of
from lowbit.algorithms.gptq import WORTH_FORKING
from lowbit.algorithms.rtn import rtn
from lowbit.environment import compute_dtype
from lowbit.losses import Statistics, Units, output_loss
from lowbit.model.load import Source, compute_buffers, materialize, release
from lowbit.model.lockstep import Walk
from lowbit.model.outside import Outside
from lowbit.model.walk import Blocks, capture_entries, input_groups, linears
from lowbit.parking import WIDE
from lowbit.recipe import Recipe
from lowbit.scheme import TensorScheme
from lowbit.stats import Hessian
from lowbit.tensor import rows_at_once
from lowbit.workers import one_thread, side_by_side, using

WIDEST = 2048  # columns of a slice that is rounded; wider ones are extrapolated from it and from half of it
_FEW = 128  # rows of the smaller slice
_WEIGHTS = 1 << 21  # of the larger one
_WORK = 3e10  # multiplications of the block's pass: a second of one core
_TURNS = 4  # batches a thread, where that is little work: what a walk begins with is shared by many in the job


@dataclass(frozen=True)
class Passing:
    """Seconds for each calibration token that passes the first block, on all threads together: through its modules,
    and of that its products alone; and to add to the Hessians of its inputs."""

    modules: float
    products: float
    statistics: float

    @staticmethod
    def measured(
        net: PreTrainedModel, blocks: Blocks, source: Source, tokens: Tensor, batch: int, threads: int
    ) -> "Passing":
        """`tokens` (windows, length): the first ones go through the block as they will in the job, a few batches a
        thread, fewer and shorter ones where that would take long."""
        dtype = compute_dtype()
        name = blocks.names[0]
        weights = sum(m.weight.numel() for m in linears(net.get_submodule(name)).values())
        most = max(int(_WORK * threads / max(weights, 1)), 64)
        length = min(tokens.shape[1], most)
        windows = max(1, min(batch, most // length // threads))
        turns = max(1, min(_TURNS, most // (windows * threads * length)))
        batches = list(tokens[: windows * threads * turns, :length].split(windows))
        outside = Outside(net, blocks, source, dtype)
        block = materialize(net, name, source, dtype)
        try:
            entries = capture_entries(net, blocks, batches)
            outside.let_go()
            groups = input_groups(block, entries[0], 0, entries[1:])
            widths = [linears(block)[group.names[0]].in_features for group in groups]

            def modules() -> None:
                Walk(block, 0, entries, (), {}, threads).finish()

            def everything() -> None:
                walk = Walk(block, 0, entries, groups, {}, threads)
                for k, width in enumerate(widths):
                    if width < WIDE:  # the Hessian of a wide one is much of the job's peak memory
                        Statistics.collect(walk, k, width)
                walk.finish()

            passed = sum(b.numel() for b in batches)
            alone, both = _time(modules, 0.3) / passed, _time(everything, 0.3) / passed
        finally:
            outside.close()
            release(net)
            compute_buffers(net)
        x, w = torch.randn(512, 1024, dtype=dtype), torch.randn(1024, 1024, dtype=dtype)
        with one_thread():
            rate = _time(lambda: nn.functional.linear(x, w), 0.2) / x.numel() / len(w)
        statistics = max(both - alone, 0.0) + sum(_wide(width, dtype) for width in widths if width >= WIDE)
        return Passing(alone, min(weights * rate / threads, alone), statistics)


def _wide(width: int, dtype: torch.dtype) -> float:
    """Seconds of adding a token to the Hessian of a wide input, which one thread does at a time; from a narrow one."""
    x, hessian = torch.randn(512, WIDEST, dtype=dtype), Hessian(WIDEST)
    with one_thread():
        return _time(lambda: hessian.update(x), 0.1) / len(x) * (width / WIDEST) ** 2


@dataclass(frozen=True)
class Rounding:
    """Seconds of rounding a matrix, by its width: `once`, and each `row`; of giving pieces to workers (`forking`); and
    of computing an output error, each row (`judging`). Widths that were not tried follow a power of those that were."""

    once: Mapping[int, float]
    row: Mapping[int, float]
    judging: Mapping[int, float]
    forking: float
    workers: int

    def seconds(self, rows: int, width: int, losses: int) -> float:
        """Of a matrix of `rows`, and of computing `losses` errors of it."""
        piece = rows_at_once(width)
        if rows > piece and rows * width >= WORTH_FORKING and self.workers > 1:
            in_turn, forking = piece * math.ceil(rows / piece / self.workers), self.forking
        else:
            in_turn, forking = rows, 0.0
        of_row = _at(width, self.row, 1, 2) * in_turn
        return _at(width, self.once, 1, 3) + of_row + forking + losses * rows * _at(width, self.judging, 1, 2)

    @staticmethod
    def measured(grid: TensorScheme, recipe: Recipe, widths: Iterable[int], workers: int) -> "Rounding":
        tried = {width: _tried(width, grid, recipe) for width in _to_try(widths)}
        forking = 0.0
        if workers > 1:
            result = torch.zeros(1 << 18)
            with using(workers):
                forking = 2 * _time(lambda: side_by_side([result.clone] * workers), 0.1)  # rounding, refining
        once, row, judging = ({width: values[k] for width, values in tried.items()} for k in range(3))
        return Rounding(once, row, judging, forking, workers)


def _tried(width: int, grid: TensorScheme, recipe: Recipe) -> tuple[float, float, float]:
    """Seconds of rounding a matrix of a width, whatever its rows; of a row of it; and of a row's output error."""
    composition = parse_method(recipe.method)
    method = METHODS[composition.rounding]
    settings = settings_of(composition, dict(recipe.set))[composition.rounding]
    unit = grid.group_size if grid.granularity == "group" else 1
    columns = max(width // unit, 1) * unit
    statistics = Statistics.empty(columns)
    statistics.train.update(torch.randn(2 * columns, columns))
    statistics.held_out.update(torch.randn(_FEW, columns))
    curvature = statistics.train.mean() if method.needs_calibration else None
    many = min(rows_at_once(columns), max(_WEIGHTS // columns, 2 * _FEW))
    weight = torch.randn(many, columns) * 0.02

    def seconds(rows: int) -> float:
        with one_thread():
            return _time(lambda: method.rounding(weight[:rows], curvature, grid, settings, torch.bfloat16), 0.05)

    few, all_of_them, rounded = seconds(_FEW), seconds(many), rtn(weight, grid, torch.bfloat16)
    row = max(all_of_them - few, 1e-9) / (many - _FEW)
    judging = _time(lambda: output_loss(statistics, weight, rounded, Units()), 0.05) / many
    return max(few - _FEW * row, 0.0), row, judging


def _to_try(widths: Iterable[int]) -> list[int]:
    """At most three widths, none above WIDEST: the model's own, and two to extrapolate from where it has wider ones."""
    wanted = set(widths)
    small = sorted(w for w in wanted if w <= WIDEST)[-3:]
    return small if max(wanted) <= WIDEST else sorted({*small[-1:], WIDEST // 2, WIDEST})


def _at(width: int, values: Mapping[int, float], least: float, most: float) -> float:
    """The value at a width: one that is known, or the next smaller one's (the smallest one's) times a power of their
    ratio, between `least` and `most`, as between that one and its neighbour."""
    if width in values:
        return values[width]
    known = sorted(values)
    below = max((i for i, w in enumerate(known) if w < width), default=0)
    power = most
    for a, b in itertools.pairwise(known[max(below - 1, 0) : max(below - 1, 0) + 2]):
        if values[a] > 0 and values[b] > 0:
            power = min(max(math.log(values[b] / values[a]) / math.log(b / a), least), most)
    return float(values[known[below]] * (width / known[below]) ** power)


def value_seconds() -> float:
    """One operation on one of many single values, by one thread."""
    x = torch.randn(1024, 1024)
    with one_thread():
        return _time(lambda: x.mul(2.0), 0.1) / x.numel()


def _time(work: Callable[[], Any], limit: float) -> float:
    """Seconds of one run: the first if it takes `limit` or more, else the best of as many as fit in that after it."""
    start = time.perf_counter()
    work()
    best = time.perf_counter() - start
    if best >= limit:
        return best
    begun = time.perf_counter()
    while time.perf_counter() - begun < limit:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
