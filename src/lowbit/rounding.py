"""Rounding the linears that share one input: the method, the guard, and the report on each.

The guard: a method's result is kept only where its output error on held-out calibration windows is no larger than
plain round-to-nearest's; otherwise RTN stands and the report's `fallback` says why. Nothing falls back silently.
"""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowbit.algorithms import METHODS
from lowbit.algorithms.awq import clipped_rtn
from lowbit.algorithms.compose import parse_method, settings_of
from lowbit.algorithms.rtn import rtn
from lowbit.clipping import weights_report
from lowbit.errors import InputError
from lowbit.formats.compressed_tensors import code_bits
from lowbit.losses import Statistics, Units, output_loss
from lowbit.recipe import Recipe
from lowbit.scheme import Scheme, TensorScheme
from lowbit.tensor import QuantizedTensor
from lowbit.workers import one_thread, side_by_side

WORSE = "worse than plain rtn on held-out windows"  # which is the better choice there, not the lack of one
UNREACHED = "no calibration token reached this layer: rtn"
_QUERY_OR_KEY = re.compile(r"\b(q|k|qk|qkv|query|key|query_key_value|c_attn|w_?qkv)(_proj)?$", re.I)  # errors multiply


@dataclass(frozen=True)
class Rounded:
    """One linear's result, and what the manifest says about it."""

    quantized: QuantizedTensor
    report: dict[str, Any]
    input_scale: Tensor | None = None  # [1], for stored activation scales


def round_linears(
    weights: Mapping[str, Tensor],
    scheme: Scheme,
    statistics: Statistics | None,
    recipe: Recipe,
    scale_dtype: torch.dtype,
    goals: Mapping[str, Tensor] | None = None,
    units: Mapping[str, Units] | None = None,
) -> dict[str, Rounded]:
    """Quantize linears (out_i, in), by full name, that share an input and a scheme.

    They are rows of one matrix where no scale spans rows: one factorization, one sweep. `statistics` is None for a
    recipe without calibration data; `goals` is what to round instead of the weights (model/original.py), `units` says
    which weights were equalized. Raises InputError if the activations are mostly not finite.
    """
    grid, started = scheme.weight, time.perf_counter()
    assert grid is not None
    one_by_one = METHODS[parse_method(recipe.method).rounding].one_by_one or _clips(recipe)
    if len(weights) > 1 and (one_by_one or grid.granularity not in ("channel", "group")):
        matrices = [_Matrix.of({name: weight}, grid, scale_dtype, goals) for name, weight in weights.items()]
    else:
        matrices = [_Matrix.of(weights, grid, scale_dtype, goals)]
    apply = [partial(_apply, m.name, m.goal, scheme, statistics, recipe, m.plain) for m in matrices]
    applied = side_by_side(apply) if len(apply) > 1 else [apply[0]()]
    rounded: dict[str, Rounded] = {}
    for matrix, (result, notes, fallback) in zip(matrices, applied, strict=True):
        rounded |= _judged(matrix, result, notes, fallback, scheme, statistics, scale_dtype, units or {}, started)
    return rounded


@dataclass(frozen=True)
class _Matrix:
    """What is rounded at once: one linear, or several as rows of one matrix; its goal (rows, in), which is not the
    weights themselves if `corrected`; and what plain RTN makes of the weights."""

    weights: Mapping[str, Tensor]
    goal: Tensor
    corrected: bool
    plain: QuantizedTensor

    @staticmethod
    def of(
        weights: Mapping[str, Tensor], grid: TensorScheme, scale_dtype: torch.dtype, goals: Mapping[str, Tensor] | None
    ) -> "_Matrix":
        stacked = _joined(list(weights.values()))
        goal = _joined([goals[name] for name in weights]) if goals else stacked
        return _Matrix(weights, goal, bool(goals), rtn(stacked, grid, scale_dtype))

    @property
    def name(self) -> str:
        """The first linear's."""
        return next(iter(self.weights))


def _joined(rows: list[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _judged(
    matrix: _Matrix,
    result: QuantizedTensor,
    notes: dict[str, Any],
    fallback: str | None,
    scheme: Scheme,
    statistics: Statistics | None,
    scale_dtype: torch.dtype,
    units: Mapping[str, Units],
    started: float,
) -> dict[str, Rounded]:
    """The linears of a matrix apart again, each with the method's result or RTN and the report on it."""
    grid, weights, goal, plain = scheme.weight, matrix.weights, matrix.goal, matrix.plain
    assert grid is not None
    sizes = [len(w) for w in weights.values()]
    whole = len(sizes) == 1
    parts = zip(
        weights.items(),
        goal.split(sizes),
        [result] if whole else result.split_rows(sizes),
        [plain] if whole else plain.split_rows(sizes),
        strict=True,
    )
    rounded = {}
    for (name, weight), target, mine, theirs in parts:
        chosen, reason = mine, fallback
        loss = loss_rtn = relative = None
        if statistics is not None and statistics.train.rows:
            unit = units.get(name, Units())
            loss, held_out = output_loss(statistics, weight, mine, unit)
            loss_plain, held_out_rtn = output_loss(statistics, weight, theirs, unit)
            if matrix.corrected:
                _, held_out = output_loss(statistics, target, mine, unit)
                _, held_out_rtn = output_loss(statistics, target, theirs, unit)
            if reason is None and held_out is not None and held_out_rtn is not None and held_out > held_out_rtn:
                chosen, reason, loss = theirs, f"{WORSE}: plain rtn", loss_plain
            loss_rtn = loss_plain if unit.original else statistics.loss(unit.plain_error(weight, grid, scale_dtype))[0]
            signal, _ = output_loss(statistics, weight, None, unit)
            relative = (loss / signal) ** 0.5 if signal > 0 else 0.0
        clipping = weights_report(target, chosen)
        report = {
            "name": name,
            "scheme": str(scheme),
            "bits": chosen.stored_bits / chosen.numel + code_bits(scheme) - grid.bits,
            "weights": chosen.numel,
            "loss_rtn": loss_rtn,
            "loss": loss,
            "relative_error": relative,
            "seconds": (time.perf_counter() - started) / len(sizes),
            "fallback": reason,
            "rotated": chosen.rotation is not None,
        }
        rounded[name] = Rounded(chosen, report | clipping | notes)
    return rounded


def replaced(
    first: Rounded,
    quantized: QuantizedTensor,
    weight: Tensor,
    statistics: Statistics,
    unit: Units,
    noted: dict[str, Any],
) -> Rounded:
    """`first` with another tensor in its place, measured again; `weight` (out, in) is the one to be rounded."""
    loss, _ = statistics.loss(unit.scaled(weight.float() - quantized.dequantize()))
    signal, _ = statistics.loss(unit.scaled(weight.float()))
    relative = (loss / signal) ** 0.5 if signal > 0 else 0.0
    report = first.report | {"loss": loss, "relative_error": relative} | weights_report(weight, quantized) | noted
    return Rounded(quantized, report, first.input_scale)


def round_plain(name: str, weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Rounded:
    """RTN with searched scales, for a head or an embedding, which no statistics are taken for."""
    assert scheme.weight is not None
    started = time.perf_counter()
    quantized = rtn(weight.float(), scheme.weight, scale_dtype, scale_search=True)
    report = {
        "name": name,
        "scheme": str(scheme),
        "bits": quantized.stored_bits / weight.numel(),
        "weights": weight.numel(),
        "loss_rtn": None,
        "loss": None,
        "relative_error": None,
        "seconds": time.perf_counter() - started,
        "fallback": None,
        "rotated": False,
    }
    return Rounded(quantized, report | weights_report(weight, quantized))


def _clips(recipe: Recipe) -> bool:
    """Whether AWQ's range search takes the place of round-to-nearest's own scales."""
    method = parse_method(recipe.method)
    return (
        method.equalization == "awq" and method.rounding == "rtn" and settings_of(method, dict(recipe.set))["awq"].clip
    )


def _apply(
    where: str, weight: Tensor, scheme: Scheme, statistics: Statistics | None, recipe: Recipe, plain: QuantizedTensor
) -> tuple[QuantizedTensor, dict[str, Any], str | None]:
    """(the method's result, what to note, None), or RTN and the reason where the statistics do not allow it."""
    composition = parse_method(recipe.method)
    method = METHODS[composition.rounding]
    settings = settings_of(composition, dict(recipe.set))[composition.rounding]
    assert scheme.weight is not None
    if statistics is None:
        result, notes = method.rounding(weight, None, scheme.weight, settings, plain.scale.dtype)
        return result, notes, None
    train = statistics.train
    bad, total = train.bad_rows, train.rows + train.bad_rows
    if bad > 0.1 * total:
        raise InputError(
            f"{where}: {bad} of {total} calibration activations are not finite: the model overflows on this text. "
            "Check the checkpoint and the calibration data."
        )
    if train.rows == 0:
        return plain, {}, UNREACHED
    noted = {"bad_rows": bad} if bad else {}
    if _clips(recipe) and not _QUERY_OR_KEY.search(where):
        return clipped_rtn(weight, train.mean(), scheme.weight, plain.scale.dtype), noted, None
    try:
        with one_thread():
            result, notes = method.rounding(weight, train.mean(), scheme.weight, settings, plain.scale.dtype)
    except ValueError as error:
        return plain, noted, f"{error}: rtn"
    return result, noted | notes, None


def block_line(name: str, report: list[dict[str, Any]], seconds: float) -> str:
    """What the console shows of a finished block."""
    loss, plain = (sum(r[k] for r in report if r[k] is not None) for k in ("loss", "loss_rtn"))
    text = f"{name}: {len(report)} linears, {seconds:.1f} s"
    if plain:
        text += f", output error {loss / plain:.0%} of rtn's"
    unreached = [r["name"] for r in report if r["fallback"] == UNREACHED]
    unproved = [r["name"].split(".")[-1] for r in report if (r.get("equalization") or {}).get("reason")]
    if unproved:
        text += f", not equalized (nothing provably takes the scale): {', '.join(unproved)}"
    others = [f"{r['name']}: {r['fallback']}" for r in report if r["fallback"] and r["fallback"] != UNREACHED]
    if unreached:
        others.append(f"{len(unreached)} linears were reached by no calibration token ({unreached[0]}, ...): rtn")
    others += [f"alarm: {r['name']}: {r['alarm']}" for r in report if r.get("alarm")]
    return "\n  ".join([text, *others])
