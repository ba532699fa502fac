"""A ladder for a linear that lost too much.

Its relative error is the root of E|(W - Ŵ)x|² / E|Wx|² over the calibration inputs. While that is above the target,
the next rung is tried: ten times the damping (the Hessian may say too little), then zero points (its rows may be
lopsided), then twice the bits. The first rung that meets the target is taken, else the best one; the report says
which. Only weight-only integer schemes have the later rungs: the others' grids are what their kernels multiply.
"""

from collections.abc import Iterator
from dataclasses import fields, replace

import torch
from torch import Tensor

from lowbit.algorithms import METHODS
from lowbit.algorithms.compose import parse_method
from lowbit.losses import Statistics
from lowbit.recipe import Recipe
from lowbit.rounding import Rounded, round_linears
from lowbit.scheme import Scheme

_MOST_BITS = 8


def repair(
    name: str,
    weight: Tensor,
    scheme: Scheme,
    statistics: Statistics | None,
    recipe: Recipe,
    scale_dtype: torch.dtype,
    first: Rounded,
) -> tuple[Rounded, Scheme]:
    """`first`, or what a rung makes of linear `name` (weight (out, in)), and the scheme it has then."""
    best, chosen = first, scheme
    for what, other, attempt in _rungs(scheme, recipe):
        if not _lost_too_much(best, recipe):
            break
        result = round_linears({name: weight}, other, statistics, attempt, scale_dtype)[name]
        if result.report["relative_error"] < best.report["relative_error"]:
            best = replace(result, report=result.report | {"repair": what})
            chosen = other
    return best, chosen


def _lost_too_much(result: Rounded, recipe: Recipe) -> bool:
    error = result.report["relative_error"]
    return recipe.repair > 0 and error is not None and error > recipe.repair


def _rungs(scheme: Scheme, recipe: Recipe) -> Iterator[tuple[str, Scheme, Recipe]]:
    """(what it is, scheme, recipe) of each rung, cheapest first."""
    if "dampening_frac" in {f.name for f in fields(METHODS[parse_method(recipe.method).rounding].settings)}:
        damping = float(dict(recipe.set).get("dampening_frac", "0.01")) * 10
        settings = dict(recipe.set) | {"dampening_frac": f"{damping:g}"}
        yield f"dampening_frac {damping:g}", scheme, replace(recipe, set=tuple(settings.items()))
    grid = scheme.weight
    if grid is None or grid.kind != "int" or scheme.activation is not None:
        return
    if grid.symmetric:
        yield "zero points", Scheme(replace(grid, symmetric=False)), recipe
    bits = grid.bits * 2
    while grid.bits < bits <= _MOST_BITS:
        yield f"{bits} bits", Scheme(replace(grid, bits=bits)), recipe
        bits *= 2
