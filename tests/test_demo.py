"""The model and the text that come with the package, end to end."""

from pathlib import Path

import pytest

import lowbit

pytestmark = pytest.mark.model


@pytest.mark.parametrize("scheme", ["w4a16-g128", "w3a16-g128"])
def test_gptq_is_below_rtn_on_every_layer(tmp_path: Path, scheme: str) -> None:
    document = lowbit.quantize("demo", tmp_path / "out", scheme=scheme, samples=32, seq_len=256)
    assert len(document["layers"]) == 8 * 7
    assert not [r["name"] for r in document["layers"] if r["fallback"]]
    ratios = [r["loss"] / r["loss_rtn"] for r in document["layers"]]
    assert max(ratios) < 1
    assert sum(ratios) / len(ratios) < 0.7
