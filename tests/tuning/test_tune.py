"""tune: nothing leaks between the parts of the text, decisions follow from the numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import InputError, LowbitError
from lowbit.tuning import summary, tune
from lowbit.tuning.candidates import Candidate
from lowbit.tuning.decide import pareto, recommend, verdict
from lowbit.tuning.isolate import JobError, JobLimits, run_job
from lowbit.tuning.limits import Limits
from lowbit.tuning.split import split_documents
from lowbit.tuning.worker import answer


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=5, max_size=40), st.integers(0, 99))
def test_split_deals_out_every_document_once(documents: list[str], seed: int) -> None:
    split = split_documents(documents, seed)
    assert sorted(d for part in split.values() for d in part) == sorted(documents)
    assert split == split_documents(documents, seed)


def test_a_single_text_is_cut_at_line_ends_into_fifths() -> None:
    text = "".join(f"line {i}\n" for i in range(1000))
    split = split_documents([text], 0)
    assert [len(split[k]) for k in ("calibration", "selection", "confirmation")] == [3, 1, 1]
    pieces = [p for part in split.values() for p in part]
    assert sum(map(len, pieces)) == len(text)
    assert all(p.startswith("line") and p.endswith("\n") for p in pieces)


def candidate(name: str, tpot: float, increase: float, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "error": None,
        "selection": {"perplexity_increase": increase, "kl": {"mean": increase}},
        "evaluate": {
            "perplexity_increase": increase, "perplexity_increase_stderr": 0.0001, "kl": {"mean": increase, "stderr": 0}
        },
        "quantize": {"bits_per_weight": 4.125},
        "bench": {"tpot_s": {"median": 0.01 / tpot}, "ttft_s": {"median": 0.1}, "peak_memory_bytes": 10**8,
                  "weight_bytes": 10**7},
        "ratio": {"tpot": tpot, "ttft": 1.0, "throughput": tpot, "memory": 1.0,
                  "intervals": {"tpot": {"low": tpot * 0.99, "high": tpot * 1.01, "confidence": 0.95}}},
    } | more  # fmt: skip


LIMITS = Limits()


def decide(*candidates: dict[str, Any], limits: Limits = LIMITS, original: Any = None) -> dict[str, Any]:
    for c in candidates:
        c["verdict"] = verdict(c, limits)
    return recommend(candidates, limits, original)


def test_fastest_within_the_limit_wins() -> None:
    answer = decide(candidate("good", 2.0, 0.005), candidate("fast", 3.0, 0.02), candidate("slow", 1.5, 0.001))
    assert answer["name"] == "good"


def test_among_equally_fast_ones_the_most_accurate_wins() -> None:
    answer = decide(candidate("a", 2.02, 0.005), candidate("b", 2.0, 0.001))
    assert answer["name"] == "b"
    assert (
        answer["reasons"][0] == "2.00x faster per token than the original, within 3% of a, and closer to the original"
    )


def test_do_not_quantize_when_nothing_is_faster() -> None:
    answer = decide(candidate("a", 0.9, 0.001), candidate("b", 1.01, 0.001))
    assert answer["name"] == "original"
    assert any("no gain: 0.90x" in r for r in answer["reasons"])


def test_a_gain_inside_the_noise_is_no_gain() -> None:
    noisy = candidate("a", 1.2, 0.001)
    noisy["ratio"]["intervals"]["tpot"] |= {"low": 0.8, "high": 1.6}
    assert "not outside the noise: 1.20x faster per token, 95% interval 0.80x to 1.60x" in verdict(noisy, LIMITS)


def test_too_few_runs_call_no_winner() -> None:
    hasty = candidate("a", 5.0, 0.001)
    hasty["ratio"]["intervals"]["tpot"]["confidence"] = 0.75
    assert "not outside the noise: 5.00x faster per token, 75% interval" in verdict(hasty, LIMITS)


def test_selection_and_confirmation_must_both_hold() -> None:
    c = candidate("a", 2.0, 0.005)
    c["selection"]["perplexity_increase"] = 0.02
    assert verdict(c, LIMITS) == "too inaccurate: perplexity +2.00% on the selection text, limit +1.00%"


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"max_memory": 10**7}, "too large: peak memory 100 MB, limit 10 MB"),
        ({"max_kl": 0.0001}, "too inaccurate: KL 0.00100, limit 0.00010"),
        ({"max_ttft": 0.05}, "too slow: first token 100.0 ms, limit 50.0 ms"),
        ({"max_tpot": 0.001}, "too slow: per token 5.00 ms, limit 1.00 ms"),
    ],
)
def test_each_limit_is_held_and_said(limits: dict[str, Any], words: str) -> None:
    assert verdict(candidate("a", 2.0, 0.001), Limits(**limits)) == words
    assert verdict(candidate("a", 2.0, 0.001), Limits(**dict.fromkeys(limits, 10**10))) == "ok"


def test_failed_candidates_are_said() -> None:
    failed = {"name": "x", "error": "out of memory"}
    assert decide(failed, candidate("good", 2.0, 0.005))["name"] == "good"
    assert failed["verdict"] == "failed: out of memory"


def test_a_limit_that_nothing_reaches_is_named_with_the_closest() -> None:
    answer = decide(candidate("a", 2.0, 0.005), candidate("b", 4.0, 0.008), limits=Limits(max_tpot=0.001))
    said = " ".join(answer["reasons"])
    assert "--max-tpot cannot be reached; the closest is b (too slow: per token 2.50 ms, limit 1.00 ms)" in said
    assert "--max-ppl-increase" not in said


def test_limits_that_contradict_each_other_are_said_to() -> None:
    """a is accurate enough, b is fast enough, neither is both."""
    limits = Limits(max_ppl_increase=0.006, max_tpot=0.004)
    answer = decide(candidate("a", 2.0, 0.005), candidate("b", 4.0, 0.012), limits=limits)
    said = " ".join(answer["reasons"])
    assert "--max-tpot and --max-ppl-increase are each met, but never together" in said
    assert "closest to all limits: a (too slow: per token 5.00 ms, limit 4.00 ms)" in said  # 1.25 x against 2 x


def test_the_original_is_no_answer_if_it_breaks_a_limit_too() -> None:
    bench = {"bench": {"tpot_s": {"median": 0.01}, "ttft_s": {"median": 0.1}, "peak_memory_bytes": 10**9}}
    small, big = Limits(max_memory=10**7), Limits(max_memory=10**10, max_ppl_increase=1e-6)
    assert decide(candidate("a", 2.0, 0.005), limits=small, original=bench)["name"] is None
    assert decide(candidate("a", 2.0, 0.005), limits=big, original=bench)["name"] == "original"


def test_pareto_is_what_nothing_dominates() -> None:
    assert pareto([candidate("a", 2.0, 0.005), candidate("b", 1.0, 0.001), candidate("c", 0.9, 0.004)]) == ["a", "b"]


@pytest.mark.model
def test_tune_end_to_end(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates that fail are listed, the rest goes on; a second run with --resume computes nothing again."""
    text = tmp_path / "text.txt"
    text.write_text((Path(__file__).parents[2] / "src/lowbit/demo/evaluation.txt").read_text()[:40_000])
    monkeypatch.setattr("lowbit.tuning.prepare.SEQ_LEN", 64)
    monkeypatch.setattr("lowbit.tuning.run.bench", lambda *a, **k: fake_bench(*a, **k))
    monkeypatch.setattr("lowbit.tuning.run.run_job", in_this_process)  # the real one has tests of its own
    out = tmp_path / "out"
    first = [Candidate("rtn", "w8a8"), Candidate("gptq", "w4a16"), Candidate("gptq", "w4a16-g32")]
    document = tune(tiny, out, text, candidates=first, repeats=1, max_ppl_increase=10)
    by_name = {c["name"]: c for c in document["candidates"]}
    assert "does not divide" in by_name["w4a16-gptq"]["error"]
    assert by_name["w8a8-rtn"]["evaluate"]["kl"]["mean"] < by_name["w4a16-g32-gptq"]["evaluate"]["kl"]["mean"]
    assert json.loads((out / "tune.json").read_text())["recommendation"] == document["recommendation"]
    assert (out / "report.html").stat().st_size > 10_000
    assert document["recommendation"]["name"] in summary(document) or "do not quantize" in summary(document)
    parts = [(out / "data" / f"{p}.jsonl").read_text() for p in ("calibration", "selection", "confirmation")]
    assert len(set(parts)) == 3

    jobs: list[str] = []
    monkeypatch.setattr("lowbit.tuning.run.run_job", lambda request, _limits: jobs.append(request["job"]))
    again = tune(tiny, out, text, candidates=[first[0], first[2]], repeats=1, max_ppl_increase=10, resume=True)
    assert jobs == []
    for c in again["candidates"]:
        assert c["evaluate"] == by_name[c["name"]]["evaluate"]
    cheapest = tune(
        tiny, out, text, candidates=[first[0], first[2]], repeats=1, max_ppl_increase=10, resume=True, optimize="cost",
        concurrency=4,
    )  # fmt: skip
    assert cheapest["original"]["cost_per_million_tokens"] == pytest.approx(0.1 / (3600 * 40 * 0.5) * 1e6)
    assert "2.00x cheaper per token" in cheapest["recommendation"]["reasons"][0]
    assert "tokens/s x 4  US$/M tokens  verdict" in summary(cheapest)
    closest = tune(
        tiny, out, text, candidates=[first[0], first[2]], repeats=1, max_ppl_increase=10, resume=True, optimize="kl"
    )
    assert closest["recommendation"]["name"] == "original"
    assert "do not quantize" in summary(closest)
    with pytest.raises(InputError, match="made with another seed"):
        tune(tiny, out, text, candidates=first, repeats=1, resume=True, seed=1)


@pytest.mark.model
def test_only_what_can_be_the_answer_is_made(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five candidates, the fastest of which keeps the limit: one is made. --exhaustive --resume makes the others."""
    text = tmp_path / "text.txt"
    text.write_text((Path(__file__).parents[2] / "src/lowbit/demo/evaluation.txt").read_text()[:30_000])
    monkeypatch.setattr("lowbit.tuning.prepare.SEQ_LEN", 64)
    monkeypatch.setattr("lowbit.tuning.run.bench", lambda *a, **k: fake_bench(*a, **k))
    monkeypatch.setattr("lowbit.tuning.run.run_job", in_this_process)
    times = {"w3a16-g32": 1.0, "w4a16-g32": 1.4, "w8a8": 2.0, "fp8": 4.0}
    monkeypatch.setattr("lowbit.tuning.expected_seconds", lambda *_: times | {"none": 4.0})
    tried = [Candidate("rtn", s) for s in ("fp8", "w8a8", "w4a16-g32", "w3a16-g32")] + [Candidate("gptq", "w4a16-g32")]
    options: dict[str, Any] = {"candidates": tried, "repeats": 1, "max_ppl_increase": 10}
    document = tune(tiny, tmp_path / "out", text, **options)
    assert [p.name for p in (tmp_path / "out" / "candidates").iterdir()] == ["w3a16-g32-rtn"]
    assert document["recommendation"]["name"] == "w3a16-g32-rtn"
    why = {c["name"]: c["verdict"] for c in document["candidates"] if c["name"] != "w3a16-g32-rtn"}
    assert "no faster than the original" in why["fp8-rtn"]
    assert all("not made: " in w for w in why.values())
    assert why["w8a8-rtn"] in summary(document)
    assert "not made" in (tmp_path / "out" / "report.html").read_text()

    strict = tune(tiny, tmp_path / "strict", text, **options, max_kl=1e-9)
    assert strict["recommendation"]["name"] == "original"
    verdicts = {c["name"]: c["verdict"] for c in strict["candidates"]}
    assert "too inaccurate" in verdicts["w3a16-g32-rtn"]
    assert "--max-kl cannot be reached; the closest is w8a8-rtn" in " ".join(strict["recommendation"]["reasons"])

    everything = tune(tiny, tmp_path / "out", text, **options, resume=True, exhaustive=True)
    assert all(c["verdict"] == "ok" for c in everything["candidates"])


def in_this_process(request: dict[str, Any], _limits: JobLimits) -> Any:
    try:
        return json.loads(json.dumps(answer(request)))
    except LowbitError as error:
        raise JobError(str(error)) from error


@pytest.mark.model
def test_a_candidate_is_made_in_a_process_of_its_own(tiny: Path, tmp_path: Path) -> None:
    request = {
        "job": "quantize", "model": str(tiny), "output": str(tmp_path / "q"), "resume": False, "verbosity": 0,
        "words": {"scheme": "w4a16-g32", "method": "rtn"},
    }  # fmt: skip
    assert run_job(request, JobLimits())["bits_per_weight"] == pytest.approx(4.5)
    assert (tmp_path / "q" / "lowbit.json").exists()
    with pytest.raises(JobError, match="does not divide"):
        run_job(request | {"output": str(tmp_path / "r"), "words": {"scheme": "w4a16", "method": "rtn"}}, JobLimits())


def fake_bench(
    models: list[str], *, against: str | None = None, batch_sizes: tuple[int, ...] = (1,), **_words: Any
) -> dict[str, Any]:
    """Timings are of no interest here; whatever is quantized is twice as fast."""
    bench = candidate("x", 1.0, 0.0)["bench"] | {"mbu": 0.5}
    names = [str(against), *models]
    return {
        "peak_bandwidth_bytes_per_s": 1e10,
        "results": [
            bench | {"model": n, "scenario": {}, "throughput_tokens_per_s": 10.0 * b * (1 + (n != str(against)))}
            for b in batch_sizes
            for n in names
        ],
        "ratios": [candidate("x", 2.0, 0.0)["ratio"] | {"model": n} for _ in batch_sizes for n in models],
        "grid": [],
    }


def test_bad_input(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Known: tpot, ttft, throughput, memory"):
        tune(tiny, tmp_path / "o", text_file, optimize="speed")
    with pytest.raises(InputError, match="your own text"):
        tune(tiny, tmp_path / "o")
    short = tmp_path / "short.txt"
    for repeats in (5, 30):  # not even fifths; fifths, but less than two windows each
        short.write_text("import os\n" * repeats)
        with pytest.raises(InputError, match="too short to split"):
            tune(tiny, tmp_path / "o", short, force=True)
