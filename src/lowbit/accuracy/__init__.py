"""evaluate: what a quantized model lost, on the user's text, through the runtime that will serve it."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lowbit.accuracy.domain import domain_distance, warning
from lowbit.accuracy.measure import Scores, cut_windows, measure
from lowbit.accuracy.tasks import evaluate_tasks
from lowbit.artifact import MANIFEST, read_manifest, write_json
from lowbit.calibration import read_documents, tokenize
from lowbit.client import is_url
from lowbit.console import note
from lowbit.errors import InputError
from lowbit.intervals import kl_difference, mcnemar, mean_interval, perplexity_ratio
from lowbit.model.checkpoint import DEMO, Checkpoint, open_checkpoint
from lowbit.model.load import load_tokenizer
from lowbit.runtime.base import Engine
from lowbit.runtime.engine import Runtime, load
from lowbit.runtime.outside import attach
from lowbit.runtime.server import Serving

__all__ = ["evaluate"]

MAX_DEFAULT_WINDOW = 2048


def evaluate(
    models: Sequence[str | Path],
    text: str | Path | None = None,
    *,
    against: str | Path | None = None,
    seq_len: int | None = None,
    windows: int | None = None,
    runtime: Runtime = "auto",
    program: str | None = None,
    floor: str | Path | None = None,
    max_ppl_increase: float | None = None,
    max_kl: float | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    kv: str | None = None,
) -> dict[str, Any]:
    """The `evaluate` document of `models` against the float32 original, on a .txt or .jsonl file.

    `against` defaults to the model that a lowbit output was made from. `max_ppl_increase` (0.01 is 1 %) and `max_kl`
    are gates: each result's `gates` says whether it met them. `kv` is how the models cache keys and values
    (engine.load); the original's own cache stays in 16 bits. `windows` takes only so many, spread evenly over the
    text. A lowbit output gets its result as evaluate.json.

    `tasks` are names of the lm-evaluation-harness or YAML files (accuracy/tasks.py), `limit` takes only so many samples
    of each; each result's `tasks` keeps every sample, `task_comparisons` every pair of models. With tasks and no
    text, tasks are all that is measured.

    With a `runtime` of another project (llama.cpp, vllm) its server is started for every model, from `program` or from
    PATH; a model may be the URL of a running one, which serves the reference in some form. `floor` is the original in
    that engine's own format, where it cannot read `against` itself; without it no noise floor is measured.
    """
    if not models:
        raise InputError("no model to evaluate: give at least one.")
    if against is None and is_url(str(models[0])):
        raise InputError(f"{models[0]}: say which model it serves with --against; its tokenizer is needed.")
    original = open_checkpoint(against if against is not None else _origin(models[0]))
    if original.quantization is not None:
        raise InputError(f"{original.name}: the reference is itself quantized; give the original with --against.")
    asked = None
    if tasks:
        asked = evaluate_tasks([str(m) for m in models], original, tasks, runtime=runtime, limit=limit)
        if text is None:
            return asked
    label = str(text)
    if text is None:
        if original.path != DEMO / "model":
            raise InputError("no text to evaluate on: --text FILE (.txt or .jsonl).")
        text, label = DEMO / "evaluation.txt", "the demo's text"
    tokenizer = load_tokenizer(original)
    ids = tokenize("\n".join(read_documents(Path(text), tokenizer)), tokenizer)
    reference = load(original, "float32")
    cut = _windows(ids, reference, seq_len, windows, label)
    plain = _floor(original, floor, runtime, models)
    with ExitStack() as stack:
        # a server is asked about the token after a window, and answers with one more
        serving = Serving(cut.shape[1] + 2, program=program)
        engines = [stack.enter_context(_start(m, original, runtime, serving, kv)) for m in models]
        _check_vocabularies(models, engines, reference)
        if plain is not None:
            engines.insert(0, stack.enter_context(load(plain, runtime, serving)))
        truth, *scores = measure(reference.logits, [e.logits for e in engines], cut, reference.vocab_size)
    noise = None if plain is None else _noise(engines.pop(0), scores.pop(0))
    results = [
        _result(str(name), engine, own, truth, max_ppl_increase, max_kl)
        for name, engine, own in zip(models, engines, scores, strict=True)
    ]
    document: dict[str, Any] = {
        "text": label,
        "seq_len": cut.shape[1],
        "windows": len(cut),
        "tokens": cut.numel(),
        "reference": {
            "model": original.name,
            "perplexity": truth.perplexity,
            "runtime": reference.runtime,
            "per_window": {"nll": truth.nll.tolist()},
        },
        "noise_floor": noise,
        "results": results,
        "comparisons": _comparisons([str(m) for m in models], scores),
    }
    if asked is not None:
        _add_tasks(document, asked)
    for name, result in zip(models, results, strict=True):
        result["domain"] = _domain(Path(name), ids, tokenizer)
        if (Path(name) / MANIFEST).exists():
            write_json(Path(name) / "evaluate.json", document | {"results": [result], "comparisons": []})
    return document


def _windows(ids: np.ndarray, reference: Engine, seq_len: int | None, most: int | None, label: str) -> Tensor:
    """(windows, tokens), at most `most` of them."""
    window = seq_len or min(reference.context_length, MAX_DEFAULT_WINDOW)
    if window > reference.context_length:
        raise InputError(f"--seq-len {window} exceeds the model's context ({reference.context_length}).")
    cut = cut_windows(ids, window, label)
    if most is None or most >= len(cut):
        return cut
    return cut[np.linspace(0, len(cut) - 1, most).round().astype(int)]


def _check_vocabularies(models: Sequence[str | Path], engines: Sequence[Engine], reference: Engine) -> None:
    for name, engine in zip(models, engines, strict=True):
        if engine.vocab_size != reference.vocab_size:
            raise InputError(
                f"{name}: has {engine.vocab_size} tokens and the reference {reference.vocab_size}: not comparable."
            )


def _add_tasks(document: dict[str, Any], asked: dict[str, Any]) -> None:
    document["reference"]["tasks"] = asked["reference"]["tasks"]
    document["task_comparisons"] = asked["task_comparisons"]
    for result, same in zip(document["results"], asked["results"], strict=True):
        result["tasks"] = same["tasks"]


def _start(
    model: str | Path, original: Checkpoint, runtime: Runtime, serving: Serving, kv: str | None = None
) -> Engine:
    return attach(str(model), original) if is_url(str(model)) else load(model, runtime, serving, kv=kv)


def _floor(
    original: Checkpoint, floor: str | Path | None, runtime: Runtime, models: Sequence[str | Path]
) -> Checkpoint | str | Path | None:
    """What to measure the runtime's own noise on, or None where there is nothing: a server that runs already, and
    ONNX Runtime or llama.cpp without the original in their formats."""
    if floor is not None:
        return floor
    unreadable = runtime == "onnx" or (runtime == "llama.cpp" and original.gguf is None)
    return None if unreadable or all(is_url(str(m)) for m in models) else original


def _noise(engine: Engine, own: Scores) -> dict[str, Any]:
    return {
        "kl": float(own.kl.mean()),
        "top1_agreement": float(own.agreement.mean()),
        "perplexity": own.perplexity,
        "runtime": engine.runtime,
    }


def _domain(model: Path, ids: np.ndarray, tokenizer: Any) -> dict[str, Any] | None:
    """How far this text is from what the model was calibrated on, where that can still be read."""
    source = (read_manifest(model)["calibration"] or {}).get("source") if (model / MANIFEST).exists() else None
    if source is None or not Path(source).is_file():
        return None
    found = domain_distance(tokenize("\n".join(read_documents(Path(source), tokenizer)), tokenizer), ids)
    if said := warning(found):
        note(f"warning: {model}: {said}")
    return found


def _comparisons(names: list[str], scores: Sequence[Scores]) -> list[dict[str, Any]]:
    """The model with the least KL against each other one, window by window: is it really the best?"""
    if len(names) < 2:
        return []
    best = min(range(len(names)), key=lambda i: scores[i].kl.mean())
    return [
        {
            "model": names[best],
            "against": name,
            "kl_difference": kl_difference(scores[best].kl, own.kl).to_dict(),
            "perplexity_ratio": perplexity_ratio(scores[best].nll, own.nll).to_dict(),
            "mcnemar": mcnemar(scores[best].right, own.right),
        }
        for i, (name, own) in enumerate(zip(names, scores, strict=True))
        if i != best
    ]


def _origin(model: str | Path) -> str:
    """The model a lowbit output was made from, or the model itself."""
    if not (Path(model) / MANIFEST).exists():
        return str(model)
    origin = str(read_manifest(Path(model))["model"]["name"])
    try:
        open_checkpoint(origin)
    except InputError as error:
        raise InputError(
            f"{model} was made from {origin!r}, which is not here. Say where it is with --against."
        ) from error
    return origin


def _result(
    name: str, engine: Engine, own: Scores, truth: Scores, max_ppl_increase: float | None, max_kl: float | None
) -> dict[str, Any]:
    increase = own.perplexity / truth.perplexity - 1
    ratio = own.nll - truth.nll  # log of the perplexity ratio, window by window
    kl = float(own.kl.mean())
    between, spread = perplexity_ratio(own.nll, truth.nll), mean_interval(own.kl)
    limits = (
        ("perplexity_increase", increase, max_ppl_increase, between.low - 1, between.high - 1),
        ("kl", kl, max_kl, spread.low, spread.high),
    )
    return {
        "model": name,
        "runtime": engine.runtime,
        "perplexity": own.perplexity,
        "perplexity_increase": increase,
        "perplexity_increase_stderr": Scores.stderr(ratio) * math.exp(ratio.mean()),
        "perplexity_ratio": between.to_dict(),
        "kl": {"mean": kl, "stderr": Scores.stderr(own.kl), "interval": spread.to_dict()},
        "top1_agreement": float(own.agreement.mean()),
        "next_token_accuracy": float(own.right.mean()),
        "mcnemar": mcnemar(own.right, truth.right),
        "per_window": {"nll": own.nll.tolist(), "kl": own.kl.tolist()},
        "tasks": {},
        "gates": [
            _gate(name, gate, value, limit, low, high, len(own.kl))
            for gate, value, limit, low, high in limits
            if limit is not None
        ],
    }


def _gate(name: str, gate: str, value: float, limit: float, low: float, high: float, windows: int) -> dict[str, Any]:
    """Whether a limit is met; `decided` where the interval says the same. Warns how much text would decide it.

    Raises InputError where there is no interval at all: a single window.
    """
    if windows < 2:
        raise InputError(
            f"the text fills a single window, and one value has no interval, so {gate} cannot be held against a limit: "
            "give more text or lower --seq-len."
        )
    decided = not low <= limit <= high
    if not decided:
        needed = windows * ((high - low) / 2 / max(abs(value - limit), 1e-3 * limit, 1e-12)) ** 2
        note(
            f"warning: {name}: the text is too short to decide {gate}: {value:.4g}, 95 % interval {low:.4g} to "
            f"{high:.4g}, limit {limit:.4g}; about {needed:.0f} windows would, this text has {windows}."
        )
    return {
        "gate": gate, "limit": limit, "value": value, "met": value <= limit, "interval": {"low": low, "high": high},
        "decided": decided,
    }  # fmt: skip
