"""The long part of tune, without models: jobs are answered by a table of accuracies."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowbit.errors import InputError, LowbitError
from lowbit.tuning import run
from lowbit.tuning.candidates import Candidate
from lowbit.tuning.decide import measured
from lowbit.tuning.isolate import JobError, JobLimits
from lowbit.tuning.limits import Limits
from lowbit.tuning.run import Job, Notebook, measure_accuracy, measure_speed, narrow, quantize_all
from lowbit.tuning.split import Split

KL = {"w8a8": 1e-4, "w4a16": 3e-3, "w4a16-g32": 2e-3, "w3a16": 1e-2, "w3a16-g32": 8e-3, "w2a16": 0.5, "fp8": 4e-4}
BITS = {"w8a8": 8.0, "w4a16": 4.1, "w4a16-g32": 4.5, "w3a16": 3.1, "w3a16-g32": 3.5, "w2a16": 2.1, "fp8": 8.0}


class Jobs:
    """Stands in for run_job; `killed` are schemes whose candidates die when evaluated."""

    def __init__(self, killed: str | None = None) -> None:
        self.killed = killed
        self.asked: list[Any] = []

    def __call__(self, request: dict[str, Any], _limits: JobLimits) -> Any:
        if request["job"] == "quantize":
            scheme = request["words"]["scheme"]
            self.asked.append(scheme)
            Path(request["output"]).mkdir(parents=True, exist_ok=True)
            return {"bits_per_weight": BITS[scheme], "layers": []}
        schemes = [Path(m).name.removesuffix("-gptq") for m in request["models"]]
        self.asked.append((request["windows"], schemes))
        if self.killed in schemes:
            raise JobError("its process was killed by SIGKILL")
        hard = np.random.default_rng(0).gamma(3.0, size=request["windows"] or 64)
        results = [
            {
                "model": m, "perplexity_increase": KL[s], "kl": {"mean": KL[s]},
                "per_window": {"kl": (KL[s] * hard).tolist(), "nll": (2 + hard + KL[s] * hard).tolist()},
            }
            for m, s in zip(request["models"], schemes, strict=True)
        ]  # fmt: skip
        reference = {"per_window": {"nll": (2 + hard).tolist()}}
        return {part: {"results": results, "reference": reference} for part in request["texts"]}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    files = [tmp_path / f"{p}.jsonl" for p in ("calibration", "selection", "confirmation")]
    return Job("model", tmp_path, {"seed": 0}, Split(*files), 64, JobLimits(), resume=True)


def made(job: Job, monkeypatch: pytest.MonkeyPatch, jobs: Jobs) -> tuple[list[dict[str, Any]], Notebook]:
    monkeypatch.setattr(run, "run_job", jobs)
    notebook = Notebook.open(job.output / "progress.json", {"model": "m"})
    return quantize_all(job, [Candidate("gptq", s) for s in KL], notebook), notebook


def test_halving_spends_all_windows_on_few(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Jobs()
    rows, notebook = made(job, monkeypatch, jobs)
    narrow(job, rows, Limits(max_ppl_increase=0.05), notebook)
    measure_accuracy(job, rows, notebook)
    rungs = [(windows, len(schemes)) for windows, schemes in jobs.asked[len(KL) :]]
    assert rungs[0] == (8, 7)
    assert rungs[-1] == (None, 4)
    why = {c["scheme"]: c["dropped"] for c in rows if c.get("dropped")}
    assert "too inaccurate: perplexity" in why["w2a16"]
    assert "others of no more bits" in why["fp8"]  # w8a8 has as many bits and less KL
    assert all("on 8 windows" in w or "on 32 windows" in w for w in why.values())
    assert all("selection" in c and "evaluate" in c for c in measured(rows))


def test_one_that_dies_when_evaluated_does_not_take_the_others_along(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, notebook = made(job, monkeypatch, Jobs(killed="w4a16"))
    measure_accuracy(job, rows, notebook)
    assert {c["scheme"]: c["error"] for c in rows if c["error"]} == {
        "w4a16": "evaluating failed: its process was killed by SIGKILL"
    }
    assert len(measured(rows)) == len(KL) - 1
    assert all("evaluate" in c for c in measured(rows))


def test_what_is_finished_is_not_done_again_and_more_can_be_added(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    made(job, monkeypatch, Jobs())
    again = Jobs()
    rows, notebook = made(job, monkeypatch, again)
    assert again.asked == []
    assert [c["quantize"]["bits_per_weight"] for c in rows] == list(BITS.values())
    quantize_all(job, [Candidate("gptq", "w4a16"), Candidate("rtn", "w4a16")], notebook)
    assert again.asked == ["w4a16"]  # only the new one
    with pytest.raises(InputError, match="made with another model"):
        Notebook.open(job.output / "progress.json", {"model": "other"})


def test_one_that_cannot_be_run_is_listed_and_the_rest_is_timed(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = made(job, monkeypatch, Jobs())

    def bench(models: list[str], **_words: Any) -> dict[str, Any]:
        if any("fp8" in m for m in models):
            raise LowbitError("the process that measures it was killed")
        ratios = [{"model": m, "throughput": 2.0, "intervals": None} for m in models]
        return {"results": [{"model": m} for m in models], "ratios": ratios}

    monkeypatch.setattr(run, "bench", bench)
    assert measure_speed(job, rows, 5, None) is not None
    assert [c["scheme"] for c in rows if c["error"]] == ["fp8"]
    assert all("bench" in c and "ratio" in c for c in measured(rows))
