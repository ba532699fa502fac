"""Stored activation scales: chosen for the least error, written, read back, and the same after a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
from lowbit.activations import search_static_scale
from lowbit.artifact import Work
from lowbit.errors import InputError
from lowbit.model.checkpoint import open_checkpoint
from lowbit.model.stream import stream_logits
from lowbit.numerics import fake_quantize_activation
from lowbit.runtime.engine import load
from lowbit.scheme import TensorScheme

INT8, FP8 = TensorScheme("int", 8, "tensor"), TensorScheme("float", 8, "tensor")
TOKENS = torch.randint(3, 4096, (2, 48), generator=torch.Generator().manual_seed(5))


def quantize(model: Path, output: Path, text: Path, **words: Any) -> dict[str, Any]:
    return lowbit.quantize(model, output, **{"calibration": str(text), "samples": 16, "seq_len": 32} | words)


def error(x: torch.Tensor, scale: torch.Tensor, importance: torch.Tensor, grid: TensorScheme) -> float:
    return float(((x - fake_quantize_activation(x, grid, scale)).square() * importance).sum())


@pytest.mark.parametrize("grid", [INT8, FP8], ids=["int8", "fp8"])
def test_no_worse_than_the_largest_value_seen(grid: TensorScheme) -> None:
    x = torch.randn(512, 32, generator=torch.Generator().manual_seed(0))
    x[7, 3] = 40.0  # one wild value on a channel that no weight reads
    importance = torch.ones(32)
    importance[3] = 0
    scale = search_static_scale(x, float(x.abs().max()), importance, grid, torch.bfloat16)
    plain = torch.tensor([40.0 / grid.qmax])
    assert scale.dtype == torch.bfloat16
    assert error(x, scale, importance, grid) <= error(x, plain, importance, grid)
    if grid is INT8:
        assert error(x, scale, importance, grid) < 0.2 * error(x, plain, importance, grid)


def test_a_value_that_matters_is_not_cut_off() -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 10.0
    scale = search_static_scale(x, 10.0, torch.ones(32), INT8, torch.float32)
    assert float(scale) * 128 > 9.0


@pytest.mark.parametrize("scheme", ["w8a8-static", "fp8-static", "w4a8-g32", "w4afp8-g32"])
def test_written_streamed_and_run_alike(tiny_float32: Path, text_file: Path, tmp_path: Path, scheme: str) -> None:
    document = quantize(tiny_float32, tmp_path / "out", text_file, scheme=scheme)
    checkpoint = open_checkpoint(tmp_path / "out")
    scales = [n for n in checkpoint.tensors if n.endswith(".input_scale")]
    assert len(scales) == (14 if "static" in scheme else 0)
    streamed = stream_logits(checkpoint, TOKENS)
    for runtime in ("float32", "auto"):
        logits = load(tmp_path / "out", runtime).logits(TOKENS)  # type: ignore[arg-type]
        assert float((logits - streamed).norm() / streamed.norm()) < (1e-5 if runtime == "float32" else 0.15)
    original = stream_logits(open_checkpoint(tiny_float32), TOKENS)
    assert float((streamed - original).norm() / original.norm()) < (0.4 if "w4" in scheme else 0.2)
    assert document["bits_per_weight"] == pytest.approx({"w4a8-g32": 9, "w4afp8-g32": 5}.get(scheme, 8.5), abs=0.3)


def test_linears_of_one_input_share_its_scale(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    quantize(tiny, tmp_path / "out", text_file, scheme="w8a8-static", method="rtn")
    get = open_checkpoint(tmp_path / "out").get
    q, k, v, o = (get(f"model.layers.0.self_attn.{n}_proj.input_scale") for n in "qkvo")
    assert torch.equal(q, k)
    assert torch.equal(q, v)
    assert not torch.equal(q, o)


def test_interrupted_and_resumed(tiny: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = {"scheme": "w8a8-static", "method": "smoothquant+gptq"}
    quantize(tiny, tmp_path / "whole", text_file, **words)
    original = Work.write_report

    def interrupted(self: Work, *args: Any) -> None:
        original(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Work, "write_report", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize(tiny, tmp_path / "out", text_file, **words)
    quantize(tiny, tmp_path / "out", text_file, resume=True, **words)
    for file in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_static_scales_need_text(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a static scheme needs text to calibrate on"):
        lowbit.quantize(tiny, tmp_path / "out", scheme="w8a8-static", method="rtn")
