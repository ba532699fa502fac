"""inspect and verify: what a directory is, and whether it still is what was made."""

from pathlib import Path
from typing import Any

import torch

from lowbit.artifact import MANIFEST, file_hashes, read_manifest
from lowbit.errors import InputError
from lowbit.formats.kv_cache import scheme_of
from lowbit.model.checkpoint import open_checkpoint
from lowbit.model.load import open_source, skeleton, stored_kv_cache
from lowbit.model.stream import last_logits
from lowbit.model.walk import find_blocks, linears

LOGIT_TOLERANCE = 1e-3  # the same weights on another CPU or thread count differ in the last float32 bits only


def inspect(path: str | Path) -> dict[str, Any]:
    """The `inspect` document: architecture, sizes, schemes; for a lowbit output the layers' losses, worst first."""
    checkpoint = open_checkpoint(path)
    model = skeleton(checkpoint)
    source = open_source(model, checkpoint)
    blocks = find_blocks(model)
    cache = scheme_of(checkpoint.config)
    schemes: dict[str, int] = {}
    for scheme in source.schemes.values():
        schemes[str(scheme)] = schemes.get(str(scheme), 0) + 1
    document: dict[str, Any] = {
        "model": checkpoint.name,
        "architecture": (checkpoint.config.get("architectures") or [checkpoint.config.get("model_type")])[0],
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": checkpoint.nbytes,
        "shards": len(checkpoint.shards),
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "blocks": len(blocks.names),
        "linears": len(linears(model)),
        "schemes": schemes,
        "kv_cache": None if cache is None else str(cache),
    }
    if (checkpoint.path / MANIFEST).exists():
        manifest = read_manifest(checkpoint.path)
        layers = manifest["layers"]
        document |= {
            "made_from": manifest["model"]["name"],
            "recipe": manifest["recipe"],
            "bits_per_weight": manifest["summary"]["bits_per_weight"],
            "layers": sorted(layers, key=lambda r: -(r.get("relative_error") or 0)),
            "fallbacks": [r["name"] for r in layers if r["fallback"]],
            "alarms": [f"{r['name']}: {r['alarm']}" for r in layers if r.get("alarm")],
        }
    return document


def verify(path: str | Path) -> dict[str, Any]:
    """The `verify` document: each check of a lowbit output with its outcome; `ok` is all of them.

    Files against their hashes, headers against config and scheme, and the recorded logits computed anew from disk.
    Raises InputError if `path` is not a lowbit output at all.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such directory.")
    manifest = read_manifest(path)
    checks: list[dict[str, Any]] = []

    def check(name: str, problem: str | None) -> None:
        checks.append({"check": name, "ok": problem is None, "problem": problem})

    now = file_hashes(path)
    changed = sorted(f for f, h in manifest["files"].items() if now.get(f, h) != h)
    missing = sorted(set(manifest["files"]) - set(now))
    added = sorted(set(now) - set(manifest["files"]))
    check("files are complete", f"missing: {', '.join(missing)}" if missing else None)
    check("files are unchanged", f"changed: {', '.join(changed)}" if changed else None)
    check("no file was added", f"not in the manifest: {', '.join(added)}" if added else None)
    try:
        checkpoint = open_checkpoint(path)
        net = skeleton(checkpoint)
        source = open_source(net, checkpoint)
        stored_kv_cache(net, source)
        expected = {r["name"] for r in manifest["layers"]}
        gone = sorted(expected - set(source.schemes))
        check("every quantized layer is there", f"not quantized in the files: {', '.join(gone[:5])}" if gone else None)
        check("it computes the recorded logits", _logits_problem(checkpoint, manifest["fingerprint"]))
    except InputError as error:
        check("it loads", str(error))
    return {"model": str(path), "ok": all(c["ok"] for c in checks), "checks": checks}


def _logits_problem(checkpoint: Any, fingerprint: dict[str, Any]) -> str | None:
    logits = last_logits(checkpoint, fingerprint["prompt"])
    recorded = torch.tensor(fingerprint["logits"])
    difference = float((logits[fingerprint["tokens"]] - recorded).abs().max())
    scale = float(recorded.abs().max())
    if difference <= LOGIT_TOLERANCE * max(scale, 1.0):
        return None
    return f"largest difference {difference:.3g} on logits of size {scale:.3g}"
