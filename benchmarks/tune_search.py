"""Does `lowbit tune` find what trying everything finds, and in what share of the time?

Both run on the same candidates with a 1 % limit on perplexity: `exhaustive` makes every candidate, evaluates it on all
windows and times it; `tune` as it is by default. The speed of what each recommends is compared by the exhaustive run's
own measurements, so that both figures come from one series of turns.

    python benchmarks/tune_search.py [--model demo] [--text FILE] [--limit 0.01]
"""

import argparse
import json
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lowbit.environment import environment
from lowbit.tuning import tune
from lowbit.tuning.candidates import FULL, Candidate

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "tune_search.json"
MOST_SLOWER, MOST_TIME = 1.05, 0.25


def run(model: str, text: str | None, output: Path, limit: float, *, exhaustive: bool) -> tuple[dict[str, Any], float]:
    """(the document, seconds)"""
    candidates = [Candidate(method, scheme) for method, scheme in FULL]
    start = time.monotonic()
    document = tune(
        model, output, text, candidates=candidates, exhaustive=exhaustive, max_ppl_increase=limit, optimize="tpot"
    )
    return document, time.monotonic() - start


def rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    """What there is to say of each candidate."""
    return [
        {
            "name": c["name"],
            "verdict": c["verdict"],
            "tpot_s": c["bench"]["tpot_s"]["median"] if c.get("bench") else None,
            "perplexity_increase": c["evaluate"]["perplexity_increase"] if c.get("evaluate") else None,
        }
        for c in document["candidates"]
    ]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="demo")
    p.add_argument("--text")
    p.add_argument("--limit", type=float, default=0.01)
    p.add_argument("--json", default=str(RESULTS))
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as place:
        searched, search_seconds = run(a.model, a.text, Path(place) / "search", a.limit, exhaustive=False)
        everything, all_seconds = run(a.model, a.text, Path(place) / "all", a.limit, exhaustive=True)
    measured = {c["name"]: c["bench"]["tpot_s"]["median"] for c in everything["candidates"] if c.get("bench")}
    measured["original"] = everything["original"]["bench"]["tpot_s"]["median"]
    fastest = min(
        (c["name"] for c in everything["candidates"] if c["verdict"] == "ok"),
        key=measured.__getitem__,
        default="original",
    )
    found = searched["recommendation"]["name"]
    slower = measured[found] / measured[fastest] if found in measured else None
    share = search_seconds / all_seconds
    kept = slower is not None and slower <= MOST_SLOWER and share <= MOST_TIME
    result = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "model": a.model,
        "limit": a.limit,
        "found": found,
        "fastest": fastest,
        "tpot_of_found_over_fastest": slower,
        "seconds": {"search": search_seconds, "exhaustive": all_seconds},
        "share_of_time": share,
        "kept": kept,
        "search": rows(searched),
        "exhaustive": rows(everything),
    }
    Path(a.json).write_text(json.dumps(result, indent=1) + "\n")
    for name, document in (("search", searched), ("exhaustive", everything)):
        print(f"{name}:")
        for r in rows(document):
            tpot = "" if r["tpot_s"] is None else f"{r['tpot_s'] * 1e3:.3f} ms"
            print(f"  {r['name']:28} {tpot:>10}  {r['verdict']}")
    print(f"found {found}, fastest {fastest}: {slower} x its time per token (limit {MOST_SLOWER})")
    print(f"{search_seconds:.0f} s against {all_seconds:.0f} s: {share:.0%} (limit {MOST_TIME:.0%})")
    print("kept" if kept else "NOT kept")


if __name__ == "__main__":
    main()
