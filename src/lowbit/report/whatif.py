"""The data behind the interactive section: every measured model's roofline, accuracy and memory, and the prices."""

from collections.abc import Sequence
from typing import Any

from lowbit.report.roofline import fit
from lowbit.report.words import get, number

DEFAULTS = {"batch": 1, "prompt": 512, "output": 128, "requests_per_day": 10_000, "utilization": 0.5}


def whatif_data(document: dict[str, Any]) -> dict[str, Any] | None:
    """What whatif.js needs, or None where the document has no grid of scenarios to fit a roofline to."""
    grid = document.get("grid") or []
    if not grid or not document.get("catalog"):
        return None
    original = document.get("original") or {}
    models = [
        _model("original", original.get("name"), grid, original.get("bench"), 0.0, get(original, "noise_floor", "kl"))
    ]
    for c in document.get("candidates") or []:
        e = c.get("evaluate")
        ppl, kl = get(e, "perplexity_increase"), get(e, "kl", "mean")
        models.append(_model(str(c.get("name")), c.get("path"), grid, c.get("bench"), ppl, kl))
    fitted = [m for m in models if m]
    if not fitted:
        return None
    chosen = get(document, "recommendation", "name")
    start = chosen if any(m["name"] == chosen for m in fitted) else fitted[0]["name"]
    return {
        "models": fitted,
        "catalog": document["catalog"],
        "bandwidth": number(document.get("peak_bandwidth_bytes_per_s")),
        "defaults": DEFAULTS | {"model": start, "compare": fitted[0]["name"]},
    }


def _model(
    name: str, path: Any, grid: Sequence[dict[str, Any]], bench: Any, ppl: Any, kl: Any
) -> dict[str, Any] | None:
    own = [r for r in grid if r.get("model") == str(path)]
    if len(own) < 3 or not isinstance(bench, dict):
        return None
    held_out = [bench] if bench.get("scenario") else []
    roofline = fit(own, held_out, float(own[0].get("kv_bytes_per_context_token") or 0.0))
    return {
        "name": name,
        "roofline": roofline.to_dict(),
        "weight_bytes": number(bench.get("weight_bytes")),
        "peak_memory_bytes": number(bench.get("peak_memory_bytes")),
        "measured_kv_bytes": _kv_held(bench, roofline.kv_bytes_per_token),
        "perplexity_increase": number(ppl),
        "kl": number(kl),
    }


def _kv_held(bench: dict[str, Any], per_token: float) -> float:
    """Bytes of cache that the measured peak memory already holds."""
    s = bench.get("scenario") or {}
    tokens = (number(s.get("prompt_length")) or 0.0) + (number(s.get("output_length")) or 0.0)
    return per_token * tokens * (number(s.get("batch_size")) or 0.0)
