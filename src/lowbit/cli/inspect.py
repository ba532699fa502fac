"""lowbit inspect, lowbit verify, lowbit doctor"""

from typing import Annotated, Any

import typer

from lowbit.cli.options import Json, Quiet, Trust, Verbose, begin, finish, megabytes, table
from lowbit.errors import InputError, QualityGateError

_WORST = 10


def inspect(
    path: Annotated[str, typer.Argument(help="A model directory, hub id or 'demo'.")],
    against: Annotated[
        str | None, typer.Option(metavar="ORIGINAL", help="Of a lowbit output: each layer's share of the KL.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Text for --against (default: the calibration text).")] = None,
    trust_remote_code: Trust = False,
    json: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show what a model is made of, and which layers lost most."""
    begin(quiet, verbose, trust_remote_code)
    if text is not None and against is None:
        raise InputError("--text is for --against ORIGINAL: without it no text is read.")
    if against is not None:
        from lowbit.tuning.diagnosis import diagnose

        document = diagnose(path, against, text)
    else:
        from lowbit.inspect import inspect as run

        document = run(path)
    finish("inspect", document, json, _inspection(document, len(document.get("layers", [])) if verbose else _WORST))


def _inspection(document: dict[str, Any], shown: int) -> str:
    files = f"{document['shards']} file{'s' * (document['shards'] != 1)}"
    lines = [
        f"{document['model']}: {document['architecture']}, {document['parameters'] / 1e6:.1f} M parameters, "
        f"{document['blocks']} blocks, {document['linears']} linears",
        f"{megabytes(document['bytes'])} in {files}, {document['dtype']}; "
        + (", ".join(f"{n} linears {s}" for s, n in document["schemes"].items()) or "not quantized")
        + (f"; key-value cache {document['kv_cache']}" if document["kv_cache"] else ""),
    ]
    if "layers" in document:
        recipe = document["recipe"]
        lines.append(
            f"made from {document['made_from']} by {recipe['method']} {recipe['scheme']}, "
            f"{document['bits_per_weight']:.3f} bits per weight, {len(document['fallbacks'])} fallbacks"
        )
        shares = "expected_kl" in document
        if shares:
            lines.append(f"expected KL {document['expected_kl']:.5f}, to second order")
        rows = [
            [
                r["name"],
                r["scheme"],
                *([f"{r['kl_share']:.1%}"] if shares else []),
                "" if r.get("relative_error") is None else f"{r['relative_error']:.2%}",
                "" if not r["loss_rtn"] else f"{r['loss'] / r['loss_rtn']:.0%}",
                r["fallback"] or (f"repaired: {r['repair']}" if r.get("repair") else ""),
            ]
            for r in document["layers"][:shown]
        ]
        heading = ["largest share of the KL", "scheme", "share"] if shares else ["largest relative error", "scheme"]
        lines.append(table([*heading, "error", "of rtn's", "fallback"], rows))
    return "\n".join(lines)


def verify(
    path: Annotated[str, typer.Argument(help="A lowbit output directory.")],
    trust_remote_code: Trust = False,
    json: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Prove that a directory is still what was made: hashes, shapes, and the recorded logits computed again."""
    begin(quiet, verbose, trust_remote_code)
    from lowbit.inspect import verify as run

    document = run(path)
    lines = [f"{'ok  ' if c['ok'] else 'FAIL'} {c['check']}" + (f": {c['problem']}" if c["problem"] else "")
             for c in document["checks"]]  # fmt: skip
    finish("verify", document, json, "\n".join(lines))
    if not document["ok"]:
        raise QualityGateError(f"{path}: not what was made. Quantize again, or get a clean copy.")


def doctor(json: Json = None, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Show what this machine has for low-bit models, and what to do about what is missing."""
    begin(quiet, verbose)
    from lowbit.doctor import doctor as run

    d = run()
    e = d["environment"]
    lines = [
        f"CPU        {e['cpu']}, {e['cores']} cores, torch uses {e['threads']} threads",
        "has        " + ", ".join(k for k, v in d["instruction_sets"].items() if v),
        f"memory     {megabytes(d['memory_bytes'])}, read at {d['peak_bandwidth_bytes_per_s'] / 1e9:.1f} GB/s",
        f"GPU        {e['gpu'] or 'none'}",
        f"software   Python {e['python']}, torch {e['torch']}, transformers {e['transformers']}",
        *(f"kernel     {scheme}: {kernel}" for scheme, kernel in d["kernels"].items()),
        *(f"extra      {name}: {version or 'not installed'}" for name, version in d["extras"].items()),
        *(f"advice     {line}" for line in d["advice"]),
    ]
    finish("doctor", d, json, "\n".join(lines))
