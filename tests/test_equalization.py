"""Methods that equalize, through the whole pipeline, on a tiny random Llama and its twin with planted outliers."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.artifact import Work, read_manifest
from lowbit.errors import InputError
from lowbit.model.checkpoint import open_checkpoint
from lowbit.model.stream import stream_logits

Run = Callable[..., dict[str, Any]]
TOKENS = torch.randint(3, 4096, (2, 48), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="session")
def outliers(tiny_float32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with activations 64 times as large on two residual and two MLP channels: the same function."""
    path = tmp_path_factory.mktemp("models") / "outliers"
    shutil.copytree(tiny_float32, path)
    tensors = load_file(path / "model.safetensors")
    for i in (0, 1):
        at = f"model.layers.{i}."
        readers = {
            "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
        }
        for norm, names in readers.items():
            tensors[f"{at}{norm}.weight"][[5, 50]] *= 64
            for name in names:
                tensors[f"{at}{name}.weight"][:, [5, 50]] /= 64
        tensors[f"{at}mlp.up_proj.weight"][[7, 100]] *= 64
        tensors[f"{at}mlp.down_proj.weight"][:, [7, 100]] /= 64
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="session")
def run(tiny: Path, text_file: Path) -> Run:
    def run(output: Path, model: Path = tiny, **words: Any) -> dict[str, Any]:
        settings = {"scheme": "w4a16-g32", "calibration": str(text_file), "samples": 16, "seq_len": 32} | words
        return lowbit.quantize(model, output, **settings)

    return run


def model_bytes(path: Path) -> dict[str, bytes]:
    names = sorted(f.name for f in path.iterdir() if f.is_file() and f.name not in ("lowbit.json", "README.md"))
    return {name: (path / name).read_bytes() for name in names}


def error(path: Path, original: Path) -> float:
    """Mean squared difference of the logits, relative to their size."""
    a, b = (stream_logits(open_checkpoint(p), TOKENS) for p in (path, original))
    return float((a - b).square().mean() / b.square().mean())


def test_smoothquant_makes_w8a8_forget_planted_outliers(
    run: Run, outliers: Path, tiny_float32: Path, tmp_path: Path
) -> None:
    """With outliers RTN loses fifty times as much as SmoothQuant, which loses what it loses without outliers."""
    errors = {}
    for name, model, method in (
        ("rtn", outliers, "rtn"), ("smooth", outliers, "smoothquant"), ("clean", tiny_float32, "smoothquant")
    ):  # fmt: skip
        run(tmp_path / name, model, scheme="w8a8", method=method)
        errors[name] = error(tmp_path / name, model)
    assert errors["smooth"] < errors["rtn"] / 50
    assert errors["smooth"] < 1.2 * errors["clean"]


def test_awq_loses_less_than_rtn_at_four_bits(run: Run, outliers: Path, tmp_path: Path) -> None:
    for method in ("rtn", "awq", "awq+gptq"):
        run(tmp_path / method, outliers, method=method)
    rtn, awq, both = (error(tmp_path / m, outliers) for m in ("rtn", "awq", "awq+gptq"))
    assert awq < 0.7 * rtn
    assert both < awq


def test_the_manifest_says_what_was_scaled_and_by_whom(run: Run, outliers: Path, tmp_path: Path) -> None:
    document = run(tmp_path / "out", outliers, scheme="w8a8", method="smoothquant")
    producers = {r["name"].split(".", 3)[3]: r["equalization"]["producer"] for r in document["layers"]}
    assert producers == {
        "self_attn.q_proj": "input_layernorm",
        "self_attn.k_proj": "input_layernorm",
        "self_attn.v_proj": "input_layernorm",
        "self_attn.o_proj": "self_attn.v_proj",
        "mlp.gate_proj": "post_attention_layernorm",
        "mlp.up_proj": "post_attention_layernorm",
        "mlp.down_proj": "mlp.up_proj",
    }
    for report in document["layers"]:
        assert report["equalization"]["error"] <= report["equalization"]["error_identity"]
    assert read_manifest(tmp_path / "out")["recipe"]["method"] == "smoothquant"


def test_folded_norms_are_written_and_everything_outside_the_blocks_is_the_original(
    run: Run, outliers: Path, tmp_path: Path
) -> None:
    run(tmp_path / "out", outliers, scheme="w8a8", method="smoothquant")
    before, after = open_checkpoint(outliers), open_checkpoint(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(before.get(name), after.get(name))
    for norm in ("input_layernorm", "post_attention_layernorm"):
        a, b = (c.get(f"model.layers.1.{norm}.weight") for c in (before, after))
        assert float(a.abs().max() / a.abs().median()) > 20
        assert float(b.abs().max() / b.abs().median()) < 10


def test_losses_are_in_the_original_models_units(run: Run, outliers: Path, tmp_path: Path) -> None:
    """loss_rtn is RTN's on the unscaled weights: in the first block, the one that a plain RTN run reports."""
    plain = run(tmp_path / "rtn", outliers, scheme="w8a8", method="rtn", samples=16)
    smooth = run(tmp_path / "smooth", outliers, scheme="w8a8", method="smoothquant", samples=16)
    a, b = ({r["name"]: r["loss_rtn"] for r in d["layers"][:3]} for d in (plain, smooth))
    assert b == {name: pytest.approx(loss, rel=0.02) for name, loss in a.items()}


def test_a_layer_that_is_ignored_is_scaled_all_the_same(run: Run, tiny_float32: Path, tmp_path: Path) -> None:
    run(
        tmp_path / "out", tiny_float32, scheme="w8a8", method="smoothquant", ignore=("k_proj",), set=(("alpha", "0.5"),)
    )
    name = "model.layers.0.self_attn.k_proj.weight"
    before, after = (open_checkpoint(p).get(name) for p in (tiny_float32, tmp_path / "out"))
    assert not torch.equal(before, after)
    assert error(tmp_path / "out", tiny_float32) < 1e-3


@pytest.mark.parametrize(
    ("method", "scheme"), [("awq", "w4a16-g32-asym"), ("smoothquant+gptq", "w8a8"), ("awq+gptq", "w3a16-g32")]
)
def test_interrupted_and_resumed_to_the_same_bytes(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, scheme: str
) -> None:
    run(tmp_path / "whole", method=method, scheme=scheme, ignore=("k_proj",))
    original, count = Work.write_report, [0]

    def interrupted(self: Work, *args: Any) -> None:
        original(self, *args)
        count[0] += 1
        if count[0] == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Work, "write_report", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", method=method, scheme=scheme, ignore=("k_proj",))
    run(tmp_path / "out", method=method, scheme=scheme, ignore=("k_proj",), resume=True)
    assert model_bytes(tmp_path / "out") == model_bytes(tmp_path / "whole")


def test_what_cannot_be_proved_is_left_alone_and_reported(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowbit.model.fold._TOLERANCE", 0.0)  # float32 is not exact: nothing holds any more
    document = run(tmp_path / "out", method="awq")
    assert {r["equalization"]["producer"] for r in document["layers"]} == {None}
    assert {"no module that makes its input could be proved to take a scale"} == {
        r["equalization"]["reason"] for r in document["layers"]
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"method": "awq+smoothquant"}, "both choose the scale of the same channels"),
        ({"method": "awq", "calibration": None}, "method 'awq' needs text to calibrate on"),
        ({"method": "smoothquant", "set": (("alpha", "2"),)}, "alpha=2: expected 'auto' or a number from 0 to 1"),
        ({"method": "gptq", "set": (("alpha", "0.5"),)}, "method 'gptq' has no setting 'alpha'"),
    ],
)
def test_requests_that_are_refused(run: Run, tmp_path: Path, words: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(tmp_path / "out", **words)
    assert not list(tmp_path.iterdir())
