"""From measured candidates to one recommendation: filter by the limits, compare with the original, explain."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

OBJECTIVES = {  # name, also of the ratio in the bench document -> what a ratio above 1 means
    "tpot": "faster per token",
    "ttft": "faster to the first token",
    "throughput": "more tokens a second",
    "memory": "less peak memory",
}
LEAST_GAIN = 1.03  # a smaller difference is not worth a changed model


@dataclass(frozen=True)
class Limits:
    """What the user can give up and wants: shares, bytes, and a key of OBJECTIVES."""

    max_ppl_increase: float
    max_memory: int | None
    optimize: str


def verdict(candidate: dict[str, Any], limits: Limits) -> str:
    """'ok', or the first reason why this candidate is not an answer."""
    if candidate.get("error"):
        return f"failed: {candidate['error']}"
    chosen_by, reported = candidate["selection"]["perplexity_increase"], candidate["evaluate"]["perplexity_increase"]
    worst = max(chosen_by, reported)
    if worst > limits.max_ppl_increase:
        return f"too inaccurate: perplexity {worst:+.2%}, limit {limits.max_ppl_increase:+.2%}"
    memory = candidate["bench"]["peak_memory_bytes"]
    if limits.max_memory is not None and memory > limits.max_memory:
        return f"too large: {memory / 1e6:.0f} MB at its peak, limit {limits.max_memory / 1e6:.0f} MB"
    gain, better = candidate["ratio"][limits.optimize], OBJECTIVES[limits.optimize]
    if gain < LEAST_GAIN:
        return f"no gain: {gain:.2f}x {better}"
    interval = (candidate["ratio"].get("intervals") or {}).get(limits.optimize)
    if interval and interval["low"] <= 1:
        return (
            f"not outside the noise: {gain:.2f}x {better}, {interval['confidence']:.0%} interval "
            f"{interval['low']:.2f}x to {interval['high']:.2f}x"
        )
    return "ok"


def pareto(candidates: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the candidates that no other one beats in both time per token and KL divergence."""
    measured = [c for c in candidates if not c.get("error")]
    points = {c["name"]: (c["bench"]["tpot_s"]["median"], c["evaluate"]["kl"]["mean"]) for c in measured}
    return [
        name
        for name, (time, kl) in points.items()
        if not any(t <= time and k <= kl and (t, k) != (time, kl) for t, k in points.values())
    ]


def recommend(candidates: Sequence[dict[str, Any]], limits: Limits) -> dict[str, Any]:
    """{name, reasons}: the best candidate within the limits, or 'original' and why."""
    key, better = limits.optimize, OBJECTIVES[limits.optimize]
    good = [c for c in candidates if c["verdict"] == "ok"]
    if good:
        most = max(c["ratio"][key] for c in good)
        as_fast = [c for c in good if c["ratio"][key] > most / LEAST_GAIN]
        best = min(as_fast, key=lambda c: c["evaluate"]["kl"]["mean"])
        e, ratio = best["evaluate"], best["ratio"]
        return {
            "name": best["name"],
            "reasons": [
                f"{ratio[key]:.2f}x {better} than the original, the best within the limits",
                f"perplexity {e['perplexity_increase']:+.2%} ± {e['perplexity_increase_stderr']:.2%} on text that "
                f"chose nothing (limit {limits.max_ppl_increase:+.2%}), KL {e['kl']['mean']:.5f}",
                f"weights {best['bench']['weight_bytes'] / 1e6:.1f} MB, "
                f"{best['quantize']['bits_per_weight']:.2f} bits per quantized weight",
            ],
        }
    reasons = [f"no candidate is {better} within the limits here, outside the noise"]
    reasons += [f"{c['name']}: {c['verdict']}" for c in candidates]
    return {"name": "original", "reasons": reasons}
