"""The long part of `tune`: make every candidate, narrow them down, measure what is left; and remember what is done."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowbit import console
from lowbit.artifact import write_json
from lowbit.console import note
from lowbit.errors import InputError, LowbitError
from lowbit.intervals import mean_interval, perplexity_ratio
from lowbit.speed import Scenario, bench
from lowbit.tuning.candidates import Candidate
from lowbit.tuning.decide import measured
from lowbit.tuning.halving import KEEP, RUNGS, Measured, dropped
from lowbit.tuning.isolate import JobError, JobLimits, run_job
from lowbit.tuning.limits import Limits
from lowbit.tuning.split import Split

SEARCH_WINDOWS = 32  # of the selection text, to judge a candidate that was just made
_NEW, _LONGEST = 16, 768  # tokens of the grid's answers, and of its longest prompt


def grid(context: int) -> tuple[Scenario, ...]:
    """What times at other sizes are predicted from: short and long prompts, few and many sequences."""
    sizes = ((16, 1), (16, 4), (16, 8), (64, 2), (192, 1), (192, 4), (384, 2), (_LONGEST, 1))
    return tuple(dict.fromkeys(Scenario(min(p, context - _NEW), _NEW, b) for p, b in sizes))


@dataclass(frozen=True)
class Job:
    """What is the same for all candidates."""

    model: str
    output: Path
    words: dict[str, Any]  # of the recipe, without scheme and method
    split: Split
    window: int
    limits: JobLimits
    resume: bool
    context: int = 2048  # of the model, in tokens


@dataclass(frozen=True)
class Notebook:
    """progress.json: results by key, kept across runs of the same job."""

    file: Path
    entries: dict[str, Any]

    @staticmethod
    def open(file: Path, identity: dict[str, Any]) -> "Notebook":
        """Raises InputError if the file belongs to another job."""
        entries: dict[str, Any] = {}
        if file.exists():
            entries = json.loads(file.read_text(encoding="utf-8"))
            differ = [k for k, v in identity.items() if entries.get("identity", {}).get(k) != v]
            if differ:
                raise InputError(
                    f"{file.parent}: was made with another {' and '.join(differ)}, so it cannot be resumed. Give the "
                    "same, or start anew with --force."
                )
        return Notebook(file, entries | {"identity": identity})

    def get(self, key: str) -> Any:
        return self.entries.get(key)

    def put(self, key: str, value: Any) -> None:
        self.entries[key] = value
        write_json(self.file, self.entries)


def quantize_all(job: Job, candidates: Sequence[Candidate], notebook: Notebook) -> list[dict[str, Any]]:
    """One row a candidate, with what is left to do said after each."""
    rows = []
    start, made = time.monotonic(), 0
    for n, candidate in enumerate(candidates, 1):
        row, fresh = make_one(job, candidate, notebook)
        made += fresh
        rows.append(row)
        if made and n < len(candidates):
            left = (time.monotonic() - start) / made * (len(candidates) - n)
            note(f"{n} of {len(candidates)} candidates, about {left:.0f} s left for the others")
    return rows


def make_one(job: Job, candidate: Candidate, notebook: Notebook) -> tuple[dict[str, Any], bool]:
    """(its row {name, scheme, method, path, error, quantize}, whether it was made now); a failure is a row with its
    reason."""
    path = job.output / "candidates" / candidate.name
    words = {**job.words, "scheme": candidate.scheme, "method": candidate.method}
    row: dict[str, Any] = {
        "name": candidate.name, "scheme": candidate.scheme, "method": candidate.method, "path": str(path),
        "error": None,
    }  # fmt: skip
    key = f"quantize {candidate.name}"
    known = notebook.get(key) if job.resume and path.is_dir() else None
    if known is not None and known["words"] == words:
        note(f"{candidate.name}: finished in an earlier run")
        return row | {"quantize": known["document"]}, False
    note(f"{candidate.name}:")
    resume = job.resume and (path.exists() or path.with_name(path.name + ".partial").exists())
    request = {"job": "quantize", "model": job.model, "output": str(path), "words": words, "resume": resume}
    try:
        row["quantize"] = run_job(request | {"verbosity": console.verbosity()}, job.limits)
        notebook.put(key, {"words": words, "document": row["quantize"]})
    except JobError as error:
        row["error"] = str(error)
        note(f"{candidate.name}: failed: {error}")
    return row, True


def judge(job: Job, row: dict[str, Any], limits: Limits, notebook: Notebook) -> str:
    """'good', 'bad' or 'open' (search.py) by a few windows; the row of a bad one gets `dropped` and `evaluate`."""
    documents = _evaluate(job, [row], ("selection",), SEARCH_WINDOWS, notebook)
    if "selection" not in documents:
        return "bad"
    reference = np.array(documents["selection"]["reference"]["per_window"]["nll"])
    (result,) = documents["selection"]["results"]
    ratio = perplexity_ratio(np.array(result["per_window"]["nll"]), reference)
    kl = mean_interval(np.array(result["per_window"]["kl"]))
    most = float("inf") if limits.max_kl is None else limits.max_kl
    if ratio.low - 1 > limits.max_ppl_increase or kl.low > most:
        row["evaluate"] = result
        least = f"perplexity {ratio.low - 1:+.2%} at least, KL {kl.estimate:.5f}"
        row["dropped"] = f"too inaccurate: {least}, on {len(reference)} windows"
        note(f"{row['name']}: {row['dropped']}")
        return "bad"
    good = limits.known_on_text and ratio.high - 1 <= limits.max_ppl_increase and kl.high <= most
    return "good" if good else "open"


def narrow(job: Job, rows: list[dict[str, Any]], limits: Limits, notebook: Notebook) -> None:
    """Successive halving: rows that go no further get `dropped` (why) and the `evaluate` they were judged by."""
    for windows in RUNGS:
        left = measured(rows)
        if len(left) <= KEEP:
            return
        documents = _evaluate(job, rows, ("selection",), windows, notebook)
        if "selection" not in documents:
            return
        reference = np.array(documents["selection"]["reference"]["per_window"]["nll"])
        results = {r["model"]: r for r in documents["selection"]["results"]}
        rung = [_measured(c, results[c["path"]], reference) for c in measured(rows)]
        for name, why in dropped(rung, limits.max_ppl_increase, limits.max_kl).items():
            row = next(c for c in rows if c["name"] == name)
            row["evaluate"], row["dropped"] = results[row["path"]], f"{why}, on {len(reference)} windows"
            note(f"{name}: {row['dropped']}")
    keep_closest(rows)


def _measured(row: dict[str, Any], result: dict[str, Any], reference: np.ndarray) -> Measured:
    own = result["per_window"]
    bits = row["quantize"]["bits_per_weight"]
    return Measured(row["name"], bits, np.array(own["kl"]), np.array(own["nll"]), reference)


def measure_accuracy(job: Job, rows: list[dict[str, Any]], notebook: Notebook) -> dict[str, Any]:
    """{part: evaluate document} on all of selection and confirmation; rows get `selection` and `evaluate`."""
    documents = _evaluate(job, rows, ("selection", "confirmation"), None, notebook)
    if not documents:
        why = next((c["error"] for c in rows if c["error"]), "none is left")
        raise LowbitError(f"no candidate could be evaluated: {why}")
    for part, key in (("selection", "selection"), ("confirmation", "evaluate")):
        results = {r["model"]: r for r in documents[part]["results"]}
        for c in measured(rows):
            c[key] = results[c["path"]]
    return documents


def _evaluate(
    job: Job, rows: list[dict[str, Any]], parts: Sequence[str], windows: int | None, notebook: Notebook
) -> dict[str, Any]:
    """{part: evaluate document} of what is left."""
    texts = {part: str(getattr(job.split, part)) for part in parts}

    def ask(left: list[dict[str, Any]]) -> dict[str, Any]:
        request = {
            "job": "evaluate", "models": [c["path"] for c in left], "texts": texts, "against": job.model,
            "seq_len": job.window, "windows": windows,
        }  # fmt: skip
        return remembered(job, request, left, notebook)

    return together(rows, ask, "evaluating")


def remembered(job: Job, request: dict[str, Any], rows: list[dict[str, Any]], notebook: Notebook) -> dict[str, Any]:
    """The job's result, or that of an earlier run that asked the same of the same candidates."""
    what = [request, [c["quantize"]["layers"] for c in rows]]
    key = f"{request['job']} {hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]}"
    known: dict[str, Any] | None = notebook.get(key) if job.resume else None
    if known is None:
        known = run_job(request | {"verbosity": console.verbosity()}, job.limits)
        notebook.put(key, known)
    return known


def together(
    rows: list[dict[str, Any]], ask: Callable[[list[dict[str, Any]]], dict[str, Any]], what: str
) -> dict[str, Any]:
    """Ask about what is left in one process; if that fails, about each alone, so that only those at fault drop out."""
    try:
        return ask(measured(rows))
    except JobError:
        note(f"{what} together failed: each candidate alone")
    for c in measured(rows):
        try:
            ask([c])
        except JobError as error:
            c["error"] = f"{what} failed: {error}"
            note(f"{c['name']}: {c['error']}")
    left = measured(rows)
    return ask(left) if left else {}


def keep_closest(rows: list[dict[str, Any]]) -> None:
    """Where the limits left none, the closest is measured in full, so that the answer has its numbers."""
    tried = [row for row in rows if row.get("dropped") and "evaluate" in row]
    if tried and not measured(rows):
        del min(tried, key=lambda row: float(row["evaluate"]["kl"]["mean"]))["dropped"]


def measure_speed(
    job: Job, rows: list[dict[str, Any]], repeats: int, precision: float | None, concurrency: int = 1
) -> dict[str, Any] | None:
    """The bench document; rows get `bench`, `ratio` and with a concurrency above 1 `concurrent`. A model that cannot be
    run drops out with its reason."""
    seed, batches = int(job.words["seed"]), sorted({1, concurrency})

    def ask(left: list[dict[str, Any]]) -> dict[str, Any]:
        return bench(
            [c["path"] for c in left], against=job.model, batch_sizes=batches, repeats=repeats, precision=precision,
            grid=grid(job.context), seed=seed,
        )  # fmt: skip

    left = measured(rows)
    try:
        speed = ask(left)
    except LowbitError:
        note("measuring the speed of all failed: each candidate alone")
        for c in left:
            try:
                bench([c["path"]], repeats=1, seed=seed)
            except LowbitError as error:
                c["error"] = f"running failed: {error}"
                note(f"{c['name']}: {c['error']}")
        left = measured(rows)
        if not left:
            return None
        speed = ask(left)
    for c in left:
        c |= timed(speed, c["path"])
    return speed


def timed(speed: dict[str, Any], model: str) -> dict[str, Any]:
    """{bench, concurrent, ratio} of one model: `bench` and `ratio` of one sequence, throughput and cost (a machine is
    paid by the hour) of as many as were asked for; `concurrent` None where that is one as well."""
    rows = [r for r in speed["results"] if r["model"] == model]
    found = {"bench": rows[0], "concurrent": rows[-1] if len(rows) > 1 else None}
    ratios = [r for r in speed["ratios"] if r["model"] == model]
    if ratios:
        one, many = ratios[0], ratios[-1]
        spread = (many["intervals"] or {}).get("throughput")
        intervals = (one["intervals"] or {}) | {k: spread for k in ("throughput", "cost") if spread is not None}
        rate = {"throughput": many["throughput"], "cost": many["throughput"], "intervals": intervals}
        found["ratio"] = one | rate
    return found
