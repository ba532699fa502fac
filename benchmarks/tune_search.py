"""Does `lowbit tune` find what trying everything finds, and in what share of the time?

Both run on the same candidates with a 1 % limit on perplexity: `exhaustive` makes every candidate, evaluates it on all
windows and times it; `tune` as it is by default. The speed of what each recommends is compared by the exhaustive run's
own measurements, so that both figures come from one series of turns.

Each of the two is written when it is done, and is not done again. The search is timed in one piece; `--only search`
stops after it. The exhaustive run, given a `--work` directory, goes on after an interruption with the candidates that
it has made, and what its pieces took is added up; `--only making` ends before the speed of all is measured, which needs
the machine to itself. Its share of time is by the clock; processor time of all processes stands beside it, because
pieces may have met other work. On two cores the search takes a minute or two and the exhaustive run ten (without
AVX-512, six and forty).

    python benchmarks/tune_search.py [--model demo] [--text FILE] [--limit 0.01] [--work DIRECTORY] [--output FILE]
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from partial import RESULTS, commit, known, save

from lowbit.tuning import tune
from lowbit.tuning.candidates import FULL, Candidate

MOST_SLOWER, MOST_TIME = 1.05, 0.25


def run(a: argparse.Namespace, place: Path, *, exhaustive: bool) -> dict[str, Any]:
    """{seconds, processor_seconds, commit, recommendation, original, rows} of one of the two, made under `place`."""
    candidates = [Candidate(*pair.split(":", 1)) for pair in a.candidates.split(",")]
    clock = place / "seconds.json"
    before = json.loads(clock.read_text()) if clock.exists() else [0.0, 0.0]
    start = time.monotonic(), processor_seconds()
    place.mkdir(parents=True, exist_ok=True)
    try:
        document = tune(
            a.model, place / "out", a.text, candidates=candidates, exhaustive=exhaustive, repeats=a.repeats,
            resume=(place / "out").exists(), max_ppl_increase=a.limit, optimize="tpot",
        )  # fmt: skip
    finally:
        spent = before[0] + time.monotonic() - start[0], before[1] + processor_seconds() - start[1]
        clock.write_text(json.dumps(spent))
    return {
        "seconds": spent[0],
        "processor_seconds": spent[1],
        "commit": commit(),
        "recommendation": document["recommendation"],
        "original": document["original"]["bench"]["tpot_s"]["median"],
        "rows": rows(document),
    }


class Paused(Exception):
    """Everything is made and its accuracy measured."""


def pause(*_: Any) -> None:
    raise Paused


def processor_seconds() -> float:
    """Of this process and of all that it has waited for."""
    return sum(os.times()[:4])


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


def compare(search: dict[str, Any], everything: dict[str, Any]) -> dict[str, Any]:
    """What the search found against the fastest of all that keep the limit, by the exhaustive run's times."""
    times = {r["name"]: r["tpot_s"] for r in everything["rows"] if r["tpot_s"]} | {"original": everything["original"]}
    good = [r["name"] for r in everything["rows"] if r["verdict"] == "ok"]
    fastest, found = min(good, key=times.__getitem__, default="original"), search["recommendation"]["name"]
    slower = times[found] / times[fastest] if found in times else None
    share, busy = (search[k] / everything[k] for k in ("seconds", "processor_seconds"))
    return {
        "found": found,
        "fastest": fastest,
        "tpot_of_found_over_fastest": slower,
        **{k: {"search": search[k], "exhaustive": everything[k]} for k in ("seconds", "processor_seconds")},
        "share_of_time": share,
        "share_of_processor_time": busy,
        "kept": slower is not None and slower <= MOST_SLOWER and share <= MOST_TIME,
        "search": search["rows"],
        "exhaustive": everything["rows"],
    }


def show(name: str, found: dict[str, Any]) -> None:
    print(f"{name}: {found['seconds']:.0f} s, recommends {found['recommendation']['name']}")
    for r in found["rows"]:
        tpot = "" if r["tpot_s"] is None else f"{r['tpot_s'] * 1e3:.3f} ms"
        print(f"  {r['name']:28} {tpot:>10}  {r['verdict']}", flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="demo")
    p.add_argument("--text")
    p.add_argument("--limit", type=float, default=0.01)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--candidates", metavar="METHOD:SCHEME,...", default=",".join(f"{m}:{s}" for m, s in FULL))
    p.add_argument("--output", "--json", dest="file", type=Path, default=RESULTS / "tune_search.json")
    p.add_argument("--only", choices=("search", "making"), help="leave the rest to the next call")
    p.add_argument("--any-commit", action="store_true", help="go on with what another commit has measured")
    p.add_argument("--work", type=Path, help="where candidates are kept for the next piece (default: nowhere)")
    a = p.parse_args()
    settings = {k: v for k, v in vars(a).items() if k not in ("file", "only", "any_commit", "work")}
    done: dict[str, Any] = known(a.file, settings, any_commit=a.any_commit).get("measured", {})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the seconds so far are written, as after Ctrl-C
    for name in ("search",) if a.only == "search" else ("search", "everything"):
        if name not in done:
            place = a.work / name if a.work else Path(tempfile.mkdtemp())
            try:
                if a.only == "making" and name == "everything":
                    with patch("lowbit.tuning.measure_speed", pause):
                        run(a, place, exhaustive=True)
                done[name] = run(a, place, exhaustive=name == "everything")
            except Paused:
                return
            finally:
                if not a.work or name in done:
                    shutil.rmtree(place)
            save(a.file, settings, {"measured": done}, finished=False)
        show(name, done[name])
    if a.only == "search":
        return
    c = compare(done["search"], done["everything"])
    save(a.file, settings, c, finished=True)
    print(f"found {c['found']}, fastest {c['fastest']}: {c['tpot_of_found_over_fastest']} x its time per token "
          f"(limit {MOST_SLOWER}), in {c['share_of_time']:.0%} of the time (limit {MOST_TIME:.0%}): "
          f"{'kept' if c['kept'] else 'NOT kept'}")  # fmt: skip


if __name__ == "__main__":
    main()
