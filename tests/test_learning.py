"""Learned rounding through the pipeline: what it claims, on tiny models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
from lowbit.errors import InputError
from lowbit.model.checkpoint import open_checkpoint
from lowbit.model.stream import stream_logits

SMALL = {"samples": 64, "seq_len": 64}


def distance(original: Path, quantized: Path) -> float:
    """Mean KL over random tokens."""
    tokens = torch.randint(0, 4096, (8, 64), generator=torch.Generator().manual_seed(3))
    truth, own = (stream_logits(open_checkpoint(p), tokens).log_softmax(-1) for p in (original, quantized))
    return float((truth.exp() * (truth - own)).sum(-1).mean())


def learned(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [r["learned"] for r in document["layers"] if r["scheme"] != "none"]


@pytest.mark.parametrize("scope", ["block", "model"])
@pytest.mark.parametrize("scheme", ["w3a16-g32", "w2a16-g64-midrise", "any3-g32"])
def test_the_loss_that_is_learned_falls(tiny: Path, text_file: Path, tmp_path: Path, scheme: str, scope: str) -> None:
    settings = (("scope", scope), ("iterations", "30"), ("batch_size", "4"))
    document = lowbit.quantize(
        tiny, tmp_path / "q", scheme=scheme, method="signround", calibration=str(text_file), set=settings, **SMALL
    )
    for report in learned(document):
        assert report["kept"], report
        assert report["loss_after"] < 0.97 * report["loss_before"], report
    lowbit.quantize(tiny, tmp_path / "g", scheme=scheme, method="gptq", calibration=str(text_file), **SMALL)
    assert distance(tiny, tmp_path / "q") < distance(tiny, tmp_path / "g")
