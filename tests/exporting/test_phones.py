"""Encoders and image classifiers for phones: ONNX and LiteRT, float and int8, run by their own engines.

The heavy ones need packages that the ordinary test run does not have: `make interop-onnx`, `make interop-litert`.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import save_file

import lowbit
from lowbit.errors import InputError
from lowbit.exporting import export

HAS = {name: importlib.util.find_spec(name) is not None for name in ("onnx", "onnxscript", "litert_torch")}
needs_onnxscript = pytest.mark.skipif(not HAS["onnxscript"], reason="make interop-onnx")
needs_litert = pytest.mark.skipif(not HAS["litert_torch"], reason="make interop-litert")
SIZE = 64


@pytest.fixture(scope="module")
def encoders() -> Iterator[ModuleType]:
    """The benchmark of such models, which makes them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
        yield importlib.import_module("encoders")


@pytest.fixture(scope="module")
def mobilenet(encoders: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random MobileNetV2 whose classes differ from image to image."""
    path = tmp_path_factory.mktemp("mobilenet") / "model"
    encoders.mobilenet(SIZE, depth_multiplier=0.35, num_labels=10).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pixels(encoders: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "images.safetensors"
    save_file({"pixel_values": encoders.images(32, SIZE, seed=12)}, path)
    return path


def check_static(whole: dict[str, Any], small: dict[str, Any]) -> None:
    assert whole["agreement"]["positions"] == 1
    assert whole["agreement"]["mean_log_probability_difference"] < 1e-4
    assert small["agreement"]["positions"] == 32
    assert small["agreement"]["top1_agreement"] >= 0.8
    assert small["bytes"] < 0.5 * whole["bytes"]


@pytest.mark.interop_heavy
@needs_onnxscript
def test_images_as_onnx(mobilenet: Path, pixels: Path, tmp_path: Path) -> None:
    """Static int8 with calibration: the codes are in the file, and nearly all images keep their class."""
    import onnx

    whole = export(mobilenet, tmp_path / "float", "onnx", type="float")
    small = export(mobilenet, tmp_path / "int8", "onnx", calibration=str(pixels))
    check_static(whole, small)
    graph = onnx.load(tmp_path / "int8" / "model.onnx").graph
    codes = {t.name for t in graph.initializer if t.data_type == onnx.TensorProto.INT8}
    read = {n.input[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    products = [n for n in graph.node if n.op_type == "Conv"]
    assert len(products) > 30
    assert len(codes & read) >= len(products)


@pytest.mark.interop_heavy
@needs_litert
def test_images_as_litert(mobilenet: Path, pixels: Path, tmp_path: Path) -> None:
    whole = export(mobilenet, tmp_path / "float.tflite", "litert", type="float")
    small = export(mobilenet, tmp_path / "int8.tflite", "litert", calibration=str(pixels))
    check_static(whole, small)


@pytest.mark.interop_heavy
@needs_litert
def test_texts_as_litert(encoders: ModuleType, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    model = encoders.bert(tmp_path / "bert", vocab_size=4096, **sizes)
    whole = export(model, tmp_path / "float.tflite", "litert", type="float", seq_len=32)
    small = export(model, tmp_path / "int8.tflite", "litert", seq_len=32)
    assert whole["inputs"] == {"input_ids": [1, 32], "attention_mask": [1, 32]}
    assert whole["agreement"]["mean_log_probability_difference"] < 1e-4
    assert small["agreement"]["mean_log_probability_difference"] < 0.1
    assert small["bytes"] < 0.4 * whole["bytes"]


@pytest.mark.interop_heavy
@needs_litert
def test_bert_base_as_litert(encoders: ModuleType, tmp_path: Path) -> None:
    """417.7 MB (of 2^20 bytes) in float32, at most 173 in dynamic int8."""
    small = export(encoders.bert(tmp_path / "bert"), tmp_path / "int8.tflite", "litert", seq_len=128)
    assert small["bytes"] <= 173e6
    assert small["agreement"]["mean_log_probability_difference"] < 0.1


def test_what_litert_cannot_take_is_refused(
    tiny: Path, mobilenet: Path, pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ai_edge_quantizer", None)
    with pytest.raises(InputError, match=r"pip install 'lowbit\[litert\]'"):
        export(mobilenet, tmp_path / "out.tflite", "litert", calibration=str(pixels))
    monkeypatch.setattr("lowbit.exporting.litert.require_litert", lambda: None)
    for model, words, message in (
        (tiny, {}, "Formats for it: onnx, gguf"),
        (tiny, {"type": "int4"}, "Did you mean int8"),
        (tiny, {"method": "gptq"}, "no --method"),
        (mobilenet, {}, "found on examples"),
        (mobilenet, {"calibration": str(tmp_path / "absent")}, "Expected a safetensors file"),
    ):
        with pytest.raises(InputError, match=message):
            export(model, tmp_path / "out.tflite", "litert", **words)
    lowbit.quantize(tiny, tmp_path / "q", scheme="w4a16-g32", method="rtn")
    with pytest.raises(InputError, match="Formats that can: gguf, gptq, awq, onnx"):
        export(tmp_path / "q", tmp_path / "out.tflite", "litert")
    (tmp_path / "out.tflite").write_text("mine")
    with pytest.raises(InputError, match="--force"):
        export(mobilenet, tmp_path / "out.tflite", "litert", calibration=str(pixels))
    assert (tmp_path / "out.tflite").read_text() == "mine"


@pytest.mark.skipif(not HAS["onnx"], reason="make interop-onnx")
def test_images_that_do_not_fit_are_refused(
    encoders: ModuleType, mobilenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"onnxscript.*pip install 'lowbit\[onnx\]'"):
        export(mobilenet, tmp_path / "out", "onnx", type="float")
    monkeypatch.setattr("lowbit.exporting.onnx.require_onnxscript", lambda: None)
    file, images = tmp_path / "images.safetensors", encoders.images(1, SIZE, seed=0)
    for tensors in (
        {"pixels": images},
        {"pixel_values": images[:, :, 1:]},
        {"pixel_values": images.int()},
        {"pixel_values": images / 0},
    ):
        save_file({n: t.contiguous() for n, t in tensors.items()}, file)
        with pytest.raises(InputError, match=r"images\.safetensors"):
            export(mobilenet, tmp_path / "out", "onnx", calibration=str(file))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match=r"images\.safetensors"):
        export(mobilenet, tmp_path / "out", "onnx", calibration=str(file))
    assert not list(tmp_path.glob("out*"))
