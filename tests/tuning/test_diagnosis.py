"""inspect --against: each layer's share of the KL, from curvature and recorded errors."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

import lowbit
from lowbit.artifact import read_manifest
from lowbit.errors import InputError
from lowbit.model.checkpoint import open_checkpoint
from lowbit.model.load import open_source, skeleton
from lowbit.pipeline import find_calibration
from lowbit.tuning.diagnosis import diagnose
from lowbit.tuning.sensitivity import Subject, direct

WORDS = {"scheme": "w3a16-g32", "samples": 16, "seq_len": 64}


@pytest.fixture(scope="module")
def made(tiny: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 3-bit output whose last block is far worse than its first."""
    out = tmp_path_factory.mktemp("diagnosis") / "out"
    lowbit.quantize(tiny, out, calibration=str(text_file), override=(("layers.0.*", "w8a16-g32"),), **WORDS)
    return out


def test_shares_add_up_and_blame_the_lossy_block(made: Path, tiny: Path) -> None:
    document = diagnose(made, str(tiny))
    layers = document["layers"]
    assert len(layers) == len(read_manifest(made)["layers"]) == 14
    assert sum(r["kl_share"] for r in layers) == pytest.approx(1)
    shares = [r["kl_share"] for r in layers]
    assert shares == sorted(shares, reverse=True)
    assert sum(r["kl_share"] for r in layers if ".layers.0." in r["name"]) < 0.05


def test_the_order_is_that_of_the_kl_of_one_layer_at_a_time(made: Path, tiny: Path, text_file: Path) -> None:
    """Against the KL measured with one input group's weights replaced, all others left."""
    document = diagnose(made, str(tiny), str(text_file))
    costs = {r["name"]: r["kl"] for r in document["layers"]}
    original, quantized = open_checkpoint(tiny), open_checkpoint(made)
    tokens = find_calibration(original, lowbit.Recipe(calibration=str(text_file), **WORDS)).tokens
    subject = Subject(original, tokens)
    source = open_source(skeleton(quantized), quantized)
    changes = [
        {n: source.linear(n).dequantize() - original.get(f"{n}.weight").float() for n in group.names}
        for group in subject.groups
    ]
    measured = direct(subject, changes)
    expected = np.array([sum(costs[n] for n in group.names) for group in subject.groups])
    assert spearmanr(measured, expected).statistic > 0.8
    assert 0.3 < expected.sum() / measured.sum() < 3


def test_what_cannot_be_diagnosed(made: Path, tiny: Path, tiny_float32: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not what .* was made from"):
        diagnose(made, str(tiny_float32))
    with pytest.raises(InputError, match=r"there is no lowbit\.json"):
        diagnose(tiny, str(tiny))
    lowbit.quantize(tiny, tmp_path / "rtn", scheme="w4a16-g32", method="rtn")
    with pytest.raises(InputError, match="was made without calibration text"):
        diagnose(tmp_path / "rtn", str(tiny))
