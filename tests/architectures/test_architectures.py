"""Every architecture, quantized and read back, against the dense model that transformers makes of the same values.

The reference is independent of how lowbit walks models: the original files with each quantized weight replaced by
its dequantized value, under the name it has there, loaded by transformers' own class.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CompressedTensorsConfig
from zoo import ENCODERS, LLAMA, MIXTURES, VOCABULARY, ZOO, save_architecture, save_model

import lowbit
from lowbit.artifact import Work
from lowbit.errors import InputError
from lowbit.formats.compressed_tensors import unpack
from lowbit.inspect import verify
from lowbit.model.checkpoint import SINGLE, open_checkpoint
from lowbit.model.load import skeleton
from lowbit.model.stream import stream_logits
from lowbit.model.walk import routers
from lowbit.numerics import fake_quantize_activation
from lowbit.runtime.engine import load
from lowbit.scheme import Scheme, TensorScheme

# loading with dequantize=True is said to override the file's own settings, which is what is wanted
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
PROMPT = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
INT8_TOKENS = TensorScheme("int", 8, "token")
Architecture = Callable[[str], Path]


def quantize(model: Path, output: Path, text: Path, **words: Any) -> dict[str, Any]:
    settings = {"scheme": "w4a16-g32", "calibration": str(text), "samples": 8, "seq_len": 64} | words
    return lowbit.quantize(model, output, **settings)


def stored_values(output: Path) -> dict[str, Tensor]:
    """Stored name -> dequantized weight (out, in), read from the files alone."""
    tensors = {n: t for file in output.glob("*.safetensors") for n, t in load_file(file).items()}
    schemes = {r["name"]: r["scheme"] for r in json.loads((output / "lowbit.json").read_text())["layers"]}
    (scheme,) = set(schemes.values())
    names = [n.removesuffix(".weight_scale") for n in tensors if n.endswith(".weight_scale")]
    assert len(names) == len(schemes)
    return {n: unpack(n, tensors.__getitem__, Scheme.parse(scheme)).dequantize() for n in names}


def dense(name: str, model: Path, output: Path, place: Path) -> Any:
    """transformers' model of the dequantized values."""
    shutil.copytree(model, place)
    tensors = load_file(model / SINGLE)
    for stored, value in stored_values(output).items():
        old = tensors[f"{stored}.weight"]
        new = value if name != "gpt2" else value.T
        assert 0 < float((new - old).norm() / old.norm()) < 0.3, stored
        tensors[f"{stored}.weight"] = new.contiguous()
    save_file(tensors, place / SINGLE, {"format": "pt"})
    return getattr(transformers, ZOO[name][0]).from_pretrained(place).eval()


def close(mine: Tensor, theirs: Tensor) -> None:
    assert mine.shape == theirs.shape
    assert float((mine - theirs).abs().max() / theirs.abs().max()) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ZOO)
def test_the_streamed_pass_is_transformers_own(architecture: Architecture, name: str) -> None:
    path = architecture(name)
    theirs = getattr(transformers, ZOO[name][0]).from_pretrained(path).eval()
    assert torch.equal(stream_logits(open_checkpoint(path), PROMPT), theirs(input_ids=PROMPT).logits)


@torch.no_grad()
@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("name", ZOO)
def test_quantized_and_read_back(
    architecture: Architecture, text_file: Path, tmp_path: Path, name: str, method: str
) -> None:
    model, out = architecture(name), tmp_path / "out"
    document = quantize(model, out, text_file, method=method)
    reference = dense(name, model, out, tmp_path / "dense")
    expected = reference(input_ids=PROMPT).logits
    close(stream_logits(open_checkpoint(out), PROMPT), expected)
    if name in ENCODERS:
        with pytest.raises(InputError, match="does not predict the next token"):
            load(out)
    else:
        close(load(out, "float32").logits(PROMPT), expected)
    if name != "gpt2":  # compressed-tensors knows nn.Linear only
        words = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
        loaded = getattr(transformers, ZOO[name][0]).from_pretrained(out, dtype=torch.float32, **words).eval()
        close(loaded(input_ids=PROMPT).logits, expected)
    # nothing got another name, and nothing was lost
    written = {n for file in out.glob("*.safetensors") for n in load_file(file)}
    plain = {n.replace("weight_packed", "weight") for n in written if not n.endswith(("_scale", "_shape"))}
    assert plain == load_file(model / SINGLE).keys()
    if method == "gptq":
        losses = [(r["loss"], r["loss_rtn"]) for r in document["layers"] if r["loss"] is not None]
        assert sum(a for a, _ in losses) < sum(b for _, b in losses)


@pytest.mark.parametrize("name", sorted(MIXTURES))
def test_every_expert_is_quantized_and_no_router(
    architecture: Architecture, text_file: Path, tmp_path: Path, name: str
) -> None:
    document = quantize(architecture(name), tmp_path / "out", text_file, method="rtn", calibration=None)
    names = [r["name"] for r in document["layers"]]
    assert sum(".experts." in n for n in names) == 2 * 4 * 3  # blocks, experts, linears of an expert
    assert not [n for n in names if n.endswith(("mlp.gate", "shared_expert_gate"))]
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    inner = "block_sparse_moe" if name == "mixtral" else "mlp"
    assert f"model.layers.1.{inner}.gate" in ignored  # other readers' routers may be linears
    assert (f"model.layers.1.{inner}.shared_expert_gate" in ignored) == (name == "qwen2_moe")
    assert routers(skeleton(open_checkpoint(architecture(name)))) <= set(ignored)


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["w8a8", "w8a16-channel"])
def test_encoders_in_eight_bits(architecture: Architecture, text_file: Path, tmp_path: Path, scheme: str) -> None:
    model, out = architecture("bert"), tmp_path / "out"
    quantize(model, out, text_file, scheme=scheme)
    assert verify(out)["ok"]
    reference = transformers.BertForMaskedLM.from_pretrained(model).eval()
    for stored, value in stored_values(out).items():
        linear = reference.get_submodule(stored)
        linear.weight.data = value
        if scheme == "w8a8":
            linear.register_forward_pre_hook(lambda _m, args: (fake_quantize_activation(args[0], INT8_TOKENS),))
    close(stream_logits(open_checkpoint(out), PROMPT), reference(input_ids=PROMPT).logits)


def test_an_encoder_decoder_is_refused_with_the_reason(tmp_path: Path) -> None:
    config = transformers.T5Config(d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16, vocab_size=64)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(InputError, match="an encoder-decoder model"):
        skeleton(open_checkpoint(tmp_path / "t5"))


# --- a mixture whose router never chooses an expert


def starve(path: Path) -> None:
    """Rows 0, r, -r, r' of the routers: the largest of r x and -r x is above 0, so no token chooses the first."""
    tensors = load_file(path / SINGLE)
    for name in [n for n in tensors if n.endswith("mlp.gate.weight")]:
        tensors[name][0] = 0
        tensors[name][2] = -tensors[name][1]
    save_file(tensors, path / SINGLE, {"format": "pt"})


def test_an_expert_that_no_token_reaches_is_on_record(text_file: Path, tmp_path: Path) -> None:
    model = save_architecture("qwen3_moe", tmp_path / "model", num_experts_per_tok=1)
    starve(model)
    document = quantize(model, tmp_path / "out", text_file)
    by_name = {r["name"]: r for r in document["layers"]}
    unreached = {n for n, r in by_name.items() if r["fallback"] and "no calibration token" in r["fallback"]}
    expert = "model.layers.{}.mlp.experts.0.{}_proj"
    assert unreached == {expert.format(i, p) for i in (0, 1) for p in ("gate", "up", "down")}
    assert all((r["loss"] is None) == (n in unreached) for n, r in by_name.items())


def test_too_many_unreached_linears_are_exit_code_3_and_the_result_stays(text_file: Path, tmp_path: Path) -> None:
    model = save_architecture("qwen3_moe", tmp_path / "model", num_experts_per_tok=1)
    starve(model)
    words = [model, "-o", tmp_path / "out", "--scheme", "w4a16-g32", "--calibration", text_file]
    command = [sys.executable, "-m", "lowbit", "quantize", *map(str, words), "--samples", "8", "--seq-len", "64"]
    strict = subprocess.run(command, capture_output=True, text=True, check=False)
    assert strict.returncode == 3, strict.stderr
    assert "6 of 32 linears (19%, the limit is 10%) had no usable calibration data" in strict.stderr
    assert "model.layers.0.mlp.experts.0." in strict.stderr
    assert verify(tmp_path / "out")["ok"]
    assert subprocess.run([*command, "--force", "--max-unreached", "20%"], check=False).returncode == 0


def test_a_mixture_resumes_to_the_same_bytes(
    architecture: Architecture, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished blocks are brought back under the files' names; activations rounded in the experts too."""
    model = architecture("mixtral")
    quantize(model, tmp_path / "whole", text_file, scheme="w8a8")
    original = Work.write_report

    def interrupted(self: Work, name: str, report: Any) -> None:
        original(self, name, report)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Work, "write_report", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize(model, tmp_path / "out", text_file, scheme="w8a8")
    quantize(model, tmp_path / "out", text_file, scheme="w8a8", resume=True)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


# --- models that see, models with code of their own


def save_llava(path: Path) -> Path:
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=28, patch_size=14),
        text_config=transformers.LlamaConfig(**LLAMA),
        image_token_index=7,
    )
    torch.manual_seed(0)
    return save_model(transformers.LlavaForConditionalGeneration(config), path)


@torch.no_grad()
def test_of_a_vision_language_model_the_language_is_quantized(text_file: Path, tmp_path: Path) -> None:
    model, out = save_llava(tmp_path / "model"), tmp_path / "out"
    document = quantize(model, out, text_file)
    assert len(document["layers"]) == 2 * 7
    assert all("language_model" in r["name"] for r in document["layers"])
    before, after = load_file(model / SINGLE), {}
    for file in out.glob("*.safetensors"):
        after |= load_file(file)
    vision = [n for n in before if "vision" in n or "projector" in n]
    assert len(vision) > 50
    for name in vision:
        assert torch.equal(before[name], after[name])
    reference = transformers.LlavaForConditionalGeneration.from_pretrained(model).eval()
    layers = reference.model.language_model.layers
    for stored, value in stored_values(out).items():
        layers.get_submodule(stored.partition(".layers.")[2]).weight.data = value
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    prompt = torch.cat([PROMPT[:1, :4], torch.full((1, 4), 7), PROMPT[:1, 4:]], 1)
    close(stream_logits(open_checkpoint(out), PROMPT), reference(input_ids=PROMPT).logits)
    loaded = transformers.LlavaForConditionalGeneration.from_pretrained(
        out, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    ).eval()
    seen = {"input_ids": prompt, "pixel_values": pixels}
    close(loaded(**seen).logits, reference(**seen).logits)


CUSTOM = """
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "lowbit-own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_a_model_runs_only_when_asked(
    architecture: Architecture, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit_json: Any
) -> None:
    model = tmp_path / "model"
    shutil.copytree(architecture("llama"), model)
    (model / "own.py").write_text(CUSTOM)
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    edit_json(model / "config.json", model_type="lowbit-own", architectures=["OwnForCausalLM"], auto_map=auto_map)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(InputError, match=r"brings its own code .*--trust-remote-code"):
        quantize(model, tmp_path / "out", text_file)
    monkeypatch.setenv("LOWBIT_TRUST_REMOTE_CODE", "1")
    quantize(model, tmp_path / "out", text_file)
    quantize(architecture("llama"), tmp_path / "plain", text_file)
    assert verify(tmp_path / "out")["ok"]
    for file in (tmp_path / "plain").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_conv1d_and_stacked_experts_are_linears_in_the_skeleton(architecture: Architecture) -> None:
    gpt2 = skeleton(open_checkpoint(architecture("gpt2")))
    assert isinstance(gpt2.transformer.h[0].attn.c_attn, nn.Linear)
    assert tuple(gpt2.transformer.h[0].attn.c_attn.weight.shape) == (192, 64)
    mixtral = skeleton(open_checkpoint(architecture("mixtral")))
    assert isinstance(mixtral.get_submodule("model.layers.1.mlp.experts.3.w2"), nn.Linear)
