"""What the report draws: speed against accuracy, and each layer's error."""

import re
from statistics import median
from typing import Any

from lowbit.report.table import kind, reason
from lowbit.report.words import NONE, Z95, digits, get, interval95, milliseconds, number, percent, signed, size, text

# ---- the picture of speed against accuracy ----


def chart_of(document: dict[str, Any], chosen: dict[str, Any] | None) -> dict[str, Any]:
    """Points in milliseconds, percent and nats; what is not measured is not drawn."""
    original = document.get("original") or {}
    truth, floor = get(original, "evaluate", "perplexity"), get(original, "noise_floor")
    own = number(get(floor, "perplexity"))
    drift = 0.0 if own is None or not number(truth) else own / truth - 1
    bench, noise = original.get("bench"), get(floor, "kl") or 0.0
    points = [_point("original", "original", "as it is", bench, (drift, None, noise, None))]
    for c in document.get("candidates") or []:
        e = c.get("evaluate")
        increase, error = (get(e, k) for k in ("perplexity_increase", "perplexity_increase_stderr"))
        loss = increase, error, get(e, "kl", "mean"), get(e, "kl", "stderr")
        points.append(_point(text(c.get("name")), kind(c, chosen), reason(c, chosen), c.get("bench"), loss))
    limit = number(get(document, "limits", "max_ppl_increase"))
    pareto = set(document.get("pareto") or [])
    drawn = [p | {"pareto": p["name"] in pareto} for p in points if p]
    return {"limit": None if limit is None else 100 * limit, "points": drawn}


_SEEN = "too inaccurate: perplexity"  # the reason that the picture shows by itself: above the line
_NUMBER = re.compile(r"[:\s]*[-+−]?\d.*|:.*", re.S)


def ruled_out(chart: dict[str, Any]) -> dict[str, list[str]]:
    """{symbol: the reasons, in short}, for the legend: a square is a point that another limit than the one drawn, or
    too little gain, has ruled out."""
    found: dict[str, list[str]] = {"circle": [], "square": []}
    for p in chart["points"]:
        if p["kind"] == "out":
            words = "too inaccurate" if not p["elsewhere"] else _in_short(p["why"])
            found["square" if p["elsewhere"] else "circle"].append(words)
    return {symbol: list(dict.fromkeys(words)) for symbol, words in found.items() if words}


def _in_short(why: str) -> str:
    """'too large: peak memory 100 MB, limit 10 MB' -> 'too large: peak memory'; 'no gain: 1.01x ...' -> 'no gain'."""
    head, colon, rest = why.partition(": ")
    return head + (colon + _NUMBER.sub("", rest) if rest[:1].isalpha() else "")


def _point(name: str, kind: str, why: str, bench: Any, loss: tuple[Any, Any, Any, Any]) -> dict[str, Any] | None:
    """`loss`: perplexity increase and KL, each with its standard error."""
    increase, increase_error, kl, kl_error = loss
    x, ppl, nats = (number(v) for v in (get(bench, "tpot_s", "median"), increase, kl))
    if x is None or (ppl is None and nats is None):
        return None
    weights = number(get(bench, "weight_bytes"))
    spread = interval95(ppl, increase_error, signed)
    return {
        "name": name,
        "kind": kind,
        "why": why,
        "elsewhere": kind == "out" and not why.startswith(_SEEN),
        "x": 1e3 * x,
        "bytes": weights,
        "ppl": None if ppl is None else 100 * ppl,
        "ppl_error": 100 * Z95 * (number(increase_error) or 0.0),
        "kl": nats,
        "kl_error": Z95 * (number(kl_error) or 0.0),
        "words": [
            ["time per token", milliseconds(x)],
            ["perplexity", signed(ppl) + (f" ({spread})" if spread else "")],
            ["KL divergence", digits(nats)],
            ["weights", size(weights)],
            ["verdict", why],
        ],
    }


def chart_words(chart: dict[str, Any]) -> str:
    """The picture in a sentence, for who does not see it."""
    said = "; ".join(f"{p['name']}: " + ", ".join(f"{k} {v}" for k, v in p["words"]) for p in chart["points"])
    return f"Time per token against what accuracy was lost. {said}."


# ---- the layers ----

_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")


def heatmap(c: dict[str, Any], chosen: bool) -> dict[str, Any] | None:
    """What is left of round-to-nearest's loss, by kind of linear (rows) and block (columns).

    Numbers in a name after the block's (experts) are one row: their losses add up. None where nothing differs from
    round-to-nearest.
    """
    sums: dict[tuple[str, str], list[float]] = {}
    fallbacks: dict[tuple[str, str], str] = {}
    for layer in get(c, "quantize", "layers") or []:
        loss, plain = number(layer.get("loss")), number(layer.get("loss_rtn"))
        if loss is None or not plain:
            continue
        name = str(layer.get("name"))
        index = _INDEX.search(name)
        block, kind = (index[0], _INDEX.sub("*", name[index.end() + 1 :])) if index else (NONE, name)
        total = sums.setdefault((kind, block), [0.0, 0.0])
        total[0], total[1] = total[0] + loss, total[1] + plain
        if layer.get("fallback"):
            fallbacks[kind, block] = str(layer["fallback"])
    shares = {at: loss / plain for at, (loss, plain) in sums.items()}
    if all(s == 1 for s in shares.values()):
        return None
    blocks = list(dict.fromkeys(block for _, block in shares))
    kinds = list(dict.fromkeys(kind for kind, _ in shares))
    short = [kind.rsplit(".", 1)[-1] for kind in kinds]
    labels = short if len(set(short)) == len(kinds) else kinds
    rows = [
        {"label": label, "cells": [_heat(shares.get((k, b)), fallbacks.get((k, b))) for b in blocks]}
        for k, label in zip(kinds, labels, strict=True)
    ]
    total_share = sum(v[0] for v in sums.values()) / sum(v[1] for v in sums.values())
    return {
        "name": text(c.get("name")),
        "open": chosen,
        "blocks": blocks,
        "rows": rows,
        "words": f"{percent(total_share, decimals=0)} of round-to-nearest's loss is left over all layers, "
        f"{percent(median(shares.values()), decimals=0)} in the median layer, "
        f"{percent(max(shares.values()), decimals=0)} in the worst; {len(fallbacks) or 'none'} kept round-to-nearest.",
    }


def _heat(share: float | None, fallback: str | None) -> dict[str, Any]:
    """tint: how much of the loss is gone, 0 to 100; above 1 the method did harm."""
    if share is None:
        return {"text": "", "tint": 0, "worse": False, "fallback": None}
    return {
        "text": "<1" if 0 < share < 0.005 else f"{100 * share:.0f}",
        "tint": round(100 * min(abs(1 - share), 1)),
        "worse": share > 1,
        "fallback": fallback,
    }
