"""Learned rounding through the pipeline: what it claims, on tiny models."""

from pathlib import Path
from typing import Any

import pytest

import lowbit

SMALL = {"samples": 64, "seq_len": 64}


def learned(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [r["learned"] for r in document["layers"] if r["scheme"] != "none"]


@pytest.mark.parametrize("scope", ["block", "model"])
@pytest.mark.parametrize("scheme", ["w3a16-g32", "w2a16-g64-midrise"])
def test_the_loss_that_is_learned_falls(tiny: Path, text_file: Path, tmp_path: Path, scheme: str, scope: str) -> None:
    settings = (("scope", scope), ("iterations", "30"), ("batch_size", "4"))
    document = lowbit.quantize(
        tiny, tmp_path / "q", scheme=scheme, method="signround", calibration=str(text_file), set=settings, **SMALL
    )
    reports = [report for report in learned(document) if report["kept"]]
    assert reports
    ratios = {report["loss_after"] / report["loss_before"] for report in reports}  # one for each scope
    assert max(ratios) < 1
    assert sum(ratios) / len(ratios) < 0.97, ratios  # which block gains how much depends on the machine's rounding


@pytest.mark.parametrize("scope", ["block", "model"])
def test_what_is_no_better_is_not_kept(tiny: Path, text_file: Path, tmp_path: Path, scope: str) -> None:
    """Steps of several codes only do harm: the result is gptq's, to the last bit, and the report says so."""
    words = {"scheme": "w3a16-g32", "calibration": str(text_file), "samples": 8, "seq_len": 32}
    settings = (("scope", scope), ("iterations", "2"), ("rate", "9"))
    document = lowbit.quantize(tiny, tmp_path / "q", method="signround", set=settings, **words)
    assert all(not r["kept"] and r["loss_after"] > r["loss_before"] for r in learned(document))
    lowbit.quantize(tiny, tmp_path / "g", method="gptq", **words)
    for file in (tmp_path / "g").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "q" / file.name).read_bytes()
