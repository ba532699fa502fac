"""The `tune` document, told in words: what the template prints and what the picture draws.

Every figure may be missing (a candidate that crashed, an older document): `get` walks to it or gives None, and the
formatters print an en dash for None. Times come in seconds and sizes in bytes.
"""

import math
import re
import shlex
from collections.abc import Sequence
from statistics import median
from typing import Any

NONE = "–"
_Z95 = 1.96  # two-sided 95 % of a normal distribution
_OBJECTIVES = {  # limits.optimize -> (key of `ratio`, words above 1, words below 1)
    "tpot": ("tpot", "faster per token", "slower per token"),
    "ttft": ("ttft", "sooner to the first token", "later to the first token"),
    "throughput": ("throughput", "higher in throughput", "lower in throughput"),
    "memory": ("memory", "smaller in memory", "larger in memory"),
}


def view(document: dict[str, Any]) -> dict[str, Any]:
    """Everything that template.html.j2 names."""
    original = document.get("original") or {}
    candidates = document.get("candidates") or []
    answer = get(document, "recommendation", "name")
    chosen = next((c for c in candidates if answer and c.get("name") == answer), None)
    first: list[dict[str, Any]] = sorted(candidates, key=lambda c: c is not chosen)
    chart = _chart(document, chosen)
    return {
        "title": _title(document, chosen),
        "sentence": _sentence(document, chosen),
        "chosen": get(chosen, "name"),
        "model": text(document.get("model")),
        "version": text(document.get("lowbit_version")),
        "reasons": get(document, "recommendation", "reasons") or [],
        "tiles": _tiles(document, original, chosen),
        "columns": COLUMNS,
        "rows": [_original_row(original), *(_candidate_row(c, c is chosen) for c in candidates)],
        "chart": chart,
        "chart_words": _chart_words(chart),
        "heatmaps": [h for c in first if (h := _heatmap(c, c is chosen))],
        "samples": [_sample(s, [c.get("name") for c in first]) for s in document.get("samples") or []],
        "facts": _facts(document, original, chosen),
        "floor": _floor(original),
        "reproduce": _reproduce(document),
        "deploy": _deploy(document, chosen),
    }


# ---- reading and printing ----


def get(value: Any, *keys: str) -> Any:
    """value[k0][k1]..., or None where a step is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def number(value: Any) -> float | None:
    """A finite float, or None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def text(value: Any) -> str:
    return NONE if value is None or value == "" else str(value)


def digits(value: Any, least: int = 3) -> str:
    """At least three significant digits: 0.0123, 1.23, 12.3, 123, 12345."""
    x = number(value)
    if x is None:
        return NONE
    if x == 0:
        return "0"
    decimals = least - 1 - math.floor(math.log10(abs(x)))
    if decimals > 7:
        mantissa, exponent = f"{x:.{least - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    return f"{x:.{max(decimals, 0)}f}".replace("-", "−")


def percent(value: Any, sign: str = "", decimals: int = 2) -> str:
    """0.0123 -> 1.23 % (sign '+': +1.23 %), without trailing zeros."""
    x = number(value)
    if x is None:
        return NONE
    shown = f"{100 * x:{sign}.{decimals if abs(x) < 0.1 else min(decimals, 1)}f}"
    if "." in shown:
        shown = shown.rstrip("0").rstrip(".")
    return f"{'0' if shown in ('+0', '-0') else shown}\u00a0%".replace("-", "−")


def _signed(value: Any) -> str:
    return percent(value, "+")


def milliseconds(seconds: Any) -> str:
    x = number(seconds)
    return NONE if x is None else f"{digits(1e3 * x)}\u00a0ms"


def size(n: Any) -> str:
    x = number(n)
    if x is None:
        return NONE
    return f"{digits(x / 1e9)}\u00a0GB" if x >= 1e9 else f"{digits(x / 1e6)}\u00a0MB"


def duration(seconds: Any) -> str:
    x = number(seconds)
    if x is None:
        return NONE
    return f"{digits(x, 2)} s" if x < 120 else f"{x / 60:.0f} min" if x < 7200 else f"{x / 3600:.1f} h"


def times(ratio: Any, more: str, less: str) -> str:
    """2.9 -> '2.90× faster'; 0.8 -> '1.25× slower'."""
    x = number(ratio)
    if x is None or x <= 0:
        return NONE
    return f"{digits(x)}× {more}" if x >= 1 else f"{digits(1 / x)}× {less}"


def between(low: Any, high: Any, write: Any) -> str | None:
    a, b = number(low), number(high)
    return None if a is None or b is None else f"{write(a)} to {write(b)}"


def interval95(mean: Any, stderr: Any, write: Any) -> str | None:
    """'0.41 % to 0.83 %', the 95 % interval of a mean."""
    m, s = number(mean), number(stderr)
    return None if m is None or s is None else between(m - _Z95 * s, m + _Z95 * s, write)


# ---- the head of the page ----


def _title(document: dict[str, Any], chosen: dict[str, Any] | None) -> str:
    name = chosen["name"] if chosen else "do not quantize" if _says_original(document) else "no recommendation"
    return f"{name}: {text(document.get('model'))}"


def _says_original(document: dict[str, Any]) -> bool:
    return bool(get(document, "recommendation", "name") == "original")


def _sentence(document: dict[str, Any], chosen: dict[str, Any] | None) -> str:
    key, more, less = _OBJECTIVES.get(get(document, "limits", "optimize"), _OBJECTIVES["tpot"])
    if chosen is None:
        if not _says_original(document):
            return "No recommendation was made."
        limit = get(document, "limits", "max_ppl_increase")
        within = "" if limit is None else f" within a perplexity increase of {percent(limit)}"
        return f"Do not quantize: nothing measured here is {more}{within}."
    gain, cost = get(chosen, "ratio", key), get(chosen, "evaluate", "perplexity_increase")
    parts = [] if number(gain) is None else [times(gain, more, less)]
    parts += [] if number(cost) is None else [f"{percent(cost, '+')} perplexity"]
    return f"Use {chosen['name']}" + (f": {', '.join(parts)}." if parts else ".")


def _tiles(document: dict[str, Any], original: dict[str, Any], chosen: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The four numbers a manager asks for; without a candidate, those of the original."""
    before, after = original.get("bench"), get(chosen, "bench")

    def change(*keys: str, write: Any) -> str:
        return f"{write(get(before, *keys))} → {write(get(after, *keys))}"

    if chosen is None:
        tiles = [
            ("Time per token", milliseconds(get(before, "tpot_s", "median")), ["the original"]),
            ("First token", milliseconds(get(before, "ttft_s", "median")), ["the original"]),
            ("Weights", size(get(before, "weight_bytes")), ["the original"]),
            ("Perplexity", digits(get(original, "evaluate", "perplexity"), 4), ["the original"]),
        ]
    else:
        small, large = number(get(after, "weight_bytes")), number(get(before, "weight_bytes"))
        cost, error = (get(chosen, "evaluate", k) for k in ("perplexity_increase", "perplexity_increase_stderr"))
        spread, limit = interval95(cost, error, _signed), get(document, "limits", "max_ppl_increase")
        words = [f"95\u00a0%: {spread}"] if spread else []
        words += [f"limit {_signed(limit)}"] if number(limit) is not None else []
        speed, first = get(chosen, "ratio", "tpot"), get(chosen, "ratio", "ttft")
        tiles = [
            ("Time per token", times(speed, "faster", "slower"), [change("tpot_s", "median", write=milliseconds)]),
            ("Perplexity", _signed(cost), words),
            (
                "Weights",
                times(large / small if small and large else None, "smaller", "larger"),
                [change("weight_bytes", write=size)],
            ),
            ("First token", times(first, "sooner", "later"), [change("ttft_s", "median", write=milliseconds)]),
        ]
    return [{"label": label, "value": value, "lines": lines} for label, value, lines in tiles if value != NONE]


# ---- the table ----

COLUMNS = (
    "Time per token", "Speed", "First token", "Tokens/s", "Perplexity", "KL divergence", "Same top token",
    "Weights", "Peak memory", "Bandwidth used", "Quantizing",
)  # fmt: skip


Cell = tuple[str | None, ...]  # the figure, then what stands small below it


def _bench_cells(bench: Any) -> dict[str, Cell]:
    """What a bench result says, by column."""

    def spread(key: str) -> Cell:
        p90 = get(bench, key, "p90")
        return milliseconds(get(bench, key, "median")), None if p90 is None else f"p90 {milliseconds(p90)}"

    return {
        "Time per token": spread("tpot_s"),
        "First token": spread("ttft_s"),
        "Tokens/s": (digits(get(bench, "throughput_tokens_per_s")),),
        "Weights": (size(get(bench, "weight_bytes")), None),
        "Peak memory": (size(get(bench, "peak_memory_bytes")), None),
        "Bandwidth used": (percent(get(bench, "mbu"), decimals=0), None),
    }


def _row(name: str, note: str, kind: str, cells: dict[str, Cell]) -> dict[str, Any]:
    return {"name": name, "note": note, "kind": kind, "cells": [cells.get(c, (NONE,)) for c in COLUMNS]}


def _original_row(original: dict[str, Any]) -> dict[str, Any]:
    floor = original.get("noise_floor")
    kl, same = number(get(floor, "kl")), number(get(floor, "top1_agreement"))
    cells = _bench_cells(original.get("bench")) | {
        "Speed": ("1×", None),
        "Perplexity": (digits(get(original, "evaluate", "perplexity"), 4), None),
        "KL divergence": (digits(kl), None if kl is None else "noise floor"),
        "Same top token": (percent(same, decimals=1), None if same is None else "noise floor"),
    }
    return _row("original", "as it is", "original", cells)


def _candidate_row(c: dict[str, Any], chosen: bool) -> dict[str, Any]:
    e, b = c.get("evaluate"), c.get("bench")
    increase, kl = get(e, "perplexity_increase"), get(e, "kl", "mean")
    spread = interval95(increase, get(e, "perplexity_increase_stderr"), _signed)
    low, high = get(c, "ratio", "tpot_range") or (None, None)
    speed, error = number(get(c, "ratio", "tpot")), number(get(e, "kl", "stderr"))
    bits, memory = get(c, "quantize", "bits_per_weight"), get(c, "quantize", "peak_memory_bytes")
    bench = _bench_cells(b)
    cells = bench | {
        "Speed": (NONE if speed is None else f"{digits(speed)}×", between(low, high, lambda x: f"{digits(x)}×")),
        "Perplexity": (
            digits(get(e, "perplexity"), 4),
            None if increase is None else _signed(increase),
            spread,
        ),
        "KL divergence": (digits(kl), None if error is None else f"± {digits(_Z95 * error, 2)}"),
        "Same top token": (percent(get(e, "top1_agreement"), decimals=1), None),
        "Weights": (bench["Weights"][0], None if bits is None else f"{digits(bits)} bits"),
        "Quantizing": (duration(get(c, "quantize", "seconds")), None if memory is None else f"peak {size(memory)}"),
    }
    verdict = str(c.get("verdict") or (f"failed: {c['error']}" if c.get("error") else "not judged"))
    kind = "chosen" if chosen else "ok" if verdict == "ok" else "out"
    return _row(text(c.get("name")), "recommended" if chosen else _shorter(verdict), kind, cells)


def _shorter(verdict: str, most: int = 240) -> str:
    verdict = "within the limits" if verdict == "ok" else verdict
    return verdict if len(verdict) <= most else verdict[: most - 1] + "…"


# ---- the picture of speed against accuracy ----


def _chart(document: dict[str, Any], chosen: dict[str, Any] | None) -> dict[str, Any]:
    """Points in milliseconds, percent and nats; what is not measured is not drawn."""
    original = document.get("original") or {}
    truth, floor = get(original, "evaluate", "perplexity"), get(original, "noise_floor")
    own = number(get(floor, "perplexity"))
    drift = 0.0 if own is None or not number(truth) else own / truth - 1
    points = [_point("original", "original", original.get("bench"), drift, None, get(floor, "kl") or 0.0, None)]
    for c in document.get("candidates") or []:
        e = c.get("evaluate")
        kind = "chosen" if c is chosen else "ok" if c.get("verdict") == "ok" else "out"
        increase, error = (get(e, k) for k in ("perplexity_increase", "perplexity_increase_stderr"))
        kl = get(e, "kl")
        points.append(
            _point(text(c.get("name")), kind, c.get("bench"), increase, error, get(kl, "mean"), get(kl, "stderr"))
        )
    limit = number(get(document, "limits", "max_ppl_increase"))
    pareto = set(document.get("pareto") or [])
    drawn = [p | {"pareto": p["name"] in pareto} for p in points if p]
    return {"limit": None if limit is None else 100 * limit, "points": drawn}


def _point(
    name: str, kind: str, bench: Any, increase: Any, increase_error: Any, kl: Any, kl_error: Any
) -> dict[str, Any] | None:
    x, ppl, nats = (number(v) for v in (get(bench, "tpot_s", "median"), increase, kl))
    if x is None or (ppl is None and nats is None):
        return None
    weights = number(get(bench, "weight_bytes"))
    spread = interval95(ppl, increase_error, _signed)
    return {
        "name": name,
        "kind": kind,
        "x": 1e3 * x,
        "bytes": weights,
        "ppl": None if ppl is None else 100 * ppl,
        "ppl_error": 100 * _Z95 * (number(increase_error) or 0.0),
        "kl": nats,
        "kl_error": _Z95 * (number(kl_error) or 0.0),
        "words": [
            ["time per token", milliseconds(x)],
            ["perplexity", _signed(ppl) + (f" ({spread})" if spread else "")],
            ["KL divergence", digits(nats)],
            ["weights", size(weights)],
        ],
    }


def _chart_words(chart: dict[str, Any]) -> str:
    """The picture in a sentence, for who does not see it."""
    said = "; ".join(f"{p['name']}: " + ", ".join(f"{k} {v}" for k, v in p["words"]) for p in chart["points"])
    return f"Time per token against what accuracy was lost. {said}."


# ---- the layers ----

_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")


def _heatmap(c: dict[str, Any], chosen: bool) -> dict[str, Any] | None:
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


# ---- the samples ----


def _sample(sample: dict[str, Any], order: Sequence[Any]) -> dict[str, Any]:
    outputs = sample.get("outputs") or {}
    reference = outputs.get("original")
    names = [n for n in ["original", *order] if n in outputs]
    names += [n for n in outputs if n not in names]
    return {
        "prompt": text(sample.get("prompt")),
        "outputs": [{"name": n} | _difference(reference if n != "original" else None, outputs[n]) for n in names],
    }


def _difference(reference: str | None, own: str | None) -> dict[str, Any]:
    """The text as same + mark + rest, where mark is the word in which it first differs from the reference."""
    own = own or ""
    if reference is None:
        return {"same": "", "mark": "", "rest": own, "note": None}
    if own == reference:
        return {"same": own, "mark": "", "rest": "", "note": "identical to the original"}
    at = next(
        (i for i, (a, b) in enumerate(zip(reference, own, strict=False)) if a != b), min(len(reference), len(own))
    )
    if at == len(own):
        return {"same": own, "mark": "∎", "rest": "", "note": f"ends after {at} equal characters"}
    start = at
    while start > 0 and own[start - 1].isalnum() and own[at].isalnum():
        start -= 1
    end = at + 1
    while end < len(own) and own[end].isalnum() and own[at].isalnum():
        end += 1
    return {"same": own[:start], "mark": own[start:end], "rest": own[end:], "note": f"differs after {at} characters"}


# ---- how it was measured, and what to type ----


def _facts(document: dict[str, Any], original: dict[str, Any], chosen: dict[str, Any] | None) -> list[tuple[str, str]]:
    e, bench = document.get("environment") or {}, get(chosen, "bench") or original.get("bench")
    scenario = get(bench, "scenario") or {}
    split = document.get("split") or {}
    machine = [
        text(e["cpu"]) if e.get("cpu") else "",
        f"{e['cores']} cores, {e.get('threads') or '?'} threads used" if e.get("cores") else "",
        text(e["instruction_set"]) if e.get("instruction_set") else "",
        f"GPU {e['gpu']}" if e.get("gpu") else "no GPU" if e else "",
    ]
    versions = e | {"lowbit": document.get("lowbit_version")}
    software = [f"{label} {versions[k]}".strip() for k, label in _SOFTWARE if versions.get(k)]
    shape = [f"{words} {scenario[k]}" for k, words in _SCENARIO if scenario.get(k) is not None]
    parts = [
        f"{digits(split[f'{part}_tokens'], 1)} tokens {words}" for part, words in _PARTS if split.get(f"{part}_tokens")
    ]
    peak = number(document.get("peak_bandwidth_bytes_per_s"))
    before, after = get(original, "evaluate", "runtime"), get(chosen, "evaluate", "runtime")
    facts = [
        ("Machine", ", ".join(m for m in machine if m)),
        ("Memory bandwidth", "" if peak is None else f"{digits(peak / 1e9)} GB/s, measured by a read test"),
        ("Software", ", ".join(software)),
        ("Runtime", "; ".join(f"{k}: {v}" for k, v in (("reference", before), ("candidate", after)) if v)),
        ("Speed", ", ".join(shape)),
        ("Text", f"{text(document.get('text'))}" + (f": {', '.join(parts)}" if parts else "")),
        ("Seed", text(document.get("seed"))),
    ]
    return [(k, v) for k, v in facts if v and v != NONE]


_SOFTWARE = (
    ("lowbit", "lowbit"), ("python", "Python"), ("torch", "torch"), ("transformers", "transformers"), ("platform", ""),
)  # fmt: skip
_SCENARIO = (("prompt_length", "prompt tokens"), ("output_length", "generated tokens"), ("batch_size", "batch size"))
_PARTS = (("calibration", "to calibrate"), ("selection", "to choose"), ("confirmation", "for the figures shown here"))


def _floor(original: dict[str, Any]) -> str | None:
    floor = original.get("noise_floor") or {}
    kl, same = number(floor.get("kl")), number(floor.get("top1_agreement"))
    if kl is None and same is None:
        return None
    through = f" ({floor['runtime']})" if floor.get("runtime") else ""
    return (
        f"The original weights through the runtime that is timed{through}, against float32: KL {digits(kl)}, "
        f"same top token {percent(same, decimals=2)}. A difference of this size is arithmetic, not quantization."
    )


def _reproduce(document: dict[str, Any]) -> str:
    limits = document.get("limits") or {}
    words = ["lowbit", "tune", str(document.get("model") or "MODEL")]
    increase, memory = number(limits.get("max_ppl_increase")), number(limits.get("max_memory"))
    words += ["--text", str(document["text"])] if document.get("text") else []
    words += ["--max-ppl-increase", f"{100 * increase:.10g}%"] if increase is not None else []
    words += ["--max-memory", str(int(memory))] if memory is not None else []
    words += ["--optimize", str(limits["optimize"])] if limits.get("optimize") else []
    words += ["--seed", str(document["seed"])] if document.get("seed") is not None else []
    words += ["-o", str(document.get("output") or "OUT")]
    return shlex.join(words)


def _deploy(document: dict[str, Any], chosen: dict[str, Any] | None) -> dict[str, str] | None:
    if chosen is None or not chosen.get("path"):
        return None
    path, model = str(chosen["path"]), str(document.get("model") or "MODEL")
    return {
        "serve": shlex.join(["vllm", "serve", path]),
        "bench": shlex.join(["lowbit", "bench", path, "--against", model]),
    }
