"""Every limit and objective of tune, on candidates made by hand; and the questions that both models answered."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowbit.accuracy.tasks import compare
from lowbit.errors import InputError
from lowbit.intervals import mcnemar
from lowbit.report.catalog import read_catalog, usd_per_hour
from lowbit.report.cost import Traffic, own_cost, per_million_tokens
from lowbit.tuning import run, tune
from lowbit.tuning.decide import recommend, verdict
from lowbit.tuning.isolate import JobLimits
from lowbit.tuning.limits import MEASURES, Limits, check_limits
from lowbit.tuning.questions import drops, measure_tasks
from lowbit.tuning.run import Job, Notebook, timed
from lowbit.tuning.split import Split

WINDOWS = np.random.default_rng(0).gamma(3.0, size=200)


def row(name: str, kl: float, speed: float, *, lost: int = 0, won: int = 0, memory: float = 100e6) -> dict[str, Any]:
    """A measured candidate: `lost` of 200 questions only the original got right, `won` only this one."""
    own, other = np.ones(200, bool), np.ones(200, bool)
    own[:lost], other[lost : lost + won] = False, False
    samples = [{"doc_hash": str(i), "scores": {"acc": float(right)}} for i, right in enumerate(own)]
    pair = {"task": "quiz", "metric": "acc"} | compare(
        samples, [{**s, "scores": {"acc": float(r)}} for s, r in zip(samples, other, strict=True)], "acc"
    )
    answers = {"quiz": {"metrics": {"acc": {"value": own.mean()}}, "n": 200, "samples": samples}}
    accuracy = {
        "perplexity_increase": kl,
        "perplexity_increase_stderr": 1e-4,
        "kl": {"mean": kl},
        "tasks": answers,
        "per_window": {"kl": (kl / 3 * WINDOWS).tolist(), "nll": (2 + kl / 3 * WINDOWS).tolist()},
    }
    spread = {"low": speed * 0.99, "high": speed * 1.01, "confidence": 0.95}
    intervals = dict.fromkeys(("tpot", "throughput", "cost"), spread)
    return {
        "name": name, "error": None, "selection": accuracy, "evaluate": accuracy, "task_drops": drops([pair], answers),
        "quantize": {"bits_per_weight": 4.125},
        "bench": {"tpot_s": {"median": 0.01 / speed}, "ttft_s": {"median": 0.1}, "peak_memory_bytes": memory,
                  "weight_bytes": 10**7, "throughput_tokens_per_s": 100 * speed},
        "concurrent": {"throughput_tokens_per_s": 400 * speed},
        "cost_per_million_tokens": per_million_tokens(0.1, 400 * speed),
        "ratio": {"tpot": speed, "ttft": 1.0, "throughput": speed, "memory": 100e6 / memory, "cost": speed,
                  "intervals": intervals},
    }  # fmt: skip


ORIGINAL = {"bench": row("original", 0.0, 1.0)["bench"], "concurrent": {"throughput_tokens_per_s": 400.0},
            "cost_per_million_tokens": per_million_tokens(0.1, 400.0)}  # fmt: skip


def decide(*rows: dict[str, Any], **limits: Any) -> dict[str, Any]:
    wanted = Limits(max_ppl_increase=0.1, **limits)
    check_limits(wanted)
    for c in rows:
        c["verdict"] = verdict(c, wanted)
    return recommend(rows, wanted, ORIGINAL)


def test_a_drop_counts_only_outside_the_noise_of_the_paired_test() -> None:
    """8 of 200 lost is a drop of 4 points either way; only where few are won back it is more than chance."""
    sure, chance = row("sure", 0.01, 2.0, lost=8), row("chance", 0.01, 2.0, lost=20, won=12)
    assert sure["task_drops"][0]["drop"] == pytest.approx(chance["task_drops"][0]["drop"]) == 0.04
    assert decide(sure, chance, tasks=("quiz",))["name"] == "chance"
    assert sure["verdict"].startswith(
        "too inaccurate: 4.00 points fewer right answers, outside the noise (quiz acc -4.00"
    )
    assert "0 right only here, 8 only in the original, McNemar p = 0.0078" in sure["verdict"]
    assert mcnemar(np.zeros(8), np.ones(8))["p_value"] == sure["task_drops"][0]["mcnemar"]["p_value"]
    # a limit of one's own is held as it is, and the test stands beside it
    assert decide(sure, chance, tasks=("quiz",), max_task_drop=0.05)["name"] == "sure"
    assert decide(sure, tasks=("quiz",), max_task_drop=0.03)["name"] == "original"
    assert "right answers lost: 4.00 points, limit 3.00 points (quiz" in sure["verdict"]


def test_throughput_and_cost_are_held_at_the_concurrency() -> None:
    slow, fast = row("slow", 0.01, 1.5), row("fast", 0.02, 2.0)
    answer = decide(slow, fast, optimize="throughput", min_throughput=700, concurrency=4)
    assert answer["name"] == "fast"
    assert slow["verdict"] == "too slow: throughput 600.0 tokens/s, limit 700.0 tokens/s"
    assert "800 tokens/s with 4 sequences at once" in answer["reasons"]
    said = " ".join(decide(slow, fast, min_throughput=900)["reasons"])
    assert "--min-throughput cannot be reached; the closest is fast (too slow: throughput 800.0 tokens/s" in said
    assert "the original breaks a limit as well: too slow: throughput 400.0 tokens/s" in said
    cheap = decide(slow, fast, optimize="cost", concurrency=4)
    assert cheap["name"] == "fast"
    assert "2.00x cheaper per token than the original" in cheap["reasons"][0]
    # 0.1 / 3600 / (800 x half the time) x a million
    assert any("US$ 0.06944 per million generated tokens on this machine" in r for r in cheap["reasons"])
    assert decide(slow, max_cost=0.05)["name"] is None
    assert slow["verdict"] == "too dear: a million tokens US$ 0.09259, limit US$ 0.05"


@pytest.mark.parametrize("objective", ["kl", "perplexity", "tasks"])
def test_accuracy_as_the_objective_is_the_closest_that_fits(objective: str) -> None:
    rows = [row("near", 0.001, 1.2, lost=1), row("far", 0.03, 2.0, lost=30), row("large", 0.0001, 1.1, memory=200e6)]
    options: dict[str, Any] = {"optimize": objective, "tasks": ("quiz",), "max_task_drop": 1.0}
    assert decide(*rows, **options)["name"] == "original", "nothing is closer to the original than it is"
    ORIGINAL_MEMORY = 150e6
    answer = recommend_with_memory(rows, options, ORIGINAL_MEMORY, 120e6)
    assert answer["name"] == "near"
    assert "within the limits, 1.20x faster per token" in answer["reasons"][0]
    # what the same windows or questions cannot tell apart is decided by speed
    rows[0]["evaluate"] = rows[0]["selection"] = row("twin", 0.001, 1.2, lost=1)["evaluate"]
    twin = row("twin", 0.001, 1.9, lost=1)
    assert recommend_with_memory([*rows, twin], options, ORIGINAL_MEMORY, 120e6)["name"] == "twin"


def recommend_with_memory(rows: list[dict[str, Any]], options: dict[str, Any], own: float, most: float) -> Any:
    wanted = Limits(max_ppl_increase=0.1, max_memory=int(most), **options)
    for c in rows:
        c["verdict"] = verdict(c, wanted)
    return recommend(rows, wanted, ORIGINAL | {"bench": ORIGINAL["bench"] | {"peak_memory_bytes": own}})


def test_limits_that_exclude_each_other_are_named_with_the_closest() -> None:
    """One has the throughput, the other the answers; none both."""
    answer = decide(row("exact", 0.001, 1.2), row("fast", 0.02, 3.0, lost=40), tasks=("quiz",), max_task_drop=0.01,
                    min_throughput=600)  # fmt: skip
    said = " ".join(answer["reasons"])
    assert "--min-throughput and --max-task-drop are each met, but never together" in said
    assert "closest to all limits: exact (too slow: throughput 480.0 tokens/s, limit 600.0 tokens/s)" in said


def test_words_that_make_no_sense_are_refused_at_once(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    for words, match in (
        ({"optimize": "tasks"}, "--optimize tasks: say which tasks"),
        ({"max_task_drop": 0.1}, "--max-task-drop: say which tasks"),
        ({"concurrency": 0}, "at least 1 sequence"),
        ({"min_throughput": float("nan")}, "--min-throughput nan"),
        ({"hardware": "abacus"}, "--hardware abacus: Known: this machine.* Add yours with --catalog"),
    ):
        with pytest.raises(InputError, match=match):
            tune(tiny, tmp_path / "o", text_file, **words)  # type: ignore[arg-type]
    assert not (tmp_path / "o").exists()


def test_cost_is_that_of_the_what_if_page() -> None:
    price = usd_per_hour(read_catalog(), "this machine")
    traffic = Traffic(prompt=128, output=64, batch=4, requests_per_day=0)
    seconds = 0.2 + 63 * 0.01
    assert per_million_tokens(price, 4 * 64 / seconds) == pytest.approx(
        own_cost(0.2, 0.01, price, traffic)["per_million_output_tokens"]
    )


def test_every_measure_has_a_limit_of_its_name() -> None:
    names = vars(Limits()).keys()
    assert all(m.option.removeprefix("--").replace("-", "_") in names for m in MEASURES.values())


def test_one_sequence_and_many_are_kept_apart() -> None:
    results = [{"model": m, "tokens": t} for t in (1, 8) for m in ("m", "q")]
    ratios = [{"tpot": 2.0, "throughput": 2.0, "intervals": {"tpot": 1, "throughput": 1}, "model": "q"},
              {"tpot": 1.1, "throughput": 1.2, "intervals": {"tpot": 8, "throughput": 8}, "model": "q"}]  # fmt: skip
    found = timed({"results": results, "ratios": ratios}, "q")
    assert (found["bench"]["tokens"], found["concurrent"]["tokens"]) == (1, 8)
    assert (found["ratio"]["tpot"], found["ratio"]["throughput"], found["ratio"]["cost"]) == (2.0, 1.2, 1.2)
    assert found["ratio"]["intervals"] == {"tpot": 1, "throughput": 8, "cost": 8}
    assert timed({"results": results[:2], "ratios": []}, "m") == {"bench": results[0], "concurrent": None}


def test_a_task_without_right_or_wrong_answers_is_refused() -> None:
    with pytest.raises(InputError, match=r"story has no metric of right or wrong answers.*word_perplexity"):
        drops([], {"story": {"metrics": {"word_perplexity": {}}, "n": 3}}, ["story.yaml"])


@pytest.mark.model
def test_questions_are_asked_and_remembered(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of one's own, in a process of its own; a second run asks nothing again."""
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'lowbit[tasks]'")
    from lowbit.pipeline import quantize

    lines = [{"q": f"def f{i}(", "c": ["x):", "!!"], "a": 0} for i in range(12)]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    (tmp_path / "quiz.yaml").write_text(
        "task: quiz\ndataset_path: json\ndataset_kwargs: {data_files: {test: lines.jsonl}}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{c}}"\ndoc_to_target: "{{a}}"\n'
        "metric_list: [{metric: acc}]\n"
    )
    made = quantize(tiny, tmp_path / "q", scheme="w8a16-g32", method="rtn")
    files = Split(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    job = Job(str(tiny), tmp_path, {"seed": 0}, files, 64, JobLimits(), resume=True)
    candidate = {"name": "q", "path": str(tmp_path / "q"), "error": None, "quantize": made, "evaluate": {}}
    notebook = Notebook.open(tmp_path / "progress.json", {})
    wanted = Limits(tasks=(str(tmp_path / "quiz.yaml"),))
    reference = measure_tasks(job, [candidate], wanted, notebook)
    assert reference is not None
    assert reference["quiz"]["n"] == 12
    (drop,) = candidate["task_drops"]  # type: ignore[misc]
    right = candidate["evaluate"]["tasks"]["quiz"]["metrics"]["acc"]["value"]  # type: ignore[index]
    assert drop["drop"] == pytest.approx(reference["quiz"]["metrics"]["acc"]["value"] - right)
    monkeypatch.setattr(run, "run_job", None)
    assert measure_tasks(job, [candidate], wanted, notebook) == reference
