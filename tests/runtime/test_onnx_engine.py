"""ONNX Runtime as an engine: the same answers as lowbit's float path on the same codes, token by token and at once."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lowbit
from lowbit.accuracy import evaluate
from lowbit.cli import app
from lowbit.errors import InputError
from lowbit.exporting import export
from lowbit.model.checkpoint import DEMO
from lowbit.runtime import onnx as onnx_engine
from lowbit.runtime.engine import load
from lowbit.speed import bench

pytestmark = pytest.mark.interop
TOKENS = torch.arange(10, 58).reshape(2, 24)


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(quantized directory, the same as ONNX)."""
    place = tmp_path_factory.mktemp("onnx")
    lowbit.quantize(tiny, place / "q", scheme="w4a16-g32", method="rtn")
    export(place / "q", place / "onnx", "onnx")
    return place / "q", place / "onnx"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "t.txt"
    file.write_text((DEMO / "evaluation.txt").read_text(encoding="utf-8")[:1500], encoding="utf-8")
    return file


def test_logits_and_tokens_are_those_of_the_codes(made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts read in pieces or whole, two at once, through the cache, and with the cache cut back."""
    own, engine = load(made[0], "float32"), load(made[1], "onnx")
    expected = own.logits(TOKENS)
    assert torch.allclose(engine.logits(TOKENS), expected, atol=1e-4)
    monkeypatch.setattr(onnx_engine, "_CHUNK", 7)
    assert torch.allclose(engine.logits(TOKENS), expected, atol=1e-4)
    here, there = (torch.stack(list(e.stream(TOKENS, 6))) for e in (own, engine))
    assert torch.equal(here, there)
    prompt = [5, 6, 7, 5, 6, 7, 5, 6]
    answer = own.generate(prompt, max_new_tokens=12)
    for words in ({}, {"prompt_lookup": 4}, {}):
        assert engine.generate(prompt, max_new_tokens=12, **words) == answer
    for tokens, rows in (([1, 2, 3, 4], 1), ([1, 2, 3, 9, 8], 2), ([1, 2], 1), ([1, 2, 3, 4, 5, 6], 3)):
        after, best = engine.next_logits(tokens, rows, True)
        assert after is not None
        assert torch.allclose(after, own.logits(torch.tensor([tokens]))[0, -rows:], atol=1e-4)
        assert best == after.argmax(-1).tolist()


def test_bytes_are_counted_from_the_stored_constants(made: tuple[Path, Path]) -> None:
    engine = load(made[1], "onnx")
    hidden, inner, vocabulary, blocks = 64, 128, 4096, 2
    weights = blocks * (2 * hidden * hidden + 2 * 32 * hidden + 3 * hidden * inner)
    linears = weights // 2 + weights // 32 * 4  # four bits a weight, and a float32 scale for 32 of them
    norms, frequencies = (2 * blocks + 1) * hidden * 4, 8 * 4
    head = vocabulary * hidden * 4  # stored in bfloat16, made float32 at load
    assert engine.weight_bytes == pytest.approx(linears + norms + frequencies + head + vocabulary * hidden * 2, abs=200)
    assert engine.weight_bytes - engine.weight_bytes_per_token == (vocabulary - 1) * hidden * 2
    assert engine.kv_bytes(10) == 2 * blocks * 32 * 4 * 10
    assert engine.kernels == {"MatMulNBits int4": 14}


def test_evaluate_and_bench_run_on_it(made: tuple[Path, Path], tiny: Path, text: Path, tmp_path: Path) -> None:
    export(tiny, tmp_path / "float", "onnx", type="float")
    words: dict[str, Any] = {"against": tiny, "seq_len": 32, "windows": 3}
    there = evaluate([made[1]], text, **words, runtime="onnx", floor=tmp_path / "float")
    here = evaluate([made[0]], text, **words, runtime="float32")
    assert there["noise_floor"]["kl"] < 1e-6
    for key in ("perplexity", "top1_agreement"):
        assert there["results"][0][key] == pytest.approx(here["results"][0][key], rel=1e-5)
    assert there["results"][0]["kl"]["mean"] == pytest.approx(here["results"][0]["kl"]["mean"], rel=1e-3)
    shape: dict[str, Any] = {"prompt_lengths": [6], "output_lengths": [3], "batch_sizes": [2], "repeats": 1}
    (row,) = bench([made[1]], **shape, runtime="onnx")["results"]
    assert row["runtime"].startswith("ONNX Runtime ")
    assert row["weight_bytes"] == load(made[1], "onnx").weight_bytes
    assert row["e2e_s"]["median"] > row["tpot_s"]["median"] > 0


def test_from_the_command_line(
    made: tuple[Path, Path], tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The noise floor is made on the way: the original in float32, through the same engine."""
    words = ["--against", str(tiny), "--text", str(text), "--seq-len", "32", "--windows", "2", "--quiet"]
    app(
        ["evaluate", str(made[1]), "--runtime", "onnx", *words, "--json", str(tmp_path / "e.json")],
        standalone_mode=False,
    )
    document = json.loads((tmp_path / "e.json").read_text())
    assert document["noise_floor"]["runtime"].startswith("ONNX Runtime")
    assert document["noise_floor"]["top1_agreement"] == 1
    chat = ["chat", str(made[1]), "--runtime", "onnx", "--prompt", "def f(", "--max-new-tokens", "4", "--quiet"]
    app([*chat, "--json", str(tmp_path / "c.json")], standalone_mode=False)
    (turn,) = json.loads((tmp_path / "c.json").read_text())["turns"]
    assert turn["generated_tokens"] == 4
    assert turn["answer"] in capsys.readouterr().out


def test_what_it_cannot_run_is_said(
    made: tuple[Path, Path], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"runs ONNX directories; make one: lowbit export .* --format onnx"):
        load(tiny, "onnx")
    with pytest.raises(InputError, match="--kv is for lowbit's own engines; onnx caches"):
        load(made[1], "onnx", kv="int8")
    with pytest.raises(InputError, match=r"an ONNX model and no safetensors.*--runtime onnx"):
        load(made[1])
    damaged = Path(shutil.copytree(made[1], tmp_path / "damaged"))
    graph = damaged / "model.onnx"
    graph.write_bytes(graph.read_bytes()[: len(graph.read_bytes()) // 2])
    with pytest.raises(InputError, match="ONNX Runtime cannot load it"):
        load(damaged, "onnx")
    graph.write_bytes((made[1] / "model.onnx").read_bytes())
    data = damaged / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(InputError, match="ONNX Runtime cannot load it"):
        load(damaged, "onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"pip install 'lowbit\[onnx\]'"):
        load(made[1], "onnx")


def test_a_graph_without_a_cache_is_refused(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
    out = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence"])
    graph = helper.make_graph([helper.make_node("Cast", ["input_ids"], ["logits"], to=1)], "g", [ids], [out])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "model.onnx"
    )
    (tmp_path / "config.json").write_text("{}")
    assert np.array_equal(
        onnx_engine.session(tmp_path).run(None, {"input_ids": np.array([[3]])})[0], np.array([[3.0]], np.float32)
    )
    with pytest.raises(InputError, match=r"does not generate token by token.*encoders"):
        load(tmp_path, "onnx")
