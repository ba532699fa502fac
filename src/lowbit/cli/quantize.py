"""lowbit quantize"""

from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli.options import Json, Quiet, Verbose, begin, finish, megabytes
from lowbit.errors import InputError


def quantize(
    model: Annotated[str, typer.Argument(help="A Hugging Face directory, a hub id, or 'demo'.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to make.")],
    scheme: Annotated[str | None, typer.Option(help="What to store: w4a16, w3a16-g64-asym, w8a8, fp8, ...")] = None,
    method: Annotated[
        str | None, typer.Option(help="rtn, gptq, awq, smoothquant, awq+gptq, hadamard+gptq, ...")
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
    resume: Annotated[bool, typer.Option("--resume", help="Finish an interrupted run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    json: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Store a model's linear layers in fewer bits."""
    begin(quiet, verbose)
    from lowbit.pipeline import quantize as run
    from lowbit.recipe import Recipe, read_recipe

    if resume and force:
        raise InputError("--resume finishes an interrupted run and --force throws it away: give one of them.")
    words: dict[str, Any] = read_recipe(recipe) if recipe else {}
    given = {
        "scheme": scheme,
        "method": method,
        "calibration": calibration,
        "samples": samples,
        "seq_len": seq_len,
        "seed": seed,
        "ignore": tuple(ignore) if ignore else None,
        "override": _pairs(override, "--override", "GLOB=SCHEME") if override else None,
        "set": _pairs(set_, "--set", "KEY=VALUE") if set_ else None,
    }
    words |= {k: v for k, v in given.items() if v is not None}
    whole = Recipe(**words)
    document = run(model, output, whole, resume=resume, force=force)
    finish("quantize", document, json, summary(document), whole.seed)


def _pairs(items: list[str], option: str, form: str) -> tuple[tuple[str, str], ...]:
    pairs = []
    for item in items:
        key, equals, value = item.partition("=")
        if not (key and equals and value):
            raise InputError(f"{option} {item}: expected {form}.")
        pairs.append((key, value))
    return tuple(pairs)


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
    for r in fallbacks:
        text += f"\nfallback: {r['name']}: {r['fallback']}"
    return text
