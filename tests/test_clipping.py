"""Clipped ranges: counted, on record, on the screen, and in the exit code."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
from lowbit import cli, clipping
from lowbit.algorithms.rtn import rtn
from lowbit.clipping import clipped_inputs, clipped_weights
from lowbit.inspect import inspect
from lowbit.losses import Statistics
from lowbit.numerics import quantize
from lowbit.recipe import Recipe
from lowbit.rounding import round_linears
from lowbit.scheme import Scheme, TensorScheme
from lowbit.tensor import QuantizedTensor

SCHEMES = ["w4a16-g32", "w4a16-g32-asym", "w8a16-channel", "w2a16-g32", "w4a16-tensor", "fp8", "fp8-block", "nf4"]
SCHEMES += ["nvfp4", "mxfp4", "any4"]


def grid_of(text: str) -> TensorScheme:
    grid = Scheme.parse(text).weight
    assert grid is not None
    return grid


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s != "mxfp4"])  # powers of two clip about 1 %
def test_min_max_scales_clip_nothing(scheme: str) -> None:
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    assert clipped_weights(weight, rtn(weight, grid_of(scheme), torch.bfloat16)) == 0


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s not in ("nvfp4", "mxfp4")])  # scales in 8 bits
def test_a_scale_that_is_too_small_is_counted(scheme: str) -> None:
    """Of one value ten times as large as the scale allows in every 16, a sixteenth is clipped, whatever the sign."""
    grid = grid_of(scheme)
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    fine = rtn(weight, grid, torch.float32)
    wild = weight.clone()
    wild[:, ::16] = torch.where(torch.arange(128) % 2 == 0, 60.0, -60.0)[:, None]
    codes = quantize(wild, fine.scale, fine.zero_point, grid, fine.table)
    clipped = QuantizedTensor(codes, fine.scale, fine.zero_point, grid, fine.table)
    assert clipped_weights(wild, clipped) == pytest.approx(1 / 16)


def test_of_inputs_under_a_stored_scale() -> None:
    x = torch.linspace(-1, 1, 1001)[:, None]
    assert clipped_inputs(x, grid_of("w8a8"), torch.tensor([1 / 127])) == 0
    assert clipped_inputs(x, grid_of("w8a8"), torch.tensor([0.9 / 127])) == pytest.approx(0.1, abs=0.02)
    assert clipped_inputs(x, grid_of("fp8"), torch.tensor([0.5 / 448])) == pytest.approx(0.5, abs=0.05)


def blind(rows: int = 200, width: int = 64) -> Statistics:
    """Inputs of which every fifth column is nearly silent in the calibration text."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(2))
    x[:, ::5] *= 1e-4
    statistics = Statistics.empty(width)
    statistics.train.update(x[: rows // 2])
    statistics.held_out.update(x[rows // 2 :])
    return statistics


def test_weights_that_the_text_does_not_look_at_raise_the_alarm() -> None:
    """GPTQ's scales ignore large weights on silent inputs; that is right by the text, and has to be said."""
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(3)) * 0.1
    words: tuple[Any, ...] = (
        Scheme.parse("w4a16-g32"),
        blind(),
        Recipe(scheme="w4a16-g32", method="gptq"),
        torch.bfloat16,
    )
    calm = round_linears({"a": weight}, *words)["a"].report
    assert calm["alarm"] is None
    assert calm["clipped"] < 0.02
    weight[:, ::5] *= 10
    wild = round_linears({"a": weight}, *words)["a"].report
    assert wild["clipped"] > clipping.MOST_WEIGHTS
    assert "of its weights are clipped (the limit is 5%)" in wild["alarm"]
    simple = round_linears({"a": weight}, *words[:2], Recipe(scheme="w4a16-g32", method="rtn"), torch.bfloat16)["a"]
    assert simple.report["clipped"] < wild["clipped"]


def test_alarms_are_on_record_on_the_screen_and_exit_code_3(
    tiny: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(clipping, "MOST_WEIGHTS", -1.0)  # every linear is above it

    def run(*more: str) -> tuple[Any, str, str]:
        """(exit code, standard output, standard error) of the command."""
        monkeypatch.setattr(sys, "argv", ["lowbit", *words, *more])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    words = ["quantize", str(tiny), "-o", str(tmp_path / "out"), "--scheme", "w4a16-g32", "--method", "rtn"]
    words += ["--calibration", str(text_file), "--samples", "8", "--seq-len", "32"]
    code, out, error = run()
    assert code == 3
    assert "14 of 14 linears lost the ends of their ranges, the first is model.layers.0.self_attn.q_proj" in error
    assert out.count("alarm: model.layers.") == 14
    assert len(inspect(tmp_path / "out")["alarms"]) == 14
    assert run("--force", "--max-unreached", "100%")[0] == 0


def test_clipped_inputs_are_on_record(
    tiny: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words: dict[str, Any] = {"method": "rtn", "calibration": str(text_file), "samples": 8, "seq_len": 32}
    layers = lowbit.quantize(tiny, tmp_path / "calm", scheme="w8a8-static", **words)["layers"]
    assert all(r["alarm"] is None and 0 <= r["clipped_inputs"] <= clipping.MOST_INPUTS for r in layers)
    monkeypatch.setattr("lowbit.activations._FRACTIONS", (0.01,))
    layers = lowbit.quantize(tiny, tmp_path / "wild", scheme="w8a8-static", **words)["layers"]
    assert all("of its inputs are clipped (the limit is 1%)" in r["alarm"] for r in layers)
