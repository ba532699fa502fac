"""Export to GGUF: the file computes what the model computes, carried over or quantized here, and can be evaluated."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import lowbit
from lowbit.accuracy import evaluate
from lowbit.errors import InputError
from lowbit.exporting import export
from lowbit.formats.gguf_file import read_gguf
from lowbit.formats.gguf_names import choose_type, permute_heads, unpermute_heads
from lowbit.model.checkpoint import DEMO, open_checkpoint
from lowbit.model.load import load_tokenizer
from lowbit.runtime.engine import load

TOKENS = torch.arange(5, 45)[None]


def logits(model: Path) -> torch.Tensor:
    return load(model, "float32").logits(TOKENS)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, make_llama: Callable[..., Path]) -> Path:
    """A Llama wide enough for K-quants."""
    return make_llama(tmp_path_factory.mktemp("wide") / "model", hidden_size=256, intermediate_size=512)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {"head_dim": 32, "sliding_window": None}, "qwen2": {}, "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 32, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True, "sliding_window": 16},
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 32, "num_hidden_layers": 6, "sliding_window": 16,
                    "tie_word_embeddings": True},
    "phi3": {"pad_token_id": 2},
}  # fmt: skip


def save_random(path: Path, kind: str, **words: Any) -> Any:
    """A random model of a family, norms and biases away from their initial values, with the demo's tokenizer."""
    config = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 4096, "max_position_embeddings": 256, "initializer_range": 0.1,
        "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    if kind == "gpt2":
        config = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 4096,
                  "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(config | words)), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name or name.endswith(".bias"):
            parameter.data += torch.randn_like(parameter) * 0.1
    model.eval().save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / "model" / name, path / name)
    return model


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_float32_file_computes_the_same_logits(tmp_path: Path, kind: str) -> None:
    save_random(tmp_path / "model", kind, **FAMILIES[kind])
    export(tmp_path / "model", tmp_path / "model.gguf", "gguf", type="f32")
    assert torch.allclose(logits(tmp_path / "model.gguf"), logits(tmp_path / "model"), atol=2e-5)


def test_llama_3_frequencies_come_back(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    save_random(tmp_path / "model", "llama", rope_parameters=rope)
    export(tmp_path / "model", tmp_path / "model.gguf", "gguf", type="f32")
    assert float(read_gguf(tmp_path / "model.gguf").values("rope_freqs.weight").max()) == 8
    assert torch.allclose(logits(tmp_path / "model.gguf"), logits(tmp_path / "model"), atol=2e-5)


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [("w4a16-g32", "q4_0"), ("w4a16-g64", "q4_0"), ("w4a16-g32-asym", "q5_0"), ("w8a16-channel", "q8_0"),
     ("w2a16-g32-asym", "q4_0"), ("w5a16-g32", "q5_0")],
)  # fmt: skip
def test_a_lowbit_result_is_carried_over_without_loss(tiny: Path, tmp_path: Path, scheme: str, kind: str) -> None:
    lowbit.quantize(tiny, tmp_path / "out", scheme=scheme, method="rtn")
    document = export(tmp_path / "out", tmp_path / "out.gguf", "gguf")
    assert {r["type"] for r in document["layers"]} == {kind}
    assert torch.equal(logits(tmp_path / "out.gguf"), logits(tmp_path / "out"))


def test_methods_differ_in_error_and_not_in_size(wide: Path, text_file: Path, tmp_path: Path) -> None:
    words = {"type": "q4_k_m", "calibration": str(text_file), "samples": 16, "seq_len": 128}
    gptq = export(wide, tmp_path / "gptq.gguf", "gguf", method="gptq", **words)
    search = export(wide, tmp_path / "search.gguf", "gguf", method="search", **words)
    assert gptq["bytes"] == search["bytes"]
    assert {t["name"]: t["type"] for t in gptq["tensors"]} == {t["name"]: t["type"] for t in search["tensors"]}
    calibrated = [r for r in gptq["layers"] if r["loss"] is not None]
    assert len(calibrated) == 15  # seven linears in each of two blocks, and the head
    assert sum(r["loss"] for r in calibrated) < 0.8 * sum(r["loss_search"] for r in calibrated)


def test_a_k_quant_file_can_be_evaluated(wide: Path, text_file: Path, tmp_path: Path) -> None:
    words = {"calibration": str(text_file), "samples": 16, "seq_len": 128}
    kl = []
    for kind in ("q2_k", "q4_k", "q6_k"):
        export(wide, tmp_path / f"{kind}.gguf", "gguf", type=kind, **words)
        document = evaluate([tmp_path / f"{kind}.gguf"], text_file, against=wide, seq_len=128, runtime="float32")
        kl.append(document["results"][0]["kl"]["mean"])
    assert kl[0] > 3 * kl[1] > 9 * kl[2] > 0


def test_overrides_and_narrow_matrices(tiny: Path, wide: Path, tmp_path: Path) -> None:
    words = {"type": "q4_k", "method": "search"}
    document = export(wide, tmp_path / "a.gguf", "gguf", override=(("*.down_proj", "q8_0"),), **words)
    types = {t["name"]: t["type"] for t in document["tensors"]}
    assert (types["blk.0.ffn_down.weight"], types["blk.0.ffn_up.weight"]) == ("q8_0", "q4_k")
    assert (types["output.weight"], types["output_norm.weight"]) == ("q6_k", "f32")
    narrow = export(tiny, tmp_path / "b.gguf", "gguf", **words)
    assert {t["name"]: t["type"] for t in narrow["tensors"]}["blk.0.ffn_up.weight"] == "q5_0"
    with pytest.raises(InputError, match="no weight matrix"):
        export(wide, tmp_path / "c.gguf", "gguf", override=(("nothing", "q8_0"),), **words)


def test_mixtures_follow_the_published_rules() -> None:
    class Config:
        num_hidden_layers, num_attention_heads, num_key_value_heads = 32, 32, 8
        tie_word_embeddings = False

    def chosen(mixture: str, part: str, layer: int) -> str:
        return choose_type(mixture, f"blk.{layer}.{part}.weight", (4096, 4096), Config).name

    more = [i for i in range(32) if chosen("q4_k_m", "ffn_down", i) == "q6_k"]
    assert more == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert [chosen("q3_k_m", "attn_v", i) for i in (0, 1, 2)] == ["q5_k", "q5_k", "q4_k"]
    assert chosen("q2_k", "attn_v", 0) == "q4_k"  # four query heads share a key head
    assert chosen("q4_k_m", "attn_q", 0) == "q4_k"


def test_permuting_heads_is_undone() -> None:
    rows = torch.arange(2 * 8 * 3).reshape(16, 3)
    assert torch.equal(unpermute_heads(permute_heads(rows, 2), 2), rows)
    assert permute_heads(torch.arange(8), 1).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_the_tokenizer_goes_along(tiny: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    export(tmp_path / "model", tmp_path / "a.gguf", "gguf", type="f16")
    metadata = read_gguf(tmp_path / "a.gguf").metadata
    own = json.loads((tiny / "tokenizer.json").read_text())["model"]
    assert metadata["tokenizer.chat_template"] == template
    assert (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert metadata["tokenizer.ggml.bos_token_id"] == 1
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert [own["vocab"][t] for t in metadata["tokenizer.ggml.tokens"][3:]] == list(range(3, 4096))
    assert metadata["tokenizer.ggml.merges"] == [" ".join(m) for m in own["merges"]]
    assert metadata["tokenizer.ggml.token_type"].tolist()[:4] == [2, 3, 3, 1]


def test_an_unknown_way_to_split_text_is_refused(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    words = json.loads(file.read_text())
    words["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}  # fmt: skip
    file.write_text(json.dumps(words))
    with pytest.raises(InputError, match="no name for this tokenizer's way"):
        export(tmp_path / "model", tmp_path / "a.gguf", "gguf", type="f16")
    assert not (tmp_path / "a.gguf").exists()


def test_what_gguf_cannot_carry_is_refused_before_work(tiny: Path, tmp_path: Path) -> None:
    lowbit.quantize(tiny, tmp_path / "fp8", scheme="fp8", method="rtn")
    with pytest.raises(InputError, match=r"no FP8 weights.*Formats that can: modelopt"):
        export(tmp_path / "fp8", tmp_path / "a.gguf", "gguf")
    lowbit.quantize(tiny, tmp_path / "w4", scheme="w4a16-g32", method="rtn")
    with pytest.raises(InputError, match="already quantized"):
        export(tmp_path / "w4", tmp_path / "a.gguf", "gguf", type="q4_k")
    with pytest.raises(InputError, match="Did you mean q4_k"):
        export(tiny, tmp_path / "a.gguf", "gguf", type="q4_km")
    save_random(tmp_path / "gemma2", "gemma2", head_dim=32, query_pre_attn_scalar=64, tie_word_embeddings=True)
    with pytest.raises(InputError, match="scales gemma2's queries"):
        export(tmp_path / "gemma2", tmp_path / "a.gguf", "gguf", type="f16")
    (tmp_path / "b.gguf").write_text("something")
    with pytest.raises(InputError, match="--force"):
        export(tiny, tmp_path / "b.gguf", "gguf", type="f16")
    assert not (tmp_path / "a.gguf").exists()
    assert (tmp_path / "b.gguf").read_text() == "something"


def test_a_gguf_file_is_a_source_of_exports(tiny: Path, tmp_path: Path) -> None:
    """Q4_0's codes become GPTQ's, and a file in full precision is quantized like the model that it was made from."""
    export(tiny, tmp_path / "full.gguf", "gguf", type="bf16")
    export(tiny, tmp_path / "q4.gguf", "gguf", type="q4_0", method="search", override=(("lm_head", "q4_0"),))
    export(tmp_path / "q4.gguf", tmp_path / "gptq", "gptq")
    assert torch.equal(logits(tmp_path / "gptq"), logits(tmp_path / "q4.gguf"))
    own, there = (load_tokenizer(open_checkpoint(p)) for p in (tiny, tmp_path / "gptq"))
    assert own("def f(x):  # ü")["input_ids"] == there("def f(x):  # ü")["input_ids"]
    export(tmp_path / "full.gguf", tmp_path / "again.gguf", "gguf", type="q8_0", method="search")
    export(tiny, tmp_path / "once.gguf", "gguf", type="q8_0", method="search")
    assert torch.equal(logits(tmp_path / "again.gguf"), logits(tmp_path / "once.gguf"))


def test_a_gguf_file_is_no_source_of_quantization_or_of_itself(tiny: Path, tmp_path: Path) -> None:
    export(tiny, tmp_path / "a.gguf", "gguf", type="f16")
    export(tiny, tmp_path / "q.gguf", "gguf", type="q8_0", method="search")
    with pytest.raises(InputError, match="is a quantized GGUF file already"):
        export(tmp_path / "q.gguf", tmp_path / "b.gguf", "gguf")
    with pytest.raises(InputError, match="quantizes Hugging Face directories, not GGUF files"):
        lowbit.quantize(tmp_path / "a.gguf", tmp_path / "out", scheme="w4a16-g32", method="rtn")
    assert open_checkpoint(tmp_path / "a.gguf").digest != open_checkpoint(tiny).digest
