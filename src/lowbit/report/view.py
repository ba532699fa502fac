"""The `tune` document, told in words: what the template prints and what the picture draws.

Every figure may be missing (a candidate that crashed, an older document): `get` walks to it or gives None, and the
formatters print an en dash for None. Times come in seconds and sizes in bytes.
"""

from collections.abc import Sequence
from typing import Any

from lowbit.report.commands import deploy, reproduce
from lowbit.report.figures import chart_of, chart_words, heatmap, ruled_out
from lowbit.report.table import columns, rows
from lowbit.report.whatif import whatif_data
from lowbit.report.words import (
    NONE,
    digits,
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
    "cost": ("cost", "cheaper per token", "dearer per token"),
}
_ACCURACY = ("perplexity", "kl", "tasks")  # what the original has most of


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
        "columns": columns(document),
        "rows": rows(document, chosen),
        "chart": chart,
        "chart_words": chart_words(chart),
        "ruled_out": ruled_out(chart),
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
        if get(document, "limits", "optimize") in _ACCURACY:
            return "Do not quantize: the original keeps all limits itself."
        within = "" if limit is None else f" within a perplexity increase of {percent(limit)}"
        return f"Do not quantize: nothing measured here is {more}{within}."
    gain, cost = get(chosen, "ratio", key), get(chosen, "evaluate", "perplexity_increase")
    closest = get(document, "limits", "optimize") in _ACCURACY
    parts = ["the closest to the original within the limits"] if closest else []
    parts += [] if number(gain) is None else [times(gain, more, less)]
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
