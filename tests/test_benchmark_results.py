"""Benchmark scripts: interrupted runs go on where they were, and what they conclude follows from their numbers."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from test_benchmarks import script

SETTINGS = {"repeats": 2, "shape": (1, 2)}


def test_an_interrupted_run_goes_on_and_another_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial, file = script("partial", monkeypatch), tmp_path / "r.json"
    assert partial.known(file, SETTINGS) == {}
    partial.save(file, SETTINGS, {"rows": [1]}, finished=False)
    assert partial.known(file, SETTINGS)["rows"] == [1]
    assert partial.known(file, SETTINGS | {"repeats": 3}) == {}, "other settings"
    monkeypatch.setattr(partial, "commit", lambda: "another")
    assert partial.known(file, SETTINGS) == {}, "times of two commits are not one table"
    assert partial.known(file, SETTINGS, any_commit=True)["rows"] == [1]
    partial.save(file, SETTINGS, {"rows": [1, 2]}, finished=True)
    assert partial.known(file, SETTINGS) == {}, "a finished run is measured anew"
    assert {"environment", "commit", "created"} <= json.loads(file.read_text()).keys()


def half(name: str | None, seconds: float, **times: float | None) -> dict[str, Any]:
    rows = [{"name": n, "tpot_s": t, "verdict": "too inaccurate" if n == "bad" else "ok"} for n, t in times.items()]
    took = dict.fromkeys(("seconds", "processor_seconds"), seconds)
    return {**took, "recommendation": {"name": name}, "original": 3.0, "rows": rows}


def test_the_search_is_held_to_the_exhaustive_runs_times(monkeypatch: pytest.MonkeyPatch) -> None:
    compare = script("tune_search", monkeypatch).compare
    everything = half("a", 100.0, a=1.0, b=1.04, c=1.2, bad=0.5, gone=None)
    del everything["rows"][-1]["verdict"]
    everything["rows"][-1]["verdict"] = "failed: killed"
    found = compare(half("b", 20.0), everything)
    assert (found["fastest"], found["tpot_of_found_over_fastest"], found["share_of_time"]) == ("a", 1.04, 0.2)
    assert found["kept"]
    assert not compare(half("c", 20.0), everything)["kept"], "20 % slower"
    assert not compare(half("b", 30.0), everything)["kept"], "took too long"
    assert not compare(half(None, 20.0), everything)["kept"], "found nothing"
    assert compare(half("original", 20.0), half("original", 100.0, bad=0.5))["kept"]


def test_mixed_precision_is_compared_window_by_window(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = script("mixed_precision", monkeypatch).compared
    hard = np.random.default_rng(0).gamma(1.0, size=64)  # windows differ by far more than schemes do
    rows = [{"scheme": s, "kl_per_window": (f * hard).tolist()} for s, f in (("auto", 1.0), ("g32", 1.2), ("g64", 0.9))]
    worse, better = compared(rows)
    assert worse["times"] == pytest.approx(1.2)
    assert worse["difference"]["low"] > 0
    assert better["difference"]["high"] < 0


def test_equal_tokens_end_at_the_first_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    ablation = script("ablation", monkeypatch)
    runs: dict[str, Any] = {c.name: [] for c in ablation.CASES}
    runs[ablation.NOTHING.name] = [{"answers": [[1, 2, 3, 4], [5, 6, 7, 8]]}]
    assert ablation.equal_tokens(ablation.NOTHING, [[1, 2, 3, 4], [5, 6, 7, 8]], runs) == 1
    assert ablation.equal_tokens(ablation.NOTHING, [[1, 9, 3, 4], [5, 6, 7, 8]], runs) == pytest.approx(5 / 6)


def test_only_finished_results_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables, partial = script("docs_tables", monkeypatch), script("partial", monkeypatch)
    docs = tmp_path / "page.md"
    docs.write_text("".join(f"<!-- {n}: begin -->\nnothing yet\n<!-- {n}: end -->\n" for n in ("ablation", "search")))
    row = {"name": "all of it", "seconds": 1.25, "tokens_per_s": 102.4, "speedup": 7.5, "tokens_computed": 96,
           "equal_tokens": 1.0}  # fmt: skip
    workload = {"requests": 8, "shared": 64, "own": 8, "answer": 16}
    partial.save(tmp_path / "ablation.json", {}, {"rows": [row], "workload": workload}, finished=True)
    partial.save(tmp_path / "tune_search.json", {}, {"measured": {}}, finished=False)
    monkeypatch.setattr(sys, "argv", ["docs_tables", "--results", str(tmp_path), "--docs", str(docs)])
    tables.main()
    text = docs.read_text()
    assert "| all of it | 1.25 | 102 | 7.50x | 96 | 100% |" in text
    assert text.count("nothing yet") == 1
