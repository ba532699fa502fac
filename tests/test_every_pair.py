"""Every method on every kind of scheme: it works, or it is refused before any work with a sentence that says why."""

from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
from lowbit.algorithms import EQUALIZATIONS, METHODS, ROTATIONS
from lowbit.errors import InputError
from lowbit.model.checkpoint import open_checkpoint
from lowbit.model.load import skeleton
from lowbit.model.stream import stream_logits
from lowbit.model.walk import find_blocks
from lowbit.preflight import make_plan
from lowbit.recipe import Recipe
from lowbit.scheme import PRESETS, Scheme

PREFIXES = ["", *(f"{r}+" for r in ROTATIONS), *(f"{e}+" for e in EQUALIZATIONS)]
PREFIXES += [f"{r}+{e}+" for r in ROTATIONS for e in EQUALIZATIONS]
INTEGERS = ["w2a16", "w3a16-asym", "w4a16", "w4a16-channel", "w4a16-tensor", "w8a16-g32"]
ROUNDED_INPUTS = ["w8a8", "w8a8-tensor", "w8a8-static", "w4a8", "w4afp8"]
MIDRISE, LEARNED, NF = ["w2a16-midrise"], ["any4", "any3", "any2"], ["nf4"]
FLOATS = [name for name in PRESETS if name[:2] in ("fp", "mx", "nv")]
LATTICES = [name for name in PRESETS if name.startswith("e8p")]
SCHEMES = [*INTEGERS, *ROUNDED_INPUTS, *MIDRISE, *LEARNED, *NF, *FLOATS, *LATTICES]
MOST_KL = {2: 2.5, 3: 0.6, 4: 0.2, 8: 0.02}
NOT_A_GRID_OF = "does not round to scheme"
# what each rounding cannot do, and what it says
REFUSED = {
    "rtn": dict.fromkeys(LATTICES, NOT_A_GRID_OF),
    "gptq": dict.fromkeys(LATTICES, NOT_A_GRID_OF),
    "signround": dict.fromkeys([*FLOATS, *LATTICES], NOT_A_GRID_OF),
    "any4": dict.fromkeys(set(SCHEMES) - set(LEARNED), NOT_A_GRID_OF),
    "quip": dict.fromkeys([*FLOATS, *LEARNED, *NF], NOT_A_GRID_OF)
    | dict.fromkeys(ROUNDED_INPUTS, "rotated basis, which is not the one whose inputs are rounded"),
}


@pytest.fixture(scope="module")
def model(make_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block, wide enough for groups and tiles of 128."""
    path = tmp_path_factory.mktemp("pairs") / "model"
    return make_llama(path, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_key_value_heads=4)


@pytest.mark.parametrize("rounding", METHODS)
def test_planned_or_refused_with_a_reason(model: Path, rounding: str) -> None:
    checkpoint = open_checkpoint(model)
    net = skeleton(checkpoint)
    blocks = find_blocks(net)
    for scheme in SCHEMES:
        for prefix in PREFIXES:
            recipe = Recipe(scheme, f"{prefix}{rounding}")
            reason = REFUSED[rounding].get(scheme)
            if reason is None:
                assert make_plan(net, blocks, checkpoint, recipe).schemes
            else:
                with pytest.raises(InputError, match=f"{reason}.*[uU]se --method"):
                    make_plan(net, blocks, checkpoint, recipe)


def quantized(model: Path, output: Path, text: Path, scheme: str, method: str) -> dict[str, Any]:
    settings = (("iterations", "4"),) if method.endswith("signround") else ()
    words = {"samples": 16, "seq_len": 32, "calibration": str(text), "set": settings, "force": True}
    return lowbit.quantize(model, output, scheme=scheme, method=method, **words)


def check(model: Path, output: Path, text: Path, scheme: str, method: str) -> None:
    """It runs, nothing falls back for want of statistics, and its answers are the original's, more or less."""
    document = quantized(model, output, text, scheme, method)
    layers = [r for r in document["layers"] if r["scheme"] != "none"]
    assert len(layers) == 7, (scheme, method)
    assert all(r["fallback"] is None or "worse than plain rtn" in r["fallback"] for r in layers), (scheme, method)
    tokens = torch.randint(0, 4096, (2, 32), generator=torch.Generator().manual_seed(0))
    truth, own = (stream_logits(open_checkpoint(p), tokens).log_softmax(-1) for p in (model, output))
    kl = float((truth.exp() * (truth - own)).sum(-1).mean())
    weight = Scheme.parse(scheme).weight
    assert weight is not None
    assert 0 < kl < MOST_KL[weight.bits], (scheme, method, kl)


@pytest.mark.parametrize("rounding", METHODS)
def test_every_planned_pair_runs(model: Path, text_file: Path, tmp_path: Path, rounding: str) -> None:
    for scheme in SCHEMES:
        if scheme not in REFUSED[rounding]:
            check(model, tmp_path / "q", text_file, scheme, rounding)


@pytest.mark.parametrize("prefix", PREFIXES[1:])
def test_every_preparation_goes_with_every_kind_of_rounding(
    model: Path, text_file: Path, tmp_path: Path, prefix: str
) -> None:
    pairs = {"rtn": "fp8-static", "gptq": "w8a8", "signround": "w4a16", "any4": "any4", "quip": "e8p2"}
    assert pairs.keys() == METHODS.keys()
    for rounding, scheme in pairs.items():
        check(model, tmp_path / "q", text_file, scheme, f"{prefix}{rounding}")
