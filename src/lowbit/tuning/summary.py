"""The table and the answer of `tune`, for a terminal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowbit.tuning.decide import measured

_HEADERS = ["candidate", "perplexity", "increase", "KL", "TPOT", "speed-up", "weights"]


def summary(document: dict[str, Any]) -> str:
    original, asked = document["original"], _asked(document["limits"])
    headers = [*_HEADERS, *asked, "verdict"]
    own = [f"{original['evaluate']['perplexity']:.3f}", "", "", *_speed(original["bench"], None)]
    rows = [["original", *own, *(write(original) for write in asked.values()), ""]]
    for c in document["candidates"]:
        rows.append([*_row(c), *(write(c) for write in asked.values()), c["verdict"]])
    widths = [max(len(r[i]) for r in [headers, *rows]) for i in range(len(headers))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in [headers, *rows]]
    answer = document["recommendation"]
    head = {"original": "do not quantize", None: "none: no choice keeps all limits"}.get(answer["name"], answer["name"])
    lines += ["", f"recommendation: {head}", *(f"  {reason}" for reason in answer["reasons"])]
    return "\n".join([*lines, *_expected(document), "", f"report: {Path(document['output']) / 'report.html'}"])


def _asked(limits: dict[str, Any]) -> dict[str, Callable[[dict[str, Any]], str]]:
    """{header: cell of a row}: what is shown where it was asked for."""
    found: dict[str, Callable[[dict[str, Any]], str]] = {}
    if limits["tasks"]:
        found["right answers"] = _answers
    if limits["concurrency"] > 1:
        found[f"tokens/s x {limits['concurrency']}"] = lambda row: _number(
            (row.get("concurrent") or {}).get("throughput_tokens_per_s"), ".0f"
        )
    if limits["optimize"] == "cost" or limits["max_cost"] is not None:
        found["US$/M tokens"] = lambda row: _number(row.get("cost_per_million_tokens"), ".4f")
    return found


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _answers(row: dict[str, Any]) -> str:
    """The original's own shares of right answers, or what a candidate lost of them."""
    if "task_drops" in row:
        return ", ".join(f"{-100 * d['drop']:+.1f} (p {d['mcnemar']['p_value']:.2g})" for d in row["task_drops"])
    tasks = (row.get("tasks") or {}).values() if row.get("error") is None else ()
    return ", ".join(f"{100 * next(iter(t['metrics'].values()))['value']:.1f}%" for t in tasks)


def _row(c: dict[str, Any]) -> list[str]:
    e = c.get("evaluate")
    accuracy = ["", "", ""]
    if e is not None and not c["error"]:
        accuracy = [f"{e['perplexity']:.3f}", f"{e['perplexity_increase']:+.2%}", f"{e['kl']['mean']:.5f}"]
    return [c["name"], *accuracy, *_speed(c.get("bench"), c.get("ratio"))]


def _speed(bench: dict[str, Any] | None, ratio: dict[str, Any] | None) -> list[str]:
    if bench is None:
        return ["", "", ""]
    gain = "" if ratio is None else f"{ratio['tpot']:.2f}x"
    return [f"{bench['tpot_s']['median'] * 1e3:.2f} ms", gain, f"{bench['weight_bytes'] / 1e6:.1f} MB"]


def _expected(document: dict[str, Any]) -> list[str]:
    """What the rules expected, next to what was measured."""
    order = [row["scheme"] for row in document["expected"]["order"]]
    key = document["limits"]["optimize"]  # of an accuracy there is no ratio: then the speed is shown
    done = sorted(measured(document["candidates"]), key=lambda c: -c["ratio"].get(key, c["ratio"]["tpot"]))
    if len(order) < 2 or not done:
        return []
    found = list(dict.fromkeys(c["scheme"] for c in done))
    return [
        "",
        f"expected before measuring: {', '.join(order)}",
        f"measured, fastest first:   {', '.join(found)}",
    ]
