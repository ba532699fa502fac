"""From measured candidates to one recommendation: filter by the limits, compare with the original, explain."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lowbit.intervals import mean_interval
from lowbit.tuning.limits import MEASURES, Check, Limits, checks

LEAST_CONFIDENCE = 0.9  # what too few runs cannot give: no winner is called on them
LEAST_GAIN = 1.03  # a smaller difference is not worth a changed model


def verdict(candidate: dict[str, Any], limits: Limits) -> str:
    """'ok', or the first reason why this candidate is not an answer."""
    if candidate.get("error"):
        return f"failed: {candidate['error']}"
    if candidate.get("dropped"):
        return str(candidate["dropped"])
    for check in checks(candidate, limits):
        if not check.met:
            return check.words
    if MEASURES[limits.optimize].accuracy:
        return "ok"  # the limits are why anything is quantized at all
    gain, better = candidate["ratio"][limits.optimize], MEASURES[limits.optimize].better
    if gain < LEAST_GAIN:
        return f"no gain: {gain:.2f}x {better}"
    interval = (candidate["ratio"].get("intervals") or {}).get(limits.optimize)
    if interval and (interval["low"] <= 1 or interval["confidence"] < LEAST_CONFIDENCE):
        return (
            f"not outside the noise: {gain:.2f}x {better}, {interval['confidence']:.0%} interval "
            f"{interval['low']:.2f}x to {interval['high']:.2f}x"
        )
    return "ok"


def measured(candidates: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that went the whole way."""
    return [c for c in candidates if not c.get("error") and not c.get("dropped")]


def pareto(candidates: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the candidates that no other one beats in both time per token and KL divergence."""
    points = {c["name"]: (c["bench"]["tpot_s"]["median"], c["evaluate"]["kl"]["mean"]) for c in measured(candidates)}
    return [
        name
        for name, (time, kl) in points.items()
        if not any(t <= time and k <= kl and (t, k) != (time, kl) for t, k in points.values())
    ]


def recommend(
    candidates: Sequence[dict[str, Any]], limits: Limits, original: dict[str, Any] | None = None
) -> dict[str, Any]:
    """{name, reasons}: the best candidate within the limits; 'original' if none is; None if that breaks a limit too.

    `original`: its `bench` (and `concurrent`, `cost_per_million_tokens`), to hold against the limits on memory, time
    and money.
    """
    wanted = MEASURES[limits.optimize]
    good = [c for c in candidates if c["verdict"] == "ok"]
    broken = [] if original is None else _broken_by_original(original, limits)
    if wanted.accuracy and original is not None and not broken:
        reasons = ["the original keeps all limits itself, and nothing is closer to it than it is"]
        return {"name": "original", "reasons": reasons + [f"{c['name']}: {c['verdict']}" for c in candidates]}
    if good:
        best = _closest(good, limits) if wanted.accuracy else _fastest(good, limits)
        return {"name": best["name"], "reasons": _praise(best, good, limits)}
    none = f"no candidate is {wanted.better} within the limits here, outside the noise"
    reasons = ["no candidate keeps the limits here" if wanted.accuracy else none]
    reasons += why_none(candidates, limits)
    reasons += [f"{c['name']}: {c['verdict']}" for c in candidates]
    if broken:
        reasons.insert(1, "the original breaks a limit as well: " + "; ".join(broken))
    return {"name": None if broken else "original", "reasons": reasons}


def _fastest(good: Sequence[dict[str, Any]], limits: Limits) -> dict[str, Any]:
    """The one with the most gain; among those within LEAST_GAIN of it, the one with the least KL."""
    most = max(c["ratio"][limits.optimize] for c in good)
    as_fast = [c for c in good if c["ratio"][limits.optimize] > most / LEAST_GAIN]
    return min(as_fast, key=lambda c: float(c["evaluate"]["kl"]["mean"]))


def _closest(good: Sequence[dict[str, Any]], limits: Limits) -> dict[str, Any]:
    """The most accurate one; among those that the same windows or questions cannot tell from it, the fastest."""
    best = min(good, key=MEASURES[limits.optimize].value)
    losses = _losses(best, limits.optimize)
    as_good = [c for c in good if c is best or mean_interval(_losses(c, limits.optimize) - losses).low <= 0]
    return max(as_good, key=lambda c: float(c["ratio"]["tpot"]))


def _losses(candidate: dict[str, Any], objective: str) -> np.ndarray:
    """One value a window, or a question: nll, KL, or 1 for a wrong answer."""
    evaluated = candidate["evaluate"]
    if objective != "tasks":
        return np.array(evaluated["per_window"]["kl" if objective == "kl" else "nll"])
    counted = [(d["task"], d["metric"]) for d in candidate["task_drops"]]
    return np.array([1.0 - s["scores"][m] for task, m in counted for s in evaluated["tasks"][task]["samples"]])


def _praise(best: dict[str, Any], good: Sequence[dict[str, Any]], limits: Limits) -> list[str]:
    """Why this one of the good ones, with its numbers."""
    e, key, wanted = best["evaluate"], limits.optimize, MEASURES[limits.optimize]
    first = f"{wanted.better} within the limits, {best['ratio']['tpot']:.2f}x faster per token"
    if not wanted.accuracy:
        most = max(good, key=lambda c: float(c["ratio"][key]))
        why = "the best within the limits"
        if most is not best:
            why = f"within {LEAST_GAIN - 1:.0%} of {most['name']}, and closer to the original"
        first = f"{best['ratio'][key]:.2f}x {wanted.better} than the original, {why}"
    reasons = [
        first,
        f"perplexity {e['perplexity_increase']:+.2%} ± {e['perplexity_increase_stderr']:.2%} on text that "
        f"chose nothing (limit {limits.max_ppl_increase:+.2%}), KL {e['kl']['mean']:.5f}",
        *(d["words"] for d in best.get("task_drops") or []),
    ]
    if limits.concurrency > 1:
        reasons.append(f"{MEASURES['throughput'].value(best):.0f} tokens/s with {limits.concurrency} sequences at once")
    if key == "cost" or limits.max_cost is not None:
        cost = MEASURES["cost"]
        reasons.append(f"{cost.write(cost.value(best))} per million generated tokens on {limits.hardware}")
    weights = f"weights {best['bench']['weight_bytes'] / 1e6:.1f} MB"
    return [*reasons, f"{weights}, {best['quantize']['bits_per_weight']:.2f} bits per quantized weight"]


def why_none(candidates: Sequence[dict[str, Any]], limits: Limits) -> list[str]:
    """Which limit no candidate meets, or that limits contradict each other, and the candidate that comes closest."""
    rows = {c["name"]: checks(c, limits) for c in measured(candidates)}
    missed = {name: [k for k in row if not k.met] for name, row in rows.items()}
    if not rows or not all(missed.values()):
        return []  # what meets all limits fails for want of speed, and its verdict says so
    closest = min(missed, key=lambda name: max(k.excess for k in missed[name]))
    said = []
    for i, first in enumerate(next(iter(rows.values()))):
        if not any(row[i].met for row in rows.values()):
            name = min(rows, key=lambda n: _distance(rows[n][i]))
            said.append(f"{first.option} cannot be reached; the closest is {name} ({rows[name][i].words})")
    if not said:
        options = list(dict.fromkeys(k.option for row in missed.values() for k in row))
        said.append(f"the limits contradict each other: {' and '.join(options)} are each met, but never together")
    return [*said, f"closest to all limits: {closest} ({'; '.join(k.words for k in missed[closest])})"]


def _distance(check: Check) -> float:
    return -check.value if check.more else check.value


def _broken_by_original(original: dict[str, Any], limits: Limits) -> list[str]:
    nothing_lost = {"perplexity_increase": float("-inf"), "kl": {"mean": float("-inf")}}
    found = checks(original | {"selection": nothing_lost, "evaluate": nothing_lost, "task_drops": []}, limits)
    return [k.words for k in found if not k.met]
