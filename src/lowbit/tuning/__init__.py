"""tune: quantize in several ways, measure each on the user's text and machine, recommend one, or none.

1. split the text: calibration, selection, confirmation                       prepare.py, split.py
2. say what is to be expected, and in that order quantize every candidate,
   each in a process of its own, calibrated on the first part only            advice.py, run.py, isolate.py
3. with many candidates: accuracy on few windows, the better half on more     halving.py
4. accuracy of the rest on the other two parts, and on tasks                  run.py, questions.py
5. speed of them in turns with the original
6. decide (limits.py, decide.py), and write tune.json and report.html

What is finished is kept: with resume=True an interrupted run goes on, and more candidates can be added to one.
"""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import lowbit
from lowbit.artifact import disk_errors, write_json
from lowbit.calibration import read_documents, tokenize
from lowbit.console import note
from lowbit.environment import environment
from lowbit.errors import InputError
from lowbit.model.checkpoint import DEMO, Checkpoint, open_checkpoint
from lowbit.report import write_report
from lowbit.report.catalog import read_catalog, usd_per_hour
from lowbit.report.cost import per_million_tokens
from lowbit.runtime.engine import load
from lowbit.tuning.advice import Situation, Task, expect, guess_device
from lowbit.tuning.candidates import Candidate, make_candidates
from lowbit.tuning.decide import measured, pareto, recommend, verdict
from lowbit.tuning.expected import PLAIN, expected_seconds
from lowbit.tuning.halving import KEEP
from lowbit.tuning.isolate import JobLimits
from lowbit.tuning.limits import Limits, at_concurrency, check_limits
from lowbit.tuning.prepare import Ground, check_output, prepare_ground
from lowbit.tuning.questions import check_tasks, measure_tasks
from lowbit.tuning.run import (
    Job,
    Notebook,
    judge,
    keep_closest,
    make_one,
    measure_accuracy,
    measure_speed,
    narrow,
    quantize_all,
    timed,
)
from lowbit.tuning.search import search
from lowbit.tuning.summary import summary

__all__ = ["summary", "tune"]

SAMPLES = 128
PRECISION = 0.03  # half the interval of a speed-up that ends its measuring
_SAMPLE_TOKENS = 48


def tune(
    model: str | Path,
    output: str | Path,
    text: str | Path | None = None,
    *,
    calibration: str | Path | None = None,
    candidates: Sequence[Candidate] | None = None,
    job_limits: JobLimits | None = None,
    task: Task | None = None,
    catalog: str | Path | None = None,
    repeats: int = 5,
    exhaustive: bool = False,
    seed: int = 0,
    resume: bool = False,
    force: bool = False,
    **limits: Any,
) -> dict[str, Any]:
    """The `tune` document: candidates with what was measured, the Pareto set and one recommendation.

    Everything goes under `output`: candidates/NAME (loadable), data/ (the split), tune.json, report.html.
    `catalog` adds prices of hosted models and hardware (report/catalog.py). With more than a few candidates only those
    are made that can still be the answer (search.py); `exhaustive` makes and measures them all. `calibration` replaces
    the calibration part of the user's own text. `job_limits` hold for each candidate's jobs.
    `limits` are the words of limits.Limits (max_ppl_increase=0.01, max_memory=..., optimize="tpot", tasks=..., ...).
    """
    output = Path(output).absolute()  # candidates are named by where they lie, wherever the user stands later
    wanted = Limits(**limits)
    check_limits(wanted)
    prices = read_catalog(None if catalog is None else Path(catalog))
    price = usd_per_hour(prices, wanted.hardware)
    check_output(output, resume=resume, force=force)
    if wanted.tasks:
        check_tasks(wanted.tasks)
    checkpoint = open_checkpoint(model)
    tried = make_candidates(small=checkpoint.path == DEMO / "model") if candidates is None else candidates
    ground = prepare_ground(output, checkpoint, text, calibration, seed, resume)
    situation = Situation(guess_device(), wanted.concurrency, task=task)
    expected = expect(situation, [c.scheme for c in tried])
    job = _job(str(model), output, checkpoint, ground, calibration, seed, job_limits or JobLimits(), resume)

    rows = _make(job, _in_order(tried, expected), checkpoint, wanted, ground.notebook, exhaustive)
    measurements = _measure(job, rows, wanted, ground.notebook, repeats, price)
    for c in rows:
        c["verdict"] = verdict(c, wanted)
    document = {
        "lowbit_version": lowbit.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "seed": seed,
        "model": str(model),
        "output": str(output),
        "text": None if text is None else str(text),
        "repeats": repeats,
        "seq_len": ground.window,
        "calibration_samples": job.words["samples"],
        "limits": asdict(wanted),
        "usd_per_hour": price,
        "split": {f"{part}_tokens": n for part, n in ground.tokens.items()},
        "domain": ground.domain,
        "expected": {"situation": vars(situation), "order": expected},
        "catalog": prices,
        "own_candidates": candidates is not None,
        "exhaustive": exhaustive,
        "calibration": None if calibration is None else str(calibration),
        **measurements,
        "candidates": rows,
        "pareto": pareto(rows),
        "recommendation": _with_hint(recommend(rows, wanted, _runnable(measurements["original"])), rows),
        "samples": _samples(str(model), measured(rows), ground.split.confirmation, ground.tokenizer),
    }
    with disk_errors(output):
        write_json(output / "tune.json", document)
        write_report(document, output / "report.html")
    return document


def _in_order(candidates: Sequence[Candidate], expected: Sequence[dict[str, Any]]) -> list[Candidate]:
    """The most promising first."""
    order = [row["scheme"] for row in expected]
    return sorted(candidates, key=lambda c: order.index(c.scheme))


def _job(
    model: str,
    output: Path,
    checkpoint: Checkpoint,
    ground: Ground,
    calibration: str | Path | None,
    seed: int,
    limits: JobLimits,
    resume: bool,
) -> Job:
    words = {
        "calibration": str(calibration or ground.split.calibration),
        "samples": min(SAMPLES, ground.tokens["calibration"] // ground.window),
        "seq_len": ground.window,
        "seed": seed,
    }
    context = int(checkpoint.text_config.get("max_position_embeddings") or 2048)
    return Job(model, output, words, ground.split, ground.window, limits, resume, context)


def _make(
    job: Job, candidates: list[Candidate], checkpoint: Checkpoint, limits: Limits, notebook: Notebook, exhaustive: bool
) -> list[dict[str, Any]]:
    """All candidates if they are few or nothing is known before they are made; else only those that may be the
    answer. What is left goes on to all measurements."""
    times = None
    if len(candidates) > KEEP and not exhaustive and limits.optimize == "tpot":
        times = expected_seconds(checkpoint, [c.scheme for c in candidates])
    if times is None:
        rows = quantize_all(job, candidates, notebook)
    else:
        plain = times[PLAIN]
        said = sorted((t, s) for s, t in times.items() if s != PLAIN)
        note("expected speed-up of the linears: " + ", ".join(f"{s} {plain / t:.2f}x" for t, s in said))

        def make(candidate: Candidate) -> dict[str, Any]:
            return make_one(job, candidate, notebook)[0]

        rows = search(candidates, times, plain, make, lambda row: judge(job, row, limits, notebook))
        keep_closest(rows)
    if not measured(rows):
        raise InputError(f"no candidate is left: {rows[0]['error'] or rows[0]['dropped']}")
    if not exhaustive:
        narrow(job, rows, limits, notebook)
    return rows


def _measure(
    job: Job, rows: list[dict[str, Any]], limits: Limits, notebook: Notebook, repeats: int, price: float
) -> dict[str, Any]:
    """Accuracy, then speed, of what is left; the parts of the document that are not a candidate's."""
    accuracy = measure_accuracy(job, rows, notebook)["confirmation"]
    tasks = measure_tasks(job, rows, limits, notebook)
    speed = measure_speed(job, rows, repeats, PRECISION, limits.concurrency)
    # `speed` is None where no candidate could be run
    original: dict[str, Any] = {"bench": None, "concurrent": None} if speed is None else timed(speed, job.model)
    original |= {"name": job.model, "evaluate": accuracy["reference"], "noise_floor": accuracy["noise_floor"]}
    original["tasks"] = tasks
    for row in [original, *measured(rows)]:
        if row["bench"] is not None:
            rate = at_concurrency(row)["throughput_tokens_per_s"]
            row["cost_per_million_tokens"] = per_million_tokens(price, rate)
    return {
        "windows": accuracy["windows"],
        "original": original,
        "peak_bandwidth_bytes_per_s": None if speed is None else speed["peak_bandwidth_bytes_per_s"],
        "grid": [] if speed is None else speed["grid"],
    }


def _runnable(original: dict[str, Any]) -> dict[str, Any] | None:
    return None if original["bench"] is None else original


def _with_hint(answer: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Where nothing that was made is the answer, what was not made may be."""
    left = sum(c["path"] is None for c in rows)
    if left and answer["name"] not in {c["name"] for c in rows}:
        answer["reasons"].append(f"{left} candidates were not made; --resume --exhaustive makes them too")
    return answer


def _samples(model: str, made: list[dict[str, Any]], text: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """A few prompts from the confirmation text, continued by the original and by every candidate."""
    ids = tokenize("\n".join(read_documents(text, tokenizer)), tokenizer)
    prompts = [ids[at : at + 32] for at in (len(ids) // 4, len(ids) // 2)]
    samples: list[dict[str, Any]] = [{"prompt": tokenizer.decode(p), "outputs": {}} for p in prompts]
    for name, path in [("original", model), *((c["name"], c["path"]) for c in made)]:
        engine = load(path)
        for sample, prompt in zip(samples, prompts, strict=True):
            new = [int(t) for t in engine.stream(torch.from_numpy(prompt.astype("int64"))[None], _SAMPLE_TOKENS)]
            sample["outputs"][name] = tokenizer.decode(new)
    return samples
