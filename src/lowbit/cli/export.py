"""lowbit export"""

from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli.options import Json, Quiet, Seed, Verbose, begin, finish, megabytes, pairs


def export(
    model: Annotated[
        str, typer.Argument(help="A lowbit output, another quantized directory; for gguf, onnx and litert any model.")
    ],
    format: Annotated[str, typer.Option("--format", help="gguf, gptq, awq, modelopt, onnx or litert.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file (gguf, litert) or directory to make.")],
    type_: Annotated[
        str | None,
        typer.Option(
            "--type",
            metavar="q4_k_m",
            help="Full-precision models: a GGUF type; ONNX, LiteRT: int8, float.",
        ),
    ] = None,
    method: Annotated[str | None, typer.Option(help="GGUF: gptq (default) or search.")] = None,
    calibration: Annotated[
        str | None, typer.Option(metavar="FILE|hub:NAME", help="GGUF: text to calibrate on; images: pixel_values.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    override: Annotated[
        list[str] | None, typer.Option(metavar="GLOB=TYPE", help="GGUF: another type for these weights.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    seed: Seed = 0,
    json: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a model in another project's format: llama.cpp's GGUF, GPTQ, AWQ and ModelOpt directories, ONNX, LiteRT."""
    begin(quiet, verbose)
    from lowbit.exporting import Request
    from lowbit.exporting import export as run

    overrides = pairs(override, "--override", "GLOB=TYPE") if override else ()
    request = Request(type_, method, calibration, samples, seq_len, seed, overrides)
    document = run(model, output, format, request, force=force)
    finish("export", document, json, summary(document), seed)


def summary(document: dict[str, Any]) -> str:
    text = f"{document['output']}: {document['format']}, {megabytes(document['bytes'])}"
    if document["format"] in ("onnx", "litert"):
        engine = {"onnx": "ONNX Runtime", "litert": "LiteRT"}[document["format"]]
        agreement = document["agreement"]
        return (
            f"{text}, {document['type']}\n{engine} against lowbit, {agreement['positions']} positions: same largest "
            f"{agreement['top1_agreement']:.1%}, mean difference of log-probabilities "
            f"{agreement['mean_log_probability_difference']:.2g}"
        )
    if document["format"] != "gguf":
        return f"{text}, {document['linears']} linears; largest weight difference {document['largest_difference']:.2g}"
    text += f", {document['type']} ({document['method']})"
    layers = document["layers"]
    if document["bits_per_weight"] is not None:
        text += f", {document['bits_per_weight']:.3f} bits per weight of the quantized matrices"
    loss, plain = (sum(r[k] for r in layers if r[k] is not None) for k in ("loss", "loss_search"))
    if plain and document["method"] == "gptq":
        text += f"\noutput error {loss / plain:.0%} of the parameter search's"
    for r in layers:
        if r["fallback"]:
            text += f"\nfallback: {r['name']}: {r['fallback']}"
    return text
