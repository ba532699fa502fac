"""Tasks with right and wrong answers: EleutherAI's lm-evaluation-harness over lowbit's engines and over servers.

A task is a name the harness knows (its data come from the hub) or a YAML file of the user's in the harness' form, whose
data files lie beside it: no network. Every sample's scores are kept, because two models answer the same questions: only
those on which they disagree say which is better (McNemar's test, intervals.py), and that needs far fewer questions than
two accuracies side by side.

A server is asked through the harness' own client for /v1/completions, with the tokenizer of the reference.
"""

import contextlib
import json
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from importlib import metadata
from itertools import combinations
from typing import Any

import numpy as np

from lowbit.accuracy.task_files import task_manager, task_spec
from lowbit.client import is_url
from lowbit.console import note, verbosity
from lowbit.errors import InputError
from lowbit.intervals import mcnemar, mean_interval
from lowbit.model.checkpoint import Checkpoint
from lowbit.model.load import load_tokenizer
from lowbit.runtime.engine import Runtime, load

_NOT_MEASURED: dict[str, Any] = {"perplexity": None, "perplexity_increase": None, "kl": None, "top1_agreement": None}


def evaluate_tasks(
    models: Sequence[str],
    original: Checkpoint,
    tasks: Sequence[str],
    *,
    runtime: Runtime = "auto",
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The `evaluate` document without its text: {harness, reference, results, task_comparisons}, where `tasks` of the
    reference (in float32) and of each result are {task: {metrics, n, fewshot, samples}}, and `task_comparisons` hold
    every pair against each other, sample by sample.

    A model may be a server's URL. `limit`: only so many samples a task. Raises InputError for an unknown task, data
    that cannot be had, a server that cannot answer, and where the harness is not installed.
    """
    if limit is not None and limit < 1:
        raise InputError(f"--limit must be at least 1 sample, got {limit}.")
    harness = _harness()
    with _quiet():
        specs = [task_spec(name) for name in tasks]
        manager = task_manager(specs, tasks)
        found = []
        subjects: list[tuple[str | Checkpoint, Runtime]] = [(original, "float32"), *((m, runtime) for m in models)]
        for name, kind in subjects:
            note(f"tasks: {original.name if isinstance(name, Checkpoint) else name}")
            model = _model(name, original, kind)
            found.append(_run(model, specs, manager, limit, seed, str(getattr(name, "name", name))))
    names = [original.name, *models]
    return {
        "harness": harness,
        "reference": {"model": original.name, "tasks": found[0]},
        "results": [_NOT_MEASURED | {"model": m, "tasks": own} for m, own in zip(models, found[1:], strict=True)],
        "task_comparisons": [
            {"model": names[b], "against": names[a], "task": task, "metric": metric}
            | compare(found[b][task]["samples"], found[a][task]["samples"], metric)
            for a, b in combinations(range(len(names)), 2)
            for task in found[a]
            for metric in found[a][task]["metrics"]
            if _paired(found[a][task]["samples"], metric)
        ],
    }


def check_tasks(tasks: Sequence[str]) -> None:
    """Raises InputError for what `evaluate_tasks` would refuse before it asks any model."""
    _harness()
    with _quiet():
        task_manager([task_spec(name) for name in tasks], tasks)


def compare(own: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]], metric: str) -> dict[str, Any]:
    """{difference, mcnemar} of one metric on the same samples: the mean difference with its interval, and for right or
    wrong answers the exact test (else None). Raises ValueError if the samples are not the same."""
    if [s["doc_hash"] for s in own] != [s["doc_hash"] for s in other]:
        raise ValueError("the two models were not asked the same questions")
    a, b = (np.array([s["scores"][metric] for s in samples], dtype=float) for samples in (own, other))
    binary = bool(np.isin(np.concatenate([a, b]), (0, 1)).all())
    return {"difference": mean_interval(a - b).to_dict(), "mcnemar": mcnemar(a == 1, b == 1) if binary else None}


def _paired(samples: Sequence[dict[str, Any]], metric: str) -> bool:
    """Whether every sample has a score of its own in this metric (a corpus BLEU has none)."""
    return bool(samples) and all(isinstance(s["scores"].get(metric), int | float) for s in samples)


def _harness() -> str:
    try:
        import lm_eval  # noqa: F401
        import tenacity  # noqa: F401  # of the harness' own extra [api]
    except ImportError as error:
        raise InputError(f"tasks need the lm-evaluation-harness ({error}): pip install 'lowbit[tasks]'.") from error
    return f"lm-eval {metadata.version('lm-eval')}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness and the data sets' library say much on the way; shown with -v."""
    if verbosity() > 1:
        yield
        return
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    loggers = [logging.getLogger(n) for n in ("lm_eval", "datasets")]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


def _run(
    model: Any, specs: Sequence[str | dict[str, Any]], manager: Any, limit: int | None, seed: int, name: str
) -> dict[str, Any]:
    """{task: {metrics, n, fewshot, samples}} of one model."""
    from lm_eval import simple_evaluate

    try:
        out = simple_evaluate(
            model, tasks=list(specs), task_manager=manager, limit=limit, bootstrap_iters=0, random_seed=seed,
            numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
        )  # fmt: skip
    except InputError:
        raise
    except Exception as error:  # data, templates and answers of others raise what they like
        reason = str(error).strip().split("\n")[0][:300] or type(error).__name__
        raise InputError(f"{name}: the tasks cannot be run: {type(error).__name__}: {reason}") from error
    assert out is not None
    return {task: _task(out, task) for task in out["samples"]}


def _task(out: dict[str, Any], task: str) -> dict[str, Any]:
    """One task's metrics with standard errors over samples, and the samples by their order.

    A filter is another way to read the same answers: its metrics are 'exact_match,strict-match'.
    """
    samples: dict[int, dict[str, Any]] = {}
    for row in sorted(out["samples"][task], key=lambda r: int(r["doc_id"])):
        sample = samples.setdefault(row["doc_id"], _sample(row))
        sample["scores"] |= {_named(m, row["filter"]): _score(row[m]) for m in row["metrics"] if m in row}
    found = {_named(*k.split(",", 1)): v for k, v in out["results"][task].items() if "," in k and "_stderr" not in k}
    rows = list(samples.values())
    metrics = {
        k: {"value": float(v), "stderr": _stderr(rows, k)} for k, v in found.items() if isinstance(v, int | float)
    }
    return {"metrics": metrics, "n": len(rows), "fewshot": out["n-shot"].get(task), "samples": rows}


def _named(metric: str, reading: str) -> str:
    return metric if reading == "none" else f"{metric},{reading}"


def _score(value: Any) -> float | str:
    return float(value) if isinstance(value, int | float | np.number | np.bool_) else str(value)


def _stderr(samples: Sequence[dict[str, Any]], metric: str) -> float | None:
    if len(samples) < 2 or not _paired(samples, metric):
        return None
    scores = np.array([s["scores"][metric] for s in samples])
    return float(scores.std(ddof=1) / np.sqrt(len(scores)))


def _sample(row: dict[str, Any]) -> dict[str, Any]:
    responses = json.loads(json.dumps(row["filtered_resps"], default=str))
    return {k: row[k] for k in ("doc_id", "doc_hash")} | {
        "target": str(row["target"]),
        "responses": responses,
        "scores": {},
    }


# ---- models ----


def _model(name: str | Checkpoint, original: Checkpoint, runtime: Runtime) -> Any:
    """The harness' view of a checkpoint or a server."""
    from lowbit.accuracy.harness import HarnessModel

    tokenizer = load_tokenizer(original)
    if isinstance(name, str) and is_url(name):
        return _server(name, original, tokenizer)
    return HarnessModel(load(name, runtime), tokenizer)


def _server(url: str, original: Checkpoint, tokenizer: Any) -> Any:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    base = url.rstrip("/").removesuffix("/v1")
    context = int(original.text_config.get("max_position_embeddings") or 2048)
    key = os.environ.get("OPENAI_API_KEY")
    return LocalCompletionsAPI(
        base_url=f"{base}/v1/completions", model=_served(base), tokenizer=str(original.path), max_length=context,
        tokenizer_backend="huggingface", add_bos_token=tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id,
        max_retries=1, header={"Authorization": f"Bearer {key}"} if key else {"Accept": "application/json"},
    )  # fmt: skip


def _served(base: str) -> str:
    """The first model that a server lists. Raises InputError if it cannot be asked."""
    key = os.environ.get("OPENAI_API_KEY")
    request = urllib.request.Request(f"{base}/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return str(json.loads(answer.read(2**20))["data"][0]["id"])
    except (urllib.error.URLError, OSError) as error:
        raise InputError(f"{base}: cannot be reached ({getattr(error, 'reason', error)}).") from error
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{base}/v1/models: expected a list of models. Is this an OpenAI-compatible server?"
        ) from error
