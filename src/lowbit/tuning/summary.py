"""The table and the answer of `tune`, for a terminal."""

from pathlib import Path
from typing import Any

from lowbit.tuning.decide import measured

_HEADERS = ["candidate", "perplexity", "increase", "KL", "TPOT", "speed-up", "weights", "verdict"]


def summary(document: dict[str, Any]) -> str:
    original = document["original"]
    rows = [["original", f"{original['evaluate']['perplexity']:.3f}", "", "", *_speed(original["bench"], None), ""]]
    rows += [_row(c) for c in document["candidates"]]
    widths = [max(len(r[i]) for r in [_HEADERS, *rows]) for i in range(len(_HEADERS))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in [_HEADERS, *rows]]
    answer = document["recommendation"]
    head = {"original": "do not quantize", None: "none: no choice keeps all limits"}.get(answer["name"], answer["name"])
    lines += ["", f"recommendation: {head}", *(f"  {reason}" for reason in answer["reasons"])]
    return "\n".join([*lines, *_expected(document), "", f"report: {Path(document['output']) / 'report.html'}"])


def _row(c: dict[str, Any]) -> list[str]:
    e = c.get("evaluate")
    accuracy = ["", "", ""]
    if e is not None and not c["error"]:
        accuracy = [f"{e['perplexity']:.3f}", f"{e['perplexity_increase']:+.2%}", f"{e['kl']['mean']:.5f}"]
    return [c["name"], *accuracy, *_speed(c.get("bench"), c.get("ratio")), c["verdict"]]


def _speed(bench: dict[str, Any] | None, ratio: dict[str, Any] | None) -> list[str]:
    if bench is None:
        return ["", "", ""]
    gain = "" if ratio is None else f"{ratio['tpot']:.2f}x"
    return [f"{bench['tpot_s']['median'] * 1e3:.2f} ms", gain, f"{bench['weight_bytes'] / 1e6:.1f} MB"]


def _expected(document: dict[str, Any]) -> list[str]:
    """What the rules expected, next to what was measured."""
    order = [row["scheme"] for row in document["expected"]["order"]]
    done = sorted(measured(document["candidates"]), key=lambda c: -c["ratio"][document["limits"]["optimize"]])
    if len(order) < 2 or not done:
        return []
    found = list(dict.fromkeys(c["scheme"] for c in done))
    return [
        "",
        f"expected before measuring: {', '.join(order)}",
        f"measured, fastest first:   {', '.join(found)}",
    ]
