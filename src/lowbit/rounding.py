"""Rounding the linears that share one input: the method, the guard, and the report on each.

The guard: a method's result is kept only where its output error on held-out calibration windows is no larger than
plain round-to-nearest's; otherwise RTN stands and the report's `fallback` says why. Nothing falls back silently.
"""

import contextlib
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.algorithms import METHODS
from lowbit.algorithms.awq import clipped_rtn
from lowbit.algorithms.compose import parse_method, settings_of
from lowbit.algorithms.rtn import rtn
from lowbit.errors import InputError
from lowbit.formats.compressed_tensors import code_bits
from lowbit.model.lockstep import Walk
from lowbit.model.walk import Entry
from lowbit.recipe import Recipe
from lowbit.scheme import Scheme, TensorScheme
from lowbit.stats import Hessian, quadratic_loss
from lowbit.tensor import QuantizedTensor

WORSE = "worse than rtn on held-out windows"  # rtn is the better choice there, not the lack of one
UNREACHED = "no calibration token reached this layer: rtn"
_QUERY_OR_KEY = re.compile(r"\b(q|k|qk|qkv|query|key|query_key_value|c_attn|w_?qkv)(_proj)?$", re.I)  # errors multiply


@dataclass(frozen=True)
class Rounded:
    """One linear's result, and what the manifest says about it."""

    quantized: QuantizedTensor
    report: dict[str, Any]
    input_scale: Tensor | None = None  # [1], for stored activation scales


@dataclass(frozen=True)
class Statistics:
    """Of one input: what the method sees, and what judges it."""

    train: Hessian
    held_out: Hessian

    @staticmethod
    def empty(width: int) -> "Statistics":
        return Statistics(Hessian(width), Hessian(width))

    @staticmethod
    def collect(walk: Walk, k: int, width: int) -> "Statistics":
        """Of the k-th input group of the block that `walk` goes through."""

        def gather(inputs: Iterator[tuple[Entry, Tensor]]) -> Statistics:
            share = Statistics.empty(width)
            for entry, x in inputs:
                (share.held_out if entry.held_out else share.train).update(x)
            return share

        total = Statistics.empty(width)
        for share in walk.collect(k, gather):
            total.train.merge(share.train)
            total.held_out.merge(share.held_out)
        return total

    def loss(self, error: Tensor) -> tuple[float, float | None]:
        """(loss under all calibration rows, loss under the held-out ones if there are any) of an error (out, in)."""
        every = Hessian(self.train.width)
        every.merge(self.train)
        every.merge(self.held_out)
        held_out = quadratic_loss(error, self.held_out.mean()) if self.held_out.rows else None
        return quadratic_loss(error, every.mean()), held_out


@dataclass(frozen=True, eq=False)
class Units:
    """How an equalized weight relates to the original one: W = original · columns / rows.

    Losses are reported for the original model: its outputs are `rows` times as large, its inputs `columns` times.
    """

    columns: Tensor | None = None  # (in,)
    rows: Tensor | None = None  # (out,)

    @property
    def original(self) -> bool:
        return self.columns is None and self.rows is None

    def scaled(self, difference: Tensor) -> Tensor:
        """A difference of weights (out, in) with outputs in the original's units."""
        return difference if self.rows is None else difference * self.rows[:, None]

    def plain_error(self, weight: Tensor, grid: TensorScheme, scale_dtype: torch.dtype) -> Tensor:
        """The same of the original weight rounded to nearest under plain min-max scales."""
        original = weight.float() if self.rows is None else weight.float() * self.rows[:, None]
        original = original if self.columns is None else original / self.columns
        difference = original - rtn(original, grid, scale_dtype).dequantize()
        return difference if self.columns is None else difference * self.columns


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
    grid = scheme.weight
    assert grid is not None
    units = units or {}
    one_by_one = METHODS[parse_method(recipe.method).rounding].one_by_one or _clips(recipe)
    if len(weights) > 1 and (one_by_one or grid.granularity not in ("channel", "group")):
        alone = ({name: weight} for name, weight in weights.items())
        every = (round_linears(w, scheme, statistics, recipe, scale_dtype, goals, units) for w in alone)
        return {k: v for rounded in every for k, v in rounded.items()}
    started = time.perf_counter()
    stacked = torch.cat([w.float() for w in weights.values()])
    plain = rtn(stacked, grid, scale_dtype)
    goal = torch.cat([goals[name] for name in weights]) if goals else stacked
    result, notes, fallback = _apply(next(iter(weights)), goal, scheme, statistics, recipe, plain)
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
            loss, _ = statistics.loss(unit.scaled(weight.float() - mine.dequantize()))
            loss_plain, _ = statistics.loss(unit.scaled(weight.float() - theirs.dequantize()))
            _, held_out = statistics.loss(unit.scaled(target - mine.dequantize()))
            _, held_out_rtn = statistics.loss(unit.scaled(target - theirs.dequantize()))
            if reason is None and held_out is not None and held_out_rtn is not None and held_out > held_out_rtn:
                chosen, reason, loss = theirs, f"{WORSE}: rtn", loss_plain
            loss_rtn = loss_plain if unit.original else statistics.loss(unit.plain_error(weight, grid, scale_dtype))[0]
            signal, _ = statistics.loss(unit.scaled(weight.float()))
            relative = (loss / signal) ** 0.5 if signal > 0 else 0.0
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
        rounded[name] = Rounded(chosen, report | notes)
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
    report = first.report | {"loss": loss, "relative_error": relative} | noted
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
    return Rounded(quantized, report)


def _clips(recipe: Recipe) -> bool:
    """Whether AWQ's range search takes the place of round-to-nearest's own scales."""
    method = parse_method(recipe.method)
    return (
        method.equalization == "awq" and method.rounding == "rtn" and settings_of(method, dict(recipe.set))["awq"].clip
    )


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Column loops are thousands of operations of a few microseconds: a second thread costs more than it brings,
    and on a busy machine each waits for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
    return "\n  ".join([text, *others])
