"""Export to ONNX: codes that a naive reader finds again, values that ONNX Runtime computes, texts that it continues."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from transformers import BertConfig, BertModel

import lowbit
from lowbit.demo import __path__ as demo_path
from lowbit.errors import InputError
from lowbit.exporting import export
from lowbit.exporting.onnx import run_onnx
from lowbit.formats import onnx as onnx_format
from lowbit.model.checkpoint import open_checkpoint
from lowbit.model.load import open_source, skeleton
from lowbit.runtime.engine import load
from lowbit.runtime.onnx import session
from lowbit.scheme import Scheme

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "architectures"))
from zoo import save_architecture

pytestmark = pytest.mark.interop
NAME = "model.layers.1.mlp.down_proj"
TOKENS = torch.arange(5, 45)[None]


def carried(model: Path, scheme: str, path: Path, **words: Any) -> tuple[Path, Path, dict[str, Any]]:
    """(quantized directory, ONNX directory, the export's document)."""
    lowbit.quantize(model, path / "q", scheme=scheme, method="rtn", **words)
    return path / "q", path / "onnx", export(path / "q", path / "onnx", "onnx")


def kept(model: Path) -> torch.Tensor:
    checkpoint = open_checkpoint(model)
    linear = open_source(skeleton(checkpoint), checkpoint).linear(NAME)
    assert linear is not None
    return linear.dequantize()


def product(path: Path, name: str) -> tuple[Any, dict[str, np.ndarray], dict[str, Any]]:
    """The node of that name, its constants and its attributes, by the onnx package alone."""
    model = onnx.load(path / "model.onnx")  # brings in the weights from the file beside it
    (node,) = [n for n in model.graph.node if n.name == name]
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return node, constants, attributes


def naive_n_bits(path: Path) -> torch.Tensor:
    """Weight by weight from the operator's documentation."""
    node, constants, words = product(path, NAME)
    codes, scales = (constants[n] for n in node.input[1:3])
    zeros = constants[node.input[3]] if len(node.input) > 3 else None
    bits, block, mask = words["bits"], words["block_size"], 2 ** words["bits"] - 1
    w = torch.empty(words["N"], words["K"])
    for n in range(words["N"]):
        for k in range(words["K"]):
            b, at = k // block, (k % block) * bits
            code = (int(codes[n, b, at // 8]) >> (at % 8)) & mask
            zero = 2 ** (bits - 1)
            if zeros is not None:
                zero = (int(zeros[n, b * bits // 8]) >> (b * bits % 8)) & mask
            w[n, k] = (code - zero) * float(scales[n, b])
    return w


@pytest.mark.parametrize(
    ("scheme", "bits", "block"),
    [("w4a16-g16", 4, 16), ("w4a16-g32-asym", 4, 32), ("w3a16-g64-asym", 4, 64), ("w2a16-g32", 2, 32),
     ("w4a16-channel", 4, 128), ("w8a16-g32-asym", 8, 32), ("w4a8-g32", 4, 32)],
)  # fmt: skip
def test_codes_are_carried_over(tiny: Path, tmp_path: Path, scheme: str, bits: int, block: int) -> None:
    source, made, document = carried(tiny, scheme, tmp_path)
    _, _, words = product(made, NAME)
    assert (words["bits"], words["block_size"], words.get("accuracy_level")) == (
        bits, block, 4 if "a8" in scheme else None,
    )  # fmt: skip
    assert document["linears"] == 14
    assert document["largest_difference"] == 0
    assert torch.equal(naive_n_bits(made), kept(source))
    if "a8" not in scheme:
        here, there = load(source, "float32").logits(TOKENS), torch.from_numpy(run_onnx(made, TOKENS)[0])
        assert float((here - there).abs().max()) < 1e-4


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-tensor", "w8a8-static"])
def test_integer_products(tiny: Path, tmp_path: Path, text_file: Path, scheme: str) -> None:
    words = {"calibration": str(text_file), "samples": 4, "seq_len": 64} if "static" in scheme else {}
    source, made, document = carried(tiny, scheme, tmp_path, **words)
    node, constants, _ = product(made, NAME)
    codes, scales = constants[node.input[1]], constants[f"{NAME}.scales"]
    zeros = [constants[name] for name in node.input[2:]]
    assert (node.op_type, codes.dtype, [z.dtype for z in zeros]) == ("MatMulInteger", np.uint8, [np.uint8] * 2)
    values = (codes.T.astype(np.float32) - zeros[1]) * scales[:, None]
    assert torch.equal(torch.from_numpy(values), kept(source))
    assert document["agreement"]["mean_log_probability_difference"] < 0.01


def test_a_group_larger_than_any_block_repeats_its_scale(tmp_path: Path, make_llama: Any) -> None:
    model = make_llama(tmp_path / "model", hidden_size=1024, intermediate_size=96, num_hidden_layers=1)
    lowbit.quantize(model, tmp_path / "q", scheme="w4a16-g512", method="rtn", ignore=("down_proj",))
    export(tmp_path / "q", tmp_path / "onnx", "onnx")
    node, constants, words = product(tmp_path / "onnx", "model.layers.0.mlp.up_proj")
    scales = constants[node.input[2]]
    assert (words["block_size"], scales.shape) == (256, (96, 4))
    assert np.array_equal(scales[:, 0::2], scales[:, 1::2])


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "bert", "roberta"])
def test_architectures(name: str, tmp_path: Path) -> None:
    """ONNX Runtime computes what transformers' own model class computes, for texts longer than the windows."""
    document = export(save_architecture(name, tmp_path / "model"), tmp_path / "onnx", "onnx", type="float")
    assert document["agreement"]["positions"] == 64
    assert document["agreement"]["mean_log_probability_difference"] < 1e-5
    assert document["agreement"]["top1_agreement"] == 1


@pytest.mark.parametrize("name", ["gemma3", "phi3", "bert-classifier"])
def test_quantized_architectures(name: str, tmp_path: Path) -> None:
    """The same with zero points, through tied heads and fused products."""
    _, _, document = carried(save_architecture(name, tmp_path / "model"), "w4a16-g32-asym", tmp_path)
    assert document["agreement"]["mean_log_probability_difference"] < 1e-5


def step(run: Any, ids: np.ndarray, seen: np.ndarray, positions: np.ndarray, past: dict[str, np.ndarray]) -> Any:
    feeds = {"input_ids": ids, "attention_mask": seen, "position_ids": positions} | past
    logits, *present = run.run(None, feeds)
    return logits, dict(zip(past, present, strict=True))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_generation_with_the_cache(name: str, tmp_path: Path) -> None:
    """Token by token through the cache, two prompts of different lengths padded to one batch, against transformers."""
    model = save_architecture(name, tmp_path / "model")
    lowbit.quantize(model, tmp_path / "q", scheme="w4a16-g32", method="rtn")
    export(tmp_path / "q", tmp_path / "onnx", "onnx")
    engine, run = load(tmp_path / "q", "float32"), session(tmp_path / "onnx")
    prompts = [list(range(7, 20)), list(range(100, 105))]
    expected = [[int(t) for t in engine.stream(torch.tensor([p]), 8)] for p in prompts]
    longest = max(map(len, prompts))
    seen = np.array([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    ids = np.array([[0] * (longest - len(p)) + p for p in prompts])
    positions = np.maximum(np.cumsum(seen, 1) - 1, 0)
    past = {i.name: np.zeros((2, i.shape[1], 0, i.shape[3]), np.float32)
            for i in run.get_inputs() if i.name.startswith("past")}  # fmt: skip
    got: list[list[int]] = [[], []]
    for _ in range(8):
        logits, past = step(run, ids, seen, positions, past)
        ids = logits[:, -1].argmax(-1)[:, None]
        for answer, token in zip(got, ids[:, 0], strict=True):
            answer.append(int(token))
        positions = positions[:, -1:] + 1
        seen = np.concatenate([seen, np.ones((2, 1), np.int64)], 1)
    assert got == expected


def test_int8_of_a_full_precision_model(tiny_float32: Path, tmp_path: Path) -> None:
    """Everything in int8, embeddings too: a quarter of the size, nearly the same values."""
    whole = export(tiny_float32, tmp_path / "float", "onnx", type="float")
    small = export(tiny_float32, tmp_path / "int8", "onnx")
    assert small["type"] == "int8"
    assert small["bytes"] < 0.32 * whole["bytes"]
    assert small["linears"] == 15
    assert small["agreement"]["top1_agreement"] > 0.85
    assert small["agreement"]["mean_log_probability_difference"] < 0.1


def test_half_precision_weights_stay_half_in_the_file(tiny: Path, tmp_path: Path) -> None:
    document = export(tiny, tmp_path / "onnx", "onnx", type="float")
    assert document["bytes"] < 1.1 * (tiny / "model.safetensors").stat().st_size
    assert document["agreement"]["mean_log_probability_difference"] < 1e-5


@pytest.mark.model
def test_the_demo_agrees(tmp_path: Path) -> None:
    """The claim: same top token at 99 % of positions, mean difference of log-probabilities at most 0.01."""
    lowbit.quantize("demo", tmp_path / "q", scheme="w4a16-g32", method="rtn")
    export(tmp_path / "q", tmp_path / "onnx", "onnx")
    engine = load(tmp_path / "q", "float32")
    text = (Path(demo_path[0]) / "evaluation.txt").read_text(encoding="utf-8")[:8000]
    tokens = torch.tensor(engine.tokenizer(text, add_special_tokens=False)["input_ids"][:1024]).view(4, 256)
    here, there = engine.logits(tokens), torch.from_numpy(run_onnx(tmp_path / "onnx", tokens)[0])
    assert float((here.argmax(-1) == there.argmax(-1)).float().mean()) >= 0.99
    next_token = tokens[:, 1:, None]
    a, b = (x[:, :-1].log_softmax(-1).gather(-1, next_token) for x in (here, there))
    assert float((a - b).abs().mean()) <= 0.01


@pytest.mark.model
def test_bert_base_fits_a_phone(tmp_path: Path) -> None:
    """BERT base, random weights: 417.7 MB (of 2^20 bytes) in float32, at most 173 as int8, and it still answers."""
    torch.manual_seed(0)
    BertModel(BertConfig()).save_pretrained(tmp_path / "bert")
    size = (tmp_path / "bert" / "model.safetensors").stat().st_size
    assert size / 2**20 == pytest.approx(417.7, abs=0.5)
    document = export(tmp_path / "bert", tmp_path / "onnx", "onnx", type="int8")
    assert document["bytes"] <= 173e6
    assert document["agreement"]["mean_log_probability_difference"] < 0.1


def test_what_cannot_be_written_is_refused_before_work(tiny: Path, tmp_path: Path, edit_json: Any) -> None:
    refused = {"w4a16-g8": "blocks are of 16 to 256", "nvfp4": "integer codes", "nf4": "evenly spaced",
               "w4afp8-g32": "rounds activations to int8"}  # fmt: skip
    for scheme, words in refused.items():
        assert words in str(onnx_format.supports(Scheme.parse(scheme)))
    lowbit.quantize(tiny, tmp_path / "fp8", scheme="fp8", method="rtn")
    with pytest.raises(InputError, match="Formats that can: modelopt"):
        export(tmp_path / "fp8", tmp_path / "out", "onnx")
    with pytest.raises(InputError, match="Did you mean int8"):
        export(tiny, tmp_path / "out", "onnx", type="int")
    with pytest.raises(InputError, match="no --method"):
        export(tiny, tmp_path / "out", "onnx", method="gptq")
    with pytest.raises(InputError, match=r"gpt2.*cannot be written as ONNX"):
        export(save_architecture("gpt2", tmp_path / "gpt2"), tmp_path / "out", "onnx")
    moving = save_architecture("llama", tmp_path / "moving")
    edit_json(moving / "config.json", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(InputError, match="length of the text"):
        export(moving, tmp_path / "out", "onnx")
    assert not list(tmp_path.glob("out*"))


def test_a_file_that_fails_its_proof_leaves_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that computes something else (a norm's weights one too large) is refused, and can be made again."""
    from lowbit.exporting import onnx_decoder

    norm = onnx_decoder.rms_norm
    with monkeypatch.context() as wrong:
        wrong.setattr(onnx_decoder, "rms_norm", lambda b, x, m, e, offset: norm(b, x, m, e, offset + 1))
        with pytest.raises(InputError, match=r"onnx: not made: ONNX Runtime computes something else"):
            export(tiny, tmp_path / "onnx", "onnx", type="float")
    assert not list(tmp_path.iterdir())
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "file").write_text("mine")
    with monkeypatch.context() as wrong:
        wrong.setattr(onnx_decoder, "rms_norm", lambda b, x, m, e, offset: norm(b, x, m, e, offset + 1))
        with pytest.raises(InputError, match="not made"):
            export(tiny, tmp_path / "onnx", "onnx", type="float", force=True)
    assert [f.name for f in tmp_path.iterdir()] == ["onnx"]
    assert (tmp_path / "onnx" / "file").read_text() == "mine"
    document = export(tiny, tmp_path / "onnx", "onnx", type="float", force=True)
    assert document["agreement"]["top1_agreement"] == 1


def test_bad_inputs_and_outputs(tiny: Path, broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    with pytest.raises(InputError, match="--force"):
        export(tiny, tmp_path / "there", "onnx")
    shard = broken / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(InputError, match="Cut short"):
        export(broken, tmp_path / "out", "onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"pip install 'lowbit\[onnx\]'"):
        export(tiny, tmp_path / "out", "onnx")
    assert (tmp_path / "there" / "file").read_text() == "mine"
    assert not list(tmp_path.glob("out*"))
