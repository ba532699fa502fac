"""From measured candidates to one recommendation: filter by the limits, compare with the original, explain."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

OBJECTIVES = {  # name, also of the ratio in the bench document -> what a ratio above 1 means
    "tpot": "faster per token",
    "ttft": "faster to the first token",
    "throughput": "more tokens a second",
    "memory": "less peak memory",
}
LEAST_CONFIDENCE = 0.9  # what too few runs cannot give: no winner is called on them
LEAST_GAIN = 1.03  # a smaller difference is not worth a changed model


@dataclass(frozen=True)
class Limits:
    """What the user can give up and wants: shares, nats, bytes, seconds, and a key of OBJECTIVES. None: no limit."""

    max_ppl_increase: float = 0.01
    max_memory: int | None = None
    optimize: str = "tpot"
    max_kl: float | None = None
    max_ttft: float | None = None
    max_tpot: float | None = None


@dataclass(frozen=True)
class Check:
    """One limit against one candidate."""

    option: str
    value: float
    limit: float
    words: str  # the verdict where it is not met

    @property
    def met(self) -> bool:
        return self.value <= self.limit

    @property
    def excess(self) -> float:
        """How many times the limit; comparable between limits of different units."""
        return self.value / self.limit if self.limit else float("inf")


def checks(candidate: dict[str, Any], limits: Limits) -> list[Check]:
    """Every limit that is set, with what this measured candidate has; the worse of selection and confirmation."""
    parts, bench = (candidate["selection"], candidate["evaluate"]), candidate["bench"]
    ppl, kl = max(p["perplexity_increase"] for p in parts), max(p["kl"]["mean"] for p in parts)
    memory, ttft, tpot = bench["peak_memory_bytes"], bench["ttft_s"]["median"], bench["tpot_s"]["median"]
    found: list[tuple[str, float, float | None, str, Callable[[float], str]]] = [
        ("--max-ppl-increase", ppl, limits.max_ppl_increase, "too inaccurate: perplexity", lambda x: f"{x:+.2%}"),
        ("--max-kl", kl, limits.max_kl, "too inaccurate: KL", lambda x: f"{x:.5f}"),
        ("--max-memory", memory, limits.max_memory, "too large: peak memory", lambda x: f"{x / 1e6:.0f} MB"),
        ("--max-ttft", ttft, limits.max_ttft, "too slow: first token", lambda x: f"{x * 1e3:.1f} ms"),
        ("--max-tpot", tpot, limits.max_tpot, "too slow: per token", lambda x: f"{x * 1e3:.2f} ms"),
    ]
    return [
        Check(option, value, limit, f"{words} {write(value)}, limit {write(limit)}")
        for option, value, limit, words, write in found
        if limit is not None
    ]


def verdict(candidate: dict[str, Any], limits: Limits) -> str:
    """'ok', or the first reason why this candidate is not an answer."""
    if candidate.get("error"):
        return f"failed: {candidate['error']}"
    if candidate.get("dropped"):
        return str(candidate["dropped"])
    for check in checks(candidate, limits):
        if not check.met:
            return check.words
    gain, better = candidate["ratio"][limits.optimize], OBJECTIVES[limits.optimize]
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

    `original`: its `bench` result, to hold against the limits on memory and time.
    """
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
    reasons += why_none(candidates, limits)
    reasons += [f"{c['name']}: {c['verdict']}" for c in candidates]
    broken = [] if original is None else _broken_by_original(original, limits)
    if broken:
        reasons.insert(1, "the original breaks a limit as well: " + "; ".join(broken))
    return {"name": None if broken else "original", "reasons": reasons}


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
            name = min(rows, key=lambda n: rows[n][i].value)
            said.append(f"{first.option} cannot be reached; the closest is {name} ({rows[name][i].words})")
    if not said:
        options = list(dict.fromkeys(k.option for row in missed.values() for k in row))
        said.append(f"the limits contradict each other: {' and '.join(options)} are each met, but never together")
    return [*said, f"closest to all limits: {closest} ({'; '.join(k.words for k in missed[closest])})"]


def _broken_by_original(bench: dict[str, Any], limits: Limits) -> list[str]:
    nothing_lost = {"perplexity_increase": float("-inf"), "kl": {"mean": float("-inf")}}
    found = checks({"selection": nothing_lost, "evaluate": nothing_lost, "bench": bench}, limits)
    return [k.words for k in found if not k.met]
