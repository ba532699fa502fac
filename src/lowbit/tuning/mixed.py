"""auto:3.5 - mixed precision by measurement: which scheme for which linears, within a budget.

    auto:3.5       at most 3.5 stored bits per quantized weight, scales counted
    auto:20MB      at most so many bytes of weights in all, what is not quantized included
    auto:2ms       at most so long in the quantized linears for one token, by kernel times measured on this machine
    auto:3.5:w2a16-g64,w3a16-g64,w4a16-g64      the same, choosing among these schemes only

Sensitivity (tuning/sensitivity.py) says what each choice would cost in KL, allocation (tuning/allocate.py) chooses,
and the answer is a recipe like any other: a scheme and overrides, which the manifest records.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lowbit import pipeline
from lowbit.artifact import MANIFEST, check_output, write_json
from lowbit.console import note
from lowbit.errors import InputError
from lowbit.model.checkpoint import Checkpoint, open_checkpoint
from lowbit.recipe import Recipe, matches, read_recipe
from lowbit.scheme import Scheme
from lowbit.tuning.allocate import Allocation, allocate
from lowbit.tuning.kernel_times import group_seconds
from lowbit.tuning.sensitivity import Group, Sensitivity, Subject, Way, sensitivity

AUTO = "auto:"
DEFAULT_SCHEMES = (
    "w2a16-g32", "w2a16-g64", "w3a16-g32", "w3a16-g64", "w3a16-g128", "w4a16-g32", "w4a16-g64", "w4a16-g128",
    "w8a16-g128",
)  # fmt: skip
PROBE = "w3a16-g128"
ALLOCATION = "allocation.json"
Unit = Literal["bits", "bytes", "seconds"]


@dataclass(frozen=True)
class Budget:
    """At most `amount` of `unit`, to be spent on choices among `schemes`."""

    amount: float
    unit: Unit
    schemes: tuple[str, ...] = DEFAULT_SCHEMES

    @staticmethod
    def parse(text: str) -> "Budget":
        """'auto:3.5', 'auto:20MB', 'auto:2ms', each with ':SCHEME,...' if wanted."""
        found = _BUDGET.fullmatch(text)
        if not found:
            raise InputError(
                f"{text!r}: expected a budget such as auto:3.5 (bits per weight), auto:20MB (all weights) or auto:2ms "
                "(linears, per token), then optionally :SCHEME,SCHEME,... to choose among."
            )
        suffix = found["unit"] or ""
        units: dict[str, tuple[Unit, float]] = {
            "": ("bits", 1), "KB": ("bytes", 1e3), "MB": ("bytes", 1e6), "GB": ("bytes", 1e9), "us": ("seconds", 1e-6),
            "ms": ("seconds", 1e-3), "s": ("seconds", 1),
        }  # fmt: skip
        unit, factor = units[suffix]
        schemes = tuple(found["schemes"].split(",")) if found["schemes"] else DEFAULT_SCHEMES
        for scheme in schemes:
            if Scheme.parse(scheme).weight is None:
                raise InputError(f"{text!r}: {scheme!r} stores nothing in few bits; leave linears alone with --ignore.")
        return Budget(float(found["amount"]) * factor, unit, schemes)


_BUDGET = re.compile(r"auto:(?P<amount>[0-9]+\.?[0-9]*)(?P<unit>KB|MB|GB|us|ms|s)?(?::(?P<schemes>.+))?")


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
    sensitivity_by: Way = "fisher",
    **words: Any,
) -> dict[str, Any]:
    """`lowbit.quantize`: as pipeline.quantize, and scheme="auto:..." chooses the schemes first.

    The document of an auto scheme has `allocation`, which is also written to OUT/allocation.json.
    """
    scheme = str(words.get("scheme") or "")
    how: dict[str, Any] = {"force": force, "max_memory": max_memory, "dry_run": dry_run, "workers": workers}
    if recipe is not None or not scheme.startswith(AUTO):
        return pipeline.quantize(model, output, recipe, resume=resume, **how, **words)
    budget = Budget.parse(scheme)
    recipe = Recipe(**{k: v for k, v in words.items() if k != "scheme"})
    check_output(Path(output), resume=resume, force=force)
    asked = {"requested": scheme, "recipe": recipe.to_dict(), "sensitivity": sensitivity_by}
    allocation = _finished(Path(output), asked) if resume else None
    if allocation is not None:  # nothing is left to choose; what is there is checked against the model and the text
        recipe = Recipe(**read_recipe(Path(output) / MANIFEST))
    else:
        recipe, allocation = choose(open_checkpoint(model), recipe, budget, sensitivity_by)
    document = pipeline.quantize(model, output, recipe, resume=resume, **how)
    if dry_run:
        return {**document, "scheme": scheme}
    allocation = {**asked, **allocation, "bits_per_weight": document["bits_per_weight"]}
    write_json(Path(output) / ALLOCATION, allocation)
    return {**document, "scheme": scheme, "allocation": allocation}


def _finished(output: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """What was chosen for the same request in an earlier run that came to its end."""
    if not ((output / ALLOCATION).exists() and (output / MANIFEST).exists()):
        return None
    record: dict[str, Any] = json.loads((output / ALLOCATION).read_text(encoding="utf-8"))
    return record if all(record.get(k) == v for k, v in asked.items()) else None


def choose(checkpoint: Checkpoint, recipe: Recipe, budget: Budget, way: Way) -> tuple[Recipe, dict[str, Any]]:
    """The recipe with a scheme for every group, and what is to be recorded about the choice."""
    rounding = recipe if recipe.method in ("rtn", "gptq") else replace(recipe, method="gptq", set=())
    calibration = pipeline.find_calibration(checkpoint, replace(rounding, method="gptq", set=()))
    assert calibration is not None
    given = (*recipe.ignore, *(pattern for pattern, _ in recipe.override))
    subject = Subject(checkpoint, calibration.tokens, lambda name: not any(matches(p, name) for p in given))
    schemes = _fitting(subject.groups, budget.schemes)
    probe = PROBE if _fits(subject.groups, PROBE) else schemes[0]
    found = sensitivity(subject, schemes, probe, rounding, way)
    cost, limit = _costs(checkpoint, found, budget)
    answer = allocate(list(found.kl), list(cost), limit)
    chosen = [schemes[o] for o in answer.choice]
    note(f"mixed precision: expected KL {answer.loss:.5f}, " + _counts(chosen))
    return _recipe(recipe, found.groups, chosen), _record(budget, found, answer, chosen)


def _fits(groups: Sequence[Group], scheme: str) -> bool:
    weight = Scheme.parse(scheme).weight
    assert weight is not None
    return all(s[1] % weight.tile(*s)[1] == 0 and s[0] % weight.tile(*s)[0] == 0 for g in groups for s in g.shapes)


def _fitting(groups: Sequence[Group], schemes: Sequence[str]) -> tuple[str, ...]:
    """The schemes that every layer's shape can take. Raises InputError if there is none."""
    if not groups:
        raise InputError("nothing is left to quantize: every linear is ignored or has a scheme of its own.")
    fitting = tuple(s for s in schemes if _fits(groups, s))
    if not fitting:
        raise InputError(f"none of the schemes {', '.join(schemes)} divides every layer's shape evenly.")
    return fitting


def _costs(checkpoint: Checkpoint, found: Sensitivity, budget: Budget) -> tuple[np.ndarray, float]:
    """(cost of every group and scheme, the limit of their sum), in the budget's unit."""
    if budget.unit == "bits":
        return found.bits, budget.amount * sum(g.weights for g in found.groups)
    if budget.unit == "bytes":
        inside = {f"{n}.weight" for g in found.groups for n in g.names}
        fixed = sum(info.nbytes for name, info in checkpoint.tensors.items() if name not in inside)
        return found.bits / 8, budget.amount - fixed
    seconds = group_seconds([s for g in found.groups for s in g.shapes], found.schemes)
    return np.array([np.sum([seconds[s] for s in g.shapes], axis=0) for g in found.groups]), budget.amount


def _recipe(recipe: Recipe, groups: Sequence[Group], chosen: Sequence[str]) -> Recipe:
    """The commonest scheme for all, overrides for the others; what the user wrote comes last and so wins."""
    common = Counter(chosen).most_common(1)[0][0]
    own = tuple((n, s) for g, s in zip(groups, chosen, strict=True) if s != common for n in g.names)
    return replace(recipe, scheme=common, override=own + recipe.override)


def _counts(chosen: Sequence[str]) -> str:
    return ", ".join(f"{s}: {n} groups" for s, n in sorted(Counter(chosen).items()))


def _record(budget: Budget, found: Sensitivity, answer: Allocation, chosen: Sequence[str]) -> dict[str, Any]:
    return {
        "budget": {"amount": budget.amount, "unit": budget.unit},
        "probe": found.probe,
        "expected_kl": answer.loss,
        "bound": answer.bound,
        "cost": answer.cost,
        "schemes": list(found.schemes),
        "groups": [
            {"names": list(g.names), "scheme": s, "weights": g.weights, "expected_kl": kl.tolist()}
            for g, s, kl in zip(found.groups, chosen, found.kl, strict=True)
        ],
    }
