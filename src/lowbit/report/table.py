"""The table of the report: the original and every candidate, before and after, with why a candidate is no answer."""

from collections.abc import Sequence
from typing import Any

from lowbit.report.words import (
    NONE,
    Z95,
    between,
    digits,
    duration,
    get,
    interval95,
    milliseconds,
    number,
    percent,
    signed,
    size,
    text,
)

# ---- the table ----

_COLUMNS = (
    "Time per token", "Speed", "First token", "Tokens/s", "US$ per million", "Perplexity", "KL divergence",
    "Same top token", "Right answers", "Weights", "Peak memory", "Bandwidth used", "Quantizing",
)  # fmt: skip


Cell = tuple[str | None, ...]  # the figure, then what stands small below it


def _bench_cells(row: dict[str, Any], at_once: Any) -> dict[str, Cell]:
    """What was timed, by column; `row` is a candidate or the original."""
    bench, many = row.get("bench"), number(get(row, "concurrent", "throughput_tokens_per_s"))

    def spread(key: str) -> Cell:
        p90 = get(bench, key, "p90")
        return milliseconds(get(bench, key, "median")), None if p90 is None else f"p90 {milliseconds(p90)}"

    return {
        "Time per token": spread("tpot_s"),
        "First token": spread("ttft_s"),
        "Tokens/s": (
            digits(get(bench, "throughput_tokens_per_s")),
            None if many is None else f"{digits(many)} with {text(at_once)} at once",
        ),
        "US$ per million": (digits(row.get("cost_per_million_tokens")),),
        "Weights": (size(get(bench, "weight_bytes")), None),
        "Peak memory": (size(get(bench, "peak_memory_bytes")), None),
        "Bandwidth used": (percent(get(bench, "mbu"), decimals=0), None),
    }


def columns(document: dict[str, Any]) -> list[str]:
    """What there is to say of all: money only where it was asked for, answers only where there were questions."""
    limits = document.get("limits") or {}
    money = limits.get("optimize") == "cost" or limits.get("max_cost") is not None
    without = set() if money else {"US$ per million"}
    without |= set() if limits.get("tasks") else {"Right answers"}
    return [c for c in _COLUMNS if c not in without]


def rows(document: dict[str, Any], chosen: dict[str, Any] | None) -> list[dict[str, Any]]:
    """{name, note, kind, cells}: the original, then every candidate in the document's order."""
    named, original = columns(document), document.get("original") or {}
    at_once = get(document, "limits", "concurrency")
    found = [("original", "as it is", "original", _original_cells(original, at_once))]
    for c in document.get("candidates") or []:
        found.append((text(c.get("name")), reason(c, chosen), kind(c, chosen), _candidate_cells(c, at_once)))
    return [
        {"name": name, "note": note, "kind": which, "cells": [cells.get(column, (NONE,)) for column in named]}
        for name, note, which, cells in found
    ]


def kind(c: dict[str, Any], chosen: dict[str, Any] | None) -> str:
    """'chosen', 'ok' or 'out'."""
    return "chosen" if c is chosen else "ok" if c.get("verdict") == "ok" else "out"


def reason(c: dict[str, Any], chosen: dict[str, Any] | None) -> str:
    """Why a candidate is, or is not, the answer."""
    if c is chosen:
        return "recommended"
    verdict = str(c.get("verdict") or (f"failed: {c['error']}" if c.get("error") else "not judged"))
    return _shorter(verdict)


def _original_cells(original: dict[str, Any], at_once: Any) -> dict[str, Cell]:
    floor = original.get("noise_floor")
    kl, same = number(get(floor, "kl")), number(get(floor, "top1_agreement"))
    return _bench_cells(original, at_once) | {
        "Speed": ("1×", None),
        "Perplexity": (digits(get(original, "evaluate", "perplexity"), 4), None),
        "KL divergence": (digits(kl), None if kl is None else "noise floor"),
        "Same top token": (percent(same, decimals=1), None if same is None else "noise floor"),
        "Right answers": _answers(original.get("tasks")),
    }


def _candidate_cells(c: dict[str, Any], at_once: Any) -> dict[str, Cell]:
    e = c.get("evaluate")
    increase, kl = get(e, "perplexity_increase"), get(e, "kl", "mean")
    spread = interval95(increase, get(e, "perplexity_increase_stderr"), signed)
    low, high = (get(c, "ratio", "intervals", "tpot", end) for end in ("low", "high"))
    speed, error = number(get(c, "ratio", "tpot")), number(get(e, "kl", "stderr"))
    bits, memory = get(c, "quantize", "bits_per_weight"), get(c, "quantize", "peak_memory_bytes")
    bench = _bench_cells(c, at_once)
    return bench | {
        "Speed": (NONE if speed is None else f"{digits(speed)}×", between(low, high, lambda x: f"{digits(x)}×")),
        "Perplexity": (
            digits(get(e, "perplexity"), 4),
            None if increase is None else signed(increase),
            spread,
        ),
        "KL divergence": (digits(kl), None if error is None else f"± {digits(Z95 * error, 2)}"),
        "Same top token": (percent(get(e, "top1_agreement"), decimals=1), None),
        "Right answers": _answers(get(e, "tasks"), c.get("task_drops") or []),
        "Weights": (bench["Weights"][0], None if bits is None else f"{digits(bits)} bits"),
        "Quantizing": (duration(get(c, "quantize", "seconds")), None if memory is None else f"peak {size(memory)}"),
    }


def _answers(tasks: Any, drops: Sequence[dict[str, Any]] = ()) -> Cell:
    """The share of right answers to the first task, the others and what the paired test says below it."""
    found = []
    for task, own in (tasks or {}).items():
        drop = next((d for d in drops if d.get("task") == task), None)
        metric = get(drop, "metric") or next(iter(own.get("metrics") or {}), None)
        share = percent(get(own, "metrics", str(metric), "value"), decimals=1)
        p = number(get(drop, "mcnemar", "p_value"))
        found.append((share, f"{task}, {metric}" + ("" if p is None else f", p = {digits(p, 2)}")))
    if not found:
        return (NONE,)
    return found[0][0], found[0][1], *(f"{share} {words}" for share, words in found[1:])


def _shorter(verdict: str, most: int = 240) -> str:
    verdict = "within the limits" if verdict == "ok" else verdict
    return verdict if len(verdict) <= most else verdict[: most - 1] + "…"
