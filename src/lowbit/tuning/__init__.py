"""tune: quantize in several ways, measure each on the user's text and machine, recommend one, or none.

1. split the text: calibration, selection, confirmation                       split.py
2. say what is to be expected, and in that order quantize every candidate,
   each in a process of its own, calibrated on the first part only            advice.py, run.py, isolate.py
3. with many candidates: accuracy on few windows, the better half on more     halving.py
4. accuracy of the rest on the other two parts, speed of them in turns with the original
5. decide (decide.py), and write tune.json and report.html

What is finished is kept: with resume=True an interrupted run goes on, and more candidates can be added to one.
"""

import hashlib
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import lowbit
from lowbit.accuracy.domain import domain_distance, warning
from lowbit.artifact import disk_errors, write_json
from lowbit.calibration import read_documents, tokenize
from lowbit.console import note
from lowbit.environment import environment
from lowbit.errors import InputError, nearest
from lowbit.model.checkpoint import DEMO, Checkpoint, open_checkpoint
from lowbit.model.load import load_tokenizer
from lowbit.report import write_report
from lowbit.report.catalog import read_catalog
from lowbit.runtime.engine import load
from lowbit.tuning.advice import Situation, Task, expect, guess_device
from lowbit.tuning.candidates import Candidate, make_candidates
from lowbit.tuning.decide import OBJECTIVES, Limits, measured, pareto, recommend, verdict
from lowbit.tuning.expected import PLAIN, expected_seconds
from lowbit.tuning.halving import KEEP
from lowbit.tuning.isolate import JobLimits
from lowbit.tuning.run import Job, Notebook, judge, make_one, measure_accuracy, measure_speed, narrow, quantize_all
from lowbit.tuning.search import search
from lowbit.tuning.split import Split, write_split
from lowbit.tuning.summary import summary

__all__ = ["summary", "tune"]

SAMPLES, SEQ_LEN = 128, 512
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
    `catalog` adds prices of hosted models and hardware to the report (report/catalog.py).
    With more than a few candidates only those are made that can still be the answer (search.py); `exhaustive` makes and
    measures them all. `calibration` replaces the calibration part of the user's own text. `job_limits` hold for each
    candidate's jobs.
    `limits` are the words of decide.Limits (max_ppl_increase=0.01, max_memory=..., optimize="tpot", ...).
    """
    output = Path(output).absolute()  # candidates are named by where they lie, wherever the user stands later
    wanted = Limits(**limits)
    if wanted.optimize not in OBJECTIVES:
        raise InputError(f"--optimize {wanted.optimize}: {nearest(wanted.optimize, OBJECTIVES)}")
    _check_output(output, resume=resume, force=force)
    prices = read_catalog(None if catalog is None else Path(catalog))
    checkpoint = open_checkpoint(model)
    own_text = text
    if text is None:
        if checkpoint.path != DEMO / "model":
            raise InputError("tune measures on your own text: --text FILE (.txt or .jsonl).")
        text = DEMO / "evaluation.txt"
    own_candidates = candidates is not None
    if candidates is None:
        candidates = make_candidates(small=checkpoint.path == DEMO / "model")
    tokenizer = load_tokenizer(checkpoint)
    notebook = _begin(output, checkpoint, Path(text), seed, resume)
    split, tokens, window, domain = _texts(output, Path(text), calibration, tokenizer, checkpoint, seed)
    situation = Situation(guess_device(), task=task)
    expected = expect(situation, [c.scheme for c in candidates])
    order = [row["scheme"] for row in expected]
    words = {
        "calibration": str(calibration or split.calibration),
        "samples": min(SAMPLES, tokens["calibration"] // window),
        "seq_len": window,
        "seed": seed,
    }
    context = int(checkpoint.text_config.get("max_position_embeddings") or 2048)
    job = Job(str(model), output, words, split, window, job_limits or JobLimits(), resume, context)
    ordered = sorted(candidates, key=lambda c: order.index(c.scheme))
    rows = _make(job, ordered, checkpoint, wanted, notebook, exhaustive)
    if not measured(rows):
        raise InputError(f"no candidate is left: {rows[0]['error'] or rows[0]['dropped']}")
    if not exhaustive:
        narrow(job, rows, wanted, notebook)
    accuracy = measure_accuracy(job, rows, notebook)
    speed = measure_speed(job, rows, repeats, PRECISION, seed)
    for c in rows:
        c["verdict"] = verdict(c, wanted)

    document = {
        "lowbit_version": lowbit.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "seed": seed,
        "model": str(model),
        "output": str(output),
        "text": None if own_text is None else str(own_text),
        "repeats": repeats,
        "seq_len": window,
        "calibration_samples": words["samples"],
        "limits": vars(wanted),
        "split": {f"{part}_tokens": n for part, n in tokens.items()},
        "domain": domain,
        "expected": {"situation": vars(situation), "order": expected},
        "catalog": prices,
        "own_candidates": own_candidates,
        "exhaustive": exhaustive,
        "calibration": None if calibration is None else str(calibration),
        **_outcome(str(model), rows, accuracy["confirmation"], speed, wanted),
        "samples": _samples(str(model), measured(rows), split.confirmation, tokenizer),
    }
    with disk_errors(output):
        write_json(output / "tune.json", document)
        write_report(document, output / "report.html")
    return document


def _make(
    job: Job, candidates: list[Candidate], checkpoint: Checkpoint, limits: Limits, notebook: Notebook, exhaustive: bool
) -> list[dict[str, Any]]:
    """All candidates if they are few or nothing is known before they are made; else only those that may be the
    answer."""
    times = None
    if len(candidates) > KEEP and not exhaustive and limits.optimize == "tpot":
        times = expected_seconds(checkpoint, [c.scheme for c in candidates])
    if times is None:
        return quantize_all(job, candidates, notebook)
    plain = times[PLAIN]
    said = sorted((t, s) for s, t in times.items() if s != PLAIN)
    note("expected speed-up of the linears: " + ", ".join(f"{s} {plain / t:.2f}x" for t, s in said))
    rows = search(
        candidates, times, plain, lambda c: make_one(job, c, notebook)[0], lambda row: judge(job, row, limits, notebook)
    )
    tried = [row for row in rows if row.get("dropped") and "evaluate" in row]
    if tried and not measured(rows):  # the closest is measured in full, so that the answer has its numbers
        del min(tried, key=lambda row: float(row["evaluate"]["kl"]["mean"]))["dropped"]
    return rows


def _outcome(
    model: str, rows: list[dict[str, Any]], accuracy: dict[str, Any], speed: dict[str, Any] | None, limits: Limits
) -> dict[str, Any]:
    """What was measured and what follows from it. `speed` is None where no candidate could be run."""
    bench = None if speed is None else next(r for r in speed["results"] if r["model"] == model)
    return {
        "windows": accuracy["windows"],
        "original": {
            "name": model,
            "evaluate": accuracy["reference"],
            "noise_floor": accuracy["noise_floor"],
            "bench": bench,
        },
        "peak_bandwidth_bytes_per_s": None if speed is None else speed["peak_bandwidth_bytes_per_s"],
        "grid": [] if speed is None else speed["grid"],
        "candidates": rows,
        "pareto": pareto(rows),
        "recommendation": _with_hint(recommend(rows, limits, bench), rows),
    }


def _with_hint(answer: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Where nothing that was made is the answer, what was not made may be."""
    left = sum(c["path"] is None for c in rows)
    if left and answer["name"] not in {c["name"] for c in rows}:
        answer["reasons"].append(f"{left} candidates were not made; --resume --exhaustive makes them too")
    return answer


def _check_output(output: Path, *, resume: bool, force: bool) -> None:
    if resume and force:
        raise InputError("--resume goes on with what is there and --force throws it away: give one of them.")
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: is a file; give the name of a directory to make.")
    if output.exists() and any(output.iterdir()) and not (resume or force):
        raise InputError(
            f"{output}: exists and is not empty. Go on with an interrupted run with --resume, replace it with --force, "
            "or give another name."
        )


def _begin(output: Path, checkpoint: Checkpoint, text: Path, seed: int, resume: bool) -> Notebook:
    """An empty output directory, or with `resume` the one that is there, if it is of the same job."""
    try:
        digest = hashlib.sha256(text.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{text}: cannot be read ({error.strerror}).") from error
    identity = {"model": checkpoint.digest, "text": digest, "seed": seed, "lowbit": lowbit.__version__}
    with disk_errors(output):
        if output.exists() and not resume:
            shutil.rmtree(output)
        output.mkdir(parents=True, exist_ok=True)
        return Notebook.open(output / "progress.json", identity)


def _texts(
    output: Path, text: Path, calibration: str | Path | None, tokenizer: Any, checkpoint: Checkpoint, seed: int
) -> tuple[Split, dict[str, int], int, dict[str, Any]]:
    """The split, its sizes in tokens, the window, and how far the calibration text is from the evaluation text."""
    documents = read_documents(text, tokenizer)
    with disk_errors(output):
        split = write_split(documents, seed, output / "data")
    parts = ("calibration", "selection", "confirmation")
    files = {part: Path(getattr(split, part)) for part in parts}
    if calibration is not None:
        files["calibration"] = Path(calibration)
    ids = {p: tokenize("\n".join(read_documents(file, tokenizer)), tokenizer) for p, file in files.items()}
    tokens = {part: len(ids[part]) for part in parts}
    window = min(SEQ_LEN, int(checkpoint.config.get("max_position_embeddings") or SEQ_LEN))
    if min(tokens.values()) < 2 * window:
        raise InputError(
            f"{text}: too short to split: {tokens} tokens, and each part needs two windows of {window} at least."
        )
    domain = domain_distance(ids["calibration"], ids["selection"], seed)
    if said := warning(domain):
        note(f"warning: {said}")
    return split, tokens, window, domain


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
