"""tune: quantize in several ways, measure each on the user's text and machine, recommend one, or none.

1. split the text: calibration, selection, confirmation (split.py)
2. quantize every candidate, calibrated on the first part only
3. accuracy of all on the other two, speed of all in turns with the original
4. decide (decide.py), and write tune.json and report.html
"""

import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import lowbit
from lowbit.accuracy import evaluate
from lowbit.artifact import check_output, disk_errors, write_json
from lowbit.calibration import read_documents, tokenize
from lowbit.console import note
from lowbit.environment import environment
from lowbit.errors import InputError, LowbitError, nearest
from lowbit.model.checkpoint import DEMO, open_checkpoint
from lowbit.model.load import load_tokenizer
from lowbit.pipeline import quantize
from lowbit.recipe import Recipe
from lowbit.report import write_report
from lowbit.runtime.engine import load
from lowbit.speed import bench
from lowbit.tuning.decide import OBJECTIVES, Limits, pareto, recommend, verdict
from lowbit.tuning.split import write_split

CANDIDATES = (("rtn", "w8a8"), ("gptq", "w8a8"), ("rtn", "w4a16"), ("gptq", "w4a16"))
SAMPLES, SEQ_LEN = 128, 512
_SAMPLE_TOKENS = 48


def tune(
    model: str | Path,
    output: str | Path,
    text: str | Path | None = None,
    *,
    max_ppl_increase: float = 0.01,
    max_memory: int | None = None,
    optimize: str = "tpot",
    repeats: int = 5,
    seed: int = 0,
    force: bool = False,
) -> dict[str, Any]:
    """The `tune` document: candidates with what was measured, the Pareto set and one recommendation.

    Everything goes under `output`: candidates/NAME (loadable), data/ (the split), tune.json, report.html.
    """
    output = Path(output).absolute()  # candidates are named by where they lie, wherever the user stands later
    if optimize not in OBJECTIVES:
        raise InputError(f"--optimize {optimize}: {nearest(optimize, OBJECTIVES)}")
    limits = Limits(max_ppl_increase, max_memory, optimize)
    check_output(output, resume=False, force=force)
    checkpoint = open_checkpoint(model)
    own_text = text
    if text is None:
        if checkpoint.path != DEMO / "model":
            raise InputError("tune measures on your own text: --text FILE (.txt or .jsonl).")
        text = DEMO / "evaluation.txt"
    tokenizer = load_tokenizer(checkpoint)
    documents = read_documents(Path(text), tokenizer)
    with disk_errors(output):
        if output.exists():
            shutil.rmtree(output)
        output.mkdir(parents=True)
        split = write_split(documents, seed, output / "data")
    tokens = {
        part: sum(len(tokenize(d, tokenizer)) for d in read_documents(getattr(split, part), tokenizer))
        for part in ("calibration", "selection", "confirmation")
    }
    window = min(SEQ_LEN, int(checkpoint.config.get("max_position_embeddings") or SEQ_LEN))
    if min(tokens.values()) < 2 * window:
        raise InputError(
            f"{text}: too short to split: {tokens} tokens, and each part needs two windows of {window} at least."
        )

    samples = min(SAMPLES, tokens["calibration"] // window)
    candidates = []
    for method, scheme in CANDIDATES:
        name = f"{scheme}-{method}"
        path = output / "candidates" / name
        candidate: dict[str, Any] = {"name": name, "scheme": scheme, "method": method, "path": str(path), "error": None}
        recipe = Recipe(
            scheme=scheme, method=method, calibration=str(split.calibration), samples=samples, seq_len=window, seed=seed
        )
        note(f"{name}:")
        try:
            candidate["quantize"] = quantize(model, path, recipe)
        except LowbitError as error:
            candidate["error"] = str(error)
        candidates.append(candidate)
    made = [c for c in candidates if not c["error"]]
    if not made:
        raise InputError(f"no candidate could be made: {candidates[0]['error']}")

    paths = [c["path"] for c in made]
    measured = {
        part: evaluate(paths, getattr(split, part), against=model, seq_len=window)
        for part in ("selection", "confirmation")
    }
    speed = bench(paths, against=model, repeats=repeats, seed=seed)
    for c, chosen, reported in zip(made, *(m["results"] for m in measured.values()), strict=True):
        c["selection"], c["evaluate"] = chosen, reported
        c["bench"] = next(r for r in speed["results"] if r["model"] == c["path"])
        c["ratio"] = next(r for r in speed["ratios"] if r["model"] == c["path"])
    for c in candidates:
        c["verdict"] = verdict(c, limits)

    confirmation = measured["confirmation"]
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
        "calibration_samples": samples,
        "windows": measured["confirmation"]["windows"],
        "limits": {"max_ppl_increase": max_ppl_increase, "max_memory": max_memory, "optimize": optimize},
        "split": {f"{part}_tokens": n for part, n in tokens.items()},
        "original": {
            "name": str(model),
            "evaluate": confirmation["reference"],
            "noise_floor": confirmation["noise_floor"],
            "bench": next(r for r in speed["results"] if r["model"] == str(model)),
        },
        "peak_bandwidth_bytes_per_s": speed["peak_bandwidth_bytes_per_s"],
        "candidates": candidates,
        "pareto": pareto(candidates),
        "recommendation": recommend(candidates, limits),
        "samples": _samples(str(model), made, split.confirmation, tokenizer),
    }
    with disk_errors(output):
        write_json(output / "tune.json", document)
        write_report(document, output / "report.html")
    return document


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


def summary(document: dict[str, Any]) -> str:
    """The table and the answer, for a terminal."""
    original = document["original"]
    rows = [
        [
            "original",
            f"{original['evaluate']['perplexity']:.3f}",
            "",
            "",
            f"{original['bench']['tpot_s']['median'] * 1e3:.2f} ms",
            "",
            f"{original['bench']['weight_bytes'] / 1e6:.1f} MB",
            "",
        ]
    ]
    for c in document["candidates"]:
        if c["error"]:
            rows.append([c["name"], "", "", "", "", "", "", c["verdict"]])
            continue
        e, b = c["evaluate"], c["bench"]
        rows.append(
            [
                c["name"],
                f"{e['perplexity']:.3f}",
                f"{e['perplexity_increase']:+.2%}",
                f"{e['kl']['mean']:.5f}",
                f"{b['tpot_s']['median'] * 1e3:.2f} ms",
                f"{c['ratio']['tpot']:.2f}x",
                f"{b['weight_bytes'] / 1e6:.1f} MB",
                c["verdict"],
            ]
        )
    headers = ["candidate", "perplexity", "increase", "KL", "TPOT", "speed-up", "weights", "verdict"]
    widths = [max(len(r[i]) for r in [headers, *rows]) for i in range(len(headers))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in [headers, *rows]]
    answer = document["recommendation"]
    head = "recommendation: do not quantize" if answer["name"] == "original" else f"recommendation: {answer['name']}"
    lines += ["", head, *(f"  {reason}" for reason in answer["reasons"])]
    return "\n".join([*lines, "", f"report: {Path(document['output']) / 'report.html'}"])
