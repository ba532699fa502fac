"""Which layers a finished quantization lost most in: each one's share of the KL divergence.

A small error δ at a linear's output costs, to second order and taking outputs one by one,

    KL ≈ ½ Σ_o E[(∂ log p / ∂ y_o)²] E[δ_o²]

(tuning/sensitivity.py). The curvature is the original model's, by its gradients on calibration text; the mean squared
error is what the manifest recorded for the layer in the original's units, so equalized and rotated models compare.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from lowbit.artifact import MANIFEST, read_manifest
from lowbit.errors import InputError
from lowbit.inspect import inspect
from lowbit.model.checkpoint import open_checkpoint
from lowbit.pipeline import find_calibration
from lowbit.recipe import Recipe, read_recipe
from lowbit.tuning.sensitivity import FISHER_WINDOWS, Subject, output_curvature


def diagnose(path: str | Path, against: str, text: str | None = None) -> dict[str, Any]:
    """The `inspect` document of a lowbit output, its layers with `kl` (expected, nats per token) and `kl_share` (of
    their sum), largest first. `against` is the original model; `text` replaces the calibration text.

    Raises InputError if `path` is no lowbit output, or was made without calibration text, or of another model.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if all(r["loss"] is None for r in manifest["layers"]):
        raise InputError(f"{path}: was made without calibration text, so no layer's output error is on record.")
    original = open_checkpoint(against)
    if original.digest != manifest["model"]["digest"]:
        raise InputError(f"--against {against}: not what {path} was made from ({manifest['model']['name']}).")
    recipe = Recipe(**read_recipe(path / MANIFEST))
    calibration = find_calibration(original, replace(recipe, calibration=text or recipe.calibration))
    assert calibration is not None, "there are losses, so there was text"
    names = {r["name"] for r in manifest["layers"]}
    subject = Subject(original, calibration.tokens[:FISHER_WINDOWS], lambda name: name in names)
    curvature = output_curvature(subject, FISHER_WINDOWS, recipe.seed)
    costs = {
        r["name"]: 0.5 * float(curvature[r["name"]].sum()) * r["loss"]
        for r in manifest["layers"]
        if r["loss"] is not None and r["name"] in curvature
    }
    total = sum(costs.values())
    layers = [
        r | {"kl": costs.get(r["name"]), "kl_share": costs.get(r["name"], 0.0) / total if total else 0.0}
        for r in manifest["layers"]
    ]
    return inspect(path) | {"expected_kl": total, "layers": sorted(layers, key=lambda r: -r["kl_share"])}
