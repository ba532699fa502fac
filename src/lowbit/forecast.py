"""What a quantization will take, said before it begins: peak memory, disk, time.

Memory and disk come from shapes. Time comes from a few seconds of the same work in small: the forward pass's matrix
product, the Hessian's, and the method on one slice of a weight; each is scaled by how often it will happen. It is a
guess about a machine that may be busy with other things, good enough to tell minutes from hours.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lowbit.algorithms import METHODS
from lowbit.algorithms.compose import parse_method, settings_of
from lowbit.console import note
from lowbit.memory import Memory
from lowbit.model.load import compute_dtype
from lowbit.model.walk import linears
from lowbit.preflight import Plan
from lowbit.recipe import Recipe
from lowbit.scheme import TensorScheme

SMALL = 2e12  # multiplications of the forward passes below which a job is over before it is worth a forecast
_LEARNING_PASSES = 4  # forward, backward by inputs and by weights, and the original's forward
_SLICE = (128, 1024)  # rows, columns of the weight that is rounded to see how long it takes


def forecast(
    model: nn.Module, plan: Plan, recipe: Recipe, memory: Memory, *, frugal: bool, small_too: bool
) -> dict[str, Any]:
    """{peak_memory_bytes, output_bytes, seconds, activations}; also told to the user in one line.

    `seconds` is None for a small job, unless `small_too`: finding out would take as long as much of the work.
    """
    calibrates = memory.activations > 0
    tokens = recipe.samples * recipe.seq_len if calibrates else 0
    peak = memory.least if frugal else memory.peak
    work = tokens * sum(m.weight.numel() for m in linears(model).values())
    seconds = _seconds(model, plan, recipe, tokens, frugal=frugal) if small_too or work > SMALL else None
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


def _seconds(model: nn.Module, plan: Plan, recipe: Recipe, tokens: int, *, frugal: bool) -> float:
    modules = linears(model)
    quantized = {n: s for n, s in plan.schemes.items() if s.weight is not None and n in modules}
    weights = sum(modules[n].weight.numel() for n in quantized)
    squares = sum(modules[n].in_features ** 2 for n in quantized) / 2  # linears share inputs, and half is computed
    sizes: dict[tuple[torch.Size, TensorScheme], int] = {}
    for name, scheme in quantized.items():
        assert scheme.weight is not None
        key = (modules[name].weight.shape, scheme.weight)
        sizes[key] = sizes.get(key, 0) + modules[name].weight.numel()
    seconds = sum(size * _rounding_seconds(shape, grid, recipe) for (shape, grid), size in sizes.items())
    if tokens:
        dtype = compute_dtype()
        a, b = torch.randn(256, 1024, dtype=dtype), torch.randn(1024, 1024, dtype=dtype)
        forward = _time(lambda: a @ b) / (256 * 1024 * 1024)
        h = torch.randn(1024, 256)
        hessian = _time(lambda: h @ h.T) / (256 * 1024 * 1024)
        passes = 2 + (4 if frugal else 0)  # discovering the groups is one batch only; then a pass, or one a group
        seconds += tokens * (passes * weights * forward + squares * hessian)
        seconds += _learned_tokens(recipe) * _LEARNING_PASSES * weights * forward
    return seconds


def _learned_tokens(recipe: Recipe) -> int:
    """How many tokens pass each linear while its rounding is learned."""
    composition = parse_method(recipe.method)
    if not METHODS[composition.rounding].learns:
        return 0
    settings = settings_of(composition, dict(recipe.set))[composition.rounding]
    return int(settings.iterations * settings.batch_size * recipe.seq_len)


def _rounding_seconds(shape: torch.Size, grid: TensorScheme, recipe: Recipe) -> float:
    """A weight, measured on a slice of that shape: rounding is nearly linear in the rows."""
    composition = parse_method(recipe.method)
    method = METHODS[composition.rounding]
    settings = settings_of(composition, dict(recipe.set))[composition.rounding]
    rows, columns = shape if grid.granularity == "block" else (min(_SLICE[0], shape[0]), _columns(shape[1], grid))
    weight = torch.randn(rows, columns)
    curvature = torch.eye(columns) if method.needs_calibration else None
    return _time(lambda: method.rounding(weight, curvature, grid, settings, torch.bfloat16)) / weight.numel()


def _columns(width: int, grid: TensorScheme) -> int:
    """At most the slice's columns, whole groups."""
    limit = min(width, _SLICE[1])
    return limit if grid.granularity != "group" else max(limit // grid.group_size, 1) * grid.group_size


def _time(work: Callable[[], Any]) -> float:
    """Seconds of one run, the best of as many as fit in 0.3 s."""
    work()
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < 0.3:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
