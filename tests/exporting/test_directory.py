"""Export to GPTQ, AWQ and ModelOpt directories: exact, readable by a second naive reader, refused where impossible."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.errors import InputError
from lowbit.exporting import export
from lowbit.formats import awq, gptq
from lowbit.model.checkpoint import open_checkpoint
from lowbit.model.load import open_source, skeleton
from lowbit.runtime.engine import load
from lowbit.scheme import Scheme
from lowbit.tensor import QuantizedTensor

TOKENS = torch.arange(5, 45)[None]
NAME = "model.layers.1.mlp.down_proj"


def quantized(model: Path, scheme: str, target: Path) -> Path:
    lowbit.quantize(model, target, scheme=scheme, method="rtn")
    return target


def logits(model: Path) -> torch.Tensor:
    return load(model, "float32").logits(TOKENS)


def stored(model: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in model.glob("*.safetensors") for k, v in load_file(f).items()}


def values(model: Path) -> torch.Tensor:
    checkpoint = open_checkpoint(model)
    linear = open_source(skeleton(checkpoint), checkpoint).linear(NAME)
    assert linear is not None
    return linear.dequantize()


def bits_of(words: list[int], at: int, bits: int) -> int:
    """`bits` bits from bit `at` of a stream of 32-bit words, lowest first."""
    return sum(((words[(at + i) // 32] >> ((at + i) % 32)) & 1) << i for i in range(bits))


def naive_gptq(t: dict[str, torch.Tensor], bits: int, minus_one: bool) -> torch.Tensor:
    """Weight by weight from the description of the format."""
    qweight, qzeros = t[f"{NAME}.qweight"].tolist(), t[f"{NAME}.qzeros"].tolist()
    scales, g_idx = t[f"{NAME}.scales"].float(), t[f"{NAME}.g_idx"].tolist()
    out = scales.shape[1]
    w = torch.empty(out, len(g_idx))
    for o in range(out):
        column = [row[o] & 0xFFFFFFFF for row in qweight]
        for i, g in enumerate(g_idx):
            zero = bits_of([z & 0xFFFFFFFF for z in qzeros[g]], o * bits, bits) + minus_one
            w[o, i] = scales[g, o] * (bits_of(column, i * bits, bits) - zero)
    return w


@pytest.mark.parametrize(
    ("scheme", "bits", "version"),
    [("w4a16-g32", 4, "gptq"), ("w8a16-g32", 8, "gptq"), ("w3a16-g32", 3, "gptq"), ("w2a16-channel", 2, "gptq"),
     ("w4a16-g32-asym", 4, "gptq_v2")],
)  # fmt: skip
def test_gptq(tiny: Path, tmp_path: Path, scheme: str, bits: int, version: str) -> None:
    source = quantized(tiny, scheme, tmp_path / "out")
    document = export(source, tmp_path / "gptq", "gptq")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["checkpoint_format"], config["desc_act"]) == (bits, version, False)
    assert document["largest_difference"] == 0
    assert torch.equal(naive_gptq(stored(tmp_path / "gptq"), bits, version == "gptq"), values(source))
    assert torch.equal(logits(tmp_path / "gptq"), logits(source))


def test_the_constants_of_symmetric_zero_points(tiny: Path, tmp_path: Path) -> None:
    for scheme, word in (("w4a16-g32", 0x77777777), ("w8a16-g32", 0x7F7F7F7F), ("w2a16-g32", 0x55555555)):
        shutil.rmtree(tmp_path, ignore_errors=True)
        export(quantized(tiny, scheme, tmp_path / "out"), tmp_path / "gptq", "gptq")
        assert set((stored(tmp_path / "gptq")[f"{NAME}.qzeros"] & 0xFFFFFFFF).flatten().tolist()) == {word}


def test_activation_order_with_running_groups_is_read(tiny: Path, tmp_path: Path) -> None:
    """A g_idx as old GPTQ files have it: every input names its group."""
    export(quantized(tiny, "w4a16-g32", tmp_path / "out"), tmp_path / "gptq", "gptq")
    for file in (tmp_path / "gptq").glob("*.safetensors"):
        tensors = load_file(file)
        for name in [n for n in tensors if n.endswith(".g_idx")]:
            order = torch.randperm(len(tensors[name]), generator=torch.Generator().manual_seed(0))
            tensors[name] = tensors[name][order]
        save_file(tensors, file, {"format": "pt"})
    for name in ("config.json", "quantize_config.json"):
        text = (tmp_path / "gptq" / name).read_text().replace('"desc_act": false', '"desc_act": true')
        (tmp_path / "gptq" / name).write_text(text)
    assert torch.equal(naive_gptq(stored(tmp_path / "gptq"), 4, True), values(tmp_path / "gptq"))


def test_an_old_directory_says_it_in_quantize_config_only(tiny: Path, tmp_path: Path) -> None:
    source = quantized(tiny, "w4a16-g32", tmp_path / "out")
    export(source, tmp_path / "gptq", "gptq")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    config.pop("quantization_config")
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(config))
    words = json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())
    words.pop("quant_method")
    (tmp_path / "gptq" / "quantize_config.json").write_text(json.dumps(words))
    assert torch.equal(logits(tmp_path / "gptq"), logits(source))


def naive_awq(t: dict[str, torch.Tensor], group: int) -> torch.Tensor:
    place = [0, 4, 1, 5, 2, 6, 3, 7]  # which nibble holds output j of its eight
    qweight, qzeros = t[f"{NAME}.qweight"].tolist(), t[f"{NAME}.qzeros"].tolist()
    scales = t[f"{NAME}.scales"].float()
    w = torch.empty(scales.shape[1], len(qweight))
    for i, row in enumerate(qweight):
        for o in range(w.shape[0]):
            shift = 4 * place[o % 8]
            code, zero = ((words[o // 8] >> shift) & 15 for words in (row, qzeros[i // group]))
            w[o, i] = scales[i // group, o] * (code - zero)
    return w


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a16-g32-asym"])
def test_awq(tiny: Path, tmp_path: Path, scheme: str) -> None:
    source = quantized(tiny, scheme, tmp_path / "out")
    export(source, tmp_path / "awq", "awq")
    config = json.loads((tmp_path / "awq" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["version"], config["zero_point"]) == (4, 32, "gemm", True)
    assert torch.equal(naive_awq(stored(tmp_path / "awq"), 32), values(source))
    assert torch.equal(logits(tmp_path / "awq"), logits(source))


@pytest.mark.parametrize(("scheme", "algorithm"), [("fp8", "FP8_PER_CHANNEL_PER_TOKEN"), ("fp8-block", "FP8_PB_WO")])
def test_modelopt(tmp_path: Path, make_llama: Any, scheme: str, algorithm: str) -> None:
    model = make_llama(tmp_path / "model", hidden_size=128, intermediate_size=256, num_key_value_heads=4)
    source = quantized(model, scheme, tmp_path / "out")
    export(source, tmp_path / "fp8", "modelopt")
    words = json.loads((tmp_path / "fp8" / "hf_quant_config.json").read_text())["quantization"]
    assert (words["quant_algo"], words["exclude_modules"]) == (algorithm, ["lm_head"])
    t = stored(tmp_path / "fp8")
    weight, scale = t[f"{NAME}.weight"].float(), t[f"{NAME}.weight_scale"]
    if scheme == "fp8":
        assert scale.shape == weight.shape[:1]
        expected = weight * scale[:, None]
    else:
        assert scale.shape == (1, 1, 2, 1)
        expected = weight * scale[0, 0, :, 0].repeat_interleave(128)
    assert torch.equal(expected, values(source))
    assert torch.equal(logits(tmp_path / "fp8"), logits(source))


def test_packing_words_of_awq_is_undone() -> None:
    codes = torch.randint(-8, 8, (5, 24), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    assert torch.equal(awq.unpack_words(awq.pack_words(codes)), codes)
    assert awq.pack_words(torch.arange(-8, 0).to(torch.int8)[None]).item() & 0xFFFFFFFF == 0x75316420


def test_what_cannot_be_carried_is_refused_before_work(tiny: Path, tmp_path: Path) -> None:
    refused = [("w8a16-g32", "awq", "Formats that can: gguf, gptq"), ("fp8", "gptq", "Formats that can: modelopt"),
               ("w4a16-g32", "modelopt", "Formats that can: gguf, gptq, awq"),
               ("w8a8", "gptq", "Formats that can: onnx; the directory itself is in compressed-tensors"),
               ("nf4", "gptq", "No export format can; the directory itself is in lowbit's own layout"),
               ("w5a16-g32", "gptq", "Formats that can: gguf")]  # fmt: skip
    for n, (scheme, format, words) in enumerate(refused):
        with pytest.raises(InputError, match=words):
            export(quantized(tiny, scheme, tmp_path / str(n)), tmp_path / "out", format)
    with pytest.raises(InputError, match="not quantized"):
        export(tiny, tmp_path / "out", "gptq")
    with pytest.raises(InputError, match="Did you mean"):
        export(tiny, tmp_path / "out", "gpt")
    lowbit.quantize(tiny, tmp_path / "mixed", scheme="w4a16-g32", method="rtn", override=(("layers.0.*", "w8a16-g32"),))
    with pytest.raises(InputError, match="one number of bits"):
        export(tmp_path / "mixed", tmp_path / "out", "gptq")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_layers_left_alone_are_named(tiny: Path, tmp_path: Path) -> None:
    lowbit.quantize(tiny, tmp_path / "w4", scheme="w4a16-g32", method="rtn", ignore=("down_proj",))
    for format, key in (("gptq", "dynamic"), ("awq", "modules_to_not_convert")):
        config = export(tmp_path / "w4", tmp_path / format, format)["config"]
        assert len(config[key]) == 2
        assert all("down_proj" in name for name in config[key])
        assert torch.equal(logits(tmp_path / format), logits(tmp_path / "w4"))


def test_damaged_gptq_tensors_are_refused(tiny: Path, tmp_path: Path) -> None:
    source = quantized(tiny, "w4a16-g32", tmp_path / "out")
    checkpoint = open_checkpoint(source)
    linear = open_source(skeleton(checkpoint), checkpoint).linear(NAME)
    assert isinstance(linear, QuantizedTensor)
    good = gptq.pack(NAME, linear)
    scheme, config = Scheme.parse("w4a16-g32"), {"checkpoint_format": "gptq"}
    for part, damage in (("scales", lambda t: t[:, :-1]), ("qzeros", lambda t: t[:-1]), ("qzeros", lambda t: t + 1)):
        bad = good | {f"{NAME}.{part}": damage(good[f"{NAME}.{part}"])}
        with pytest.raises(InputError, match=r"belong together|sym"):
            gptq.unpack(NAME, bad.__getitem__, scheme, config)
    with pytest.raises(InputError, match="marlin"):
        gptq.checkpoint_format({"checkpoint_format": "marlin"})
