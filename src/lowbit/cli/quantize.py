"""lowbit quantize"""

from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli.options import Json, Quiet, Trust, Verbose, begin, finish, megabytes, pairs, percent, size
from lowbit.errors import InputError, QualityGateError


def quantize(
    model: Annotated[str, typer.Argument(help="A Hugging Face directory, a hub id, or 'demo'.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to make.")],
    scheme: Annotated[
        str | None, typer.Option(help="What to store: w4a16, w3a16-g64-asym, w8a8, fp8, auto:3.5, ...")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="rtn, gptq, any4, quip, awq, smoothquant, hadamard, or joined: awq+gptq.")
    ] = None,
    kv: Annotated[
        str | None,
        typer.Option("--kv", metavar="fp8|int8|int4", help="Cache keys and values so, with calibrated scales."),
    ] = None,
    calibration: Annotated[str | None, typer.Option(metavar="FILE|hub:NAME", help="Text to calibrate on.")] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows (default 128).")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens a window (default 512).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.", min=0, max=2**32 - 1)] = None,
    ignore: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Leave these linears alone.")] = None,
    override: Annotated[
        list[str] | None, typer.Option(metavar="GLOB=SCHEME", help="Another scheme for these linears.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="A YAML file with these words, or a lowbit.json.")] = None,
    max_unreached: Annotated[
        str,
        typer.Option(metavar="10%", help="Exit 3 if more linears got no usable calibration data or were clipped."),
    ] = "10%",
    repair: Annotated[
        bool, typer.Option("--repair", help="Try linears that lost too much again: damping, zero points, more bits.")
    ] = False,
    repair_target: Annotated[str, typer.Option(metavar="10%", help="The relative output error to repair to.")] = "10%",
    max_memory: Annotated[
        str | None, typer.Option(metavar="4GB", help="Memory to stay under (default: what is available).")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Processes that round weights (default: one a core); no effect on the result.", min=1
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Predict memory, disk and time; write nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Finish an interrupted run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    trust_remote_code: Trust = False,
    json: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Store a model's linear layers in fewer bits."""
    begin(quiet, verbose, trust_remote_code)
    limit = percent(max_unreached, "--max-unreached")
    from lowbit.recipe import read_recipe

    if resume and force:
        raise InputError("--resume finishes an interrupted run and --force throws it away: give one of them.")
    words: dict[str, Any] = read_recipe(recipe) if recipe else {}
    given = {
        "scheme": scheme,
        "method": method,
        "kv": kv,
        "calibration": calibration,
        "samples": samples,
        "seq_len": seq_len,
        "seed": seed,
        "ignore": tuple(ignore) if ignore else None,
        "override": pairs(override, "--override", "GLOB=SCHEME") if override else None,
        "set": pairs(set_, "--set", "KEY=VALUE") if set_ else None,
        "repair": percent(repair_target, "--repair-target") if repair else None,
    }
    words |= {k: v for k, v in given.items() if v is not None}
    how: dict[str, Any] = {"resume": resume, "force": force, "dry_run": dry_run, "workers": workers}
    if str(words.get("scheme")).startswith("auto:"):
        from lowbit.tuning.mixed import quantize as run
    else:  # without what a search needs: a second, and memory
        from lowbit.pipeline import quantize as run
    document = run(model, output, max_memory=size(max_memory, "--max-memory"), **how, **words)
    if dry_run:
        finish("quantize", document, json, prediction(document["predicted"]), words.get("seed", 0))
        return
    finish("quantize", document, json, summary(document), words.get("seed", 0))
    _check_reached(document, limit)


def _check_reached(document: dict[str, Any], limit: float | None) -> None:
    """Raise QualityGateError if calibration missed too much of the model."""
    from lowbit.rounding import WORSE

    output, alarms = document["output"], (document.get("kv_cache") or {}).get("alarms", [])
    if alarms and limit is not None and limit < 1:
        raise QualityGateError(
            f"{output}: {len(alarms)} scales of the key-value cache are 1.0, because calibration did not reach them; "
            f"the first: {alarms[0]}. What was made stays. Give more or broader --calibration text, or accept it with "
            "--max-unreached 100%."
        )
    layers = document["layers"]
    starved = [r["name"] for r in layers if r["fallback"] and WORSE not in r["fallback"]]
    clipped = [r["name"] for r in layers if r.get("alarm") and r["name"] not in starved]
    share = len(starved) / max(len(layers), 1)
    if limit is not None and share > limit:
        raise QualityGateError(
            f"{output}: {len(starved)} of {len(layers)} linears ({share:.0%}, the limit is {limit:.0%}) "
            f"had no usable calibration data and are round-to-nearest, the first is {starved[0]}. What was made stays. "
            "Give more or broader --calibration text (--samples), or accept it with a higher --max-unreached."
        )
    share = (len(starved) + len(clipped)) / max(len(layers), 1)
    if limit is not None and share > limit:
        raise QualityGateError(
            f"{output}: {len(clipped)} of {len(layers)} linears lost the ends of their ranges, the first is "
            f"{clipped[0]}, and {len(starved)} had no usable calibration data ({share:.0%} together, the limit is "
            f"{limit:.0%}). What was made stays. Calibrate on broader text, choose smaller groups or zero points "
            "(-asym), or accept it with a higher --max-unreached."
        )


def prediction(predicted: dict[str, Any]) -> str:
    return (
        f"would take about {predicted['seconds']:.0f} s, peak memory {megabytes(predicted['peak_memory_bytes'])} "
        f"(activations in {'memory' if predicted['activations'] == 'memory' else 'a file'}), "
        f"output {megabytes(predicted['output_bytes'])}"
    )


def summary(document: dict[str, Any]) -> str:
    layers = document["layers"]
    loss, plain = (sum(r[k] for r in layers if r[k] is not None) for k in ("loss", "loss_rtn"))
    fallbacks = [r for r in layers if r["fallback"]]
    text = (
        f"{document['output']}: {document['scheme']} by {document['method']}, {len(layers)} linears, "
        f"{document['bits_per_weight']:.3f} bits per weight, {document['seconds']:.1f} s, "
        f"peak memory {megabytes(document['peak_memory_bytes'])}"
    )
    if plain:
        text += f"\noutput error {loss / plain:.0%} of round-to-nearest's"
    if "allocation" in document:
        text += (
            f"\nexpected KL {document['allocation']['expected_kl']:.5f}; choices: {document['output']}/allocation.json"
        )
    cache = document.get("kv_cache")
    if cache is not None:
        text += f"\nkey-value cache in {cache['scheme']}" + "".join(f"\nalarm: {a}" for a in cache["alarms"])
    repaired = [r for r in layers if r.get("repair")]
    for r in repaired:
        text += f"\nrepaired: {r['name']}: {r['repair']}, relative error {r['relative_error']:.1%}"
    for r in layers:
        text += f"\nalarm: {r['name']}: {r['alarm']}" if r.get("alarm") else ""
    for r in fallbacks:
        text += f"\nfallback: {r['name']}: {r['fallback']}"
    return text
