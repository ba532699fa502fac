"""The `tune` document, told in words: what the template prints and what the picture draws.

Every figure may be missing (a candidate that crashed, an older document): `get` walks to it or gives None, and the
formatters print an en dash for None. Times come in seconds and sizes in bytes.
"""

from collections.abc import Sequence
from typing import Any

from lowbit.report.commands import deploy, reproduce
from lowbit.report.figures import chart_of, chart_words, heatmap
from lowbit.report.whatif import whatif_data
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
    times,
)

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
    chart = chart_of(document, chosen)
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
        "chart_words": chart_words(chart),
        "heatmaps": [h for c in first if (h := heatmap(c, c is chosen))],
        "samples": [_sample(s, [c.get("name") for c in first]) for s in document.get("samples") or []],
        "facts": _facts(document, original, chosen),
        "floor": _floor(original),
        "whatif": whatif_data(document),
        "reproduce": reproduce(document),
        "deploy": deploy(document, chosen),
    }


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
        spread, limit = interval95(cost, error, signed), get(document, "limits", "max_ppl_increase")
        words = [f"95\u00a0%: {spread}"] if spread else []
        words += [f"limit {signed(limit)}"] if number(limit) is not None else []
        speed, first = get(chosen, "ratio", "tpot"), get(chosen, "ratio", "ttft")
        tiles = [
            ("Time per token", times(speed, "faster", "slower"), [change("tpot_s", "median", write=milliseconds)]),
            ("Perplexity", signed(cost), words),
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
    spread = interval95(increase, get(e, "perplexity_increase_stderr"), signed)
    low, high = (get(c, "ratio", "intervals", "tpot", end) for end in ("low", "high"))
    speed, error = number(get(c, "ratio", "tpot")), number(get(e, "kl", "stderr"))
    bits, memory = get(c, "quantize", "bits_per_weight"), get(c, "quantize", "peak_memory_bytes")
    bench = _bench_cells(b)
    cells = bench | {
        "Speed": (NONE if speed is None else f"{digits(speed)}×", between(low, high, lambda x: f"{digits(x)}×")),
        "Perplexity": (
            digits(get(e, "perplexity"), 4),
            None if increase is None else signed(increase),
            spread,
        ),
        "KL divergence": (digits(kl), None if error is None else f"± {digits(Z95 * error, 2)}"),
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


# ---- how it was measured ----


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
        ("Speed", ", ".join(shape) + (f", {document['repeats']} counted runs" if document.get("repeats") else "")),
        ("Text", (document.get("text") or "the demo's text") + (f": {', '.join(parts)}" if parts else "")),
        ("Windows", f"{document['windows']} of {document.get('seq_len')} tokens" if document.get("windows") else ""),
        ("Calibration", f"{document['calibration_samples']} windows" if document.get("calibration_samples") else ""),
        ("Expected", _expected(document)),
        ("Measured", text(document.get("created"))),
        ("Seed", text(document.get("seed"))),
    ]
    return [(k, v) for k, v in facts if v and v != NONE]


def _expected(document: dict[str, Any]) -> str:
    """What the rules of thumb put first, with the rules' names, beside which stands what was measured."""
    rows = get(document, "expected", "order") or []
    if not rows:
        return ""
    rules = dict.fromkeys(str(r.get("rule")) for row in rows for r in row.get("reasons") or [])
    order = ", ".join(text(row.get("scheme")) for row in rows)
    return f"before measuring, most promising first: {order} (rules: {', '.join(rules)})"


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
