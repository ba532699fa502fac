"""The order of the methods holds on models that nothing was tuned on: other families, widths, head counts, biases,
tied embeddings and other text than the demo's. Two models are trained here, for half a minute each, on English prose
(Python's language reference, which comes with the interpreter)."""

import shutil
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import lowbit
from lowbit.model.checkpoint import DEMO

WINDOW, STEPS = 96, 120
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": 4096}
# widths that are no powers of two, one or five query heads to a key-value head, biases, embeddings tied
QWEN = {
    "hidden_size": 160, "intermediate_size": 416, "num_hidden_layers": 2, "num_attention_heads": 5,
    "num_key_value_heads": 1, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip
GPT2 = {"n_embd": 96, "n_inner": 352, "n_layer": 2, "n_head": 3, "n_positions": 256}


def prose() -> tuple[str, str]:
    """(to learn and calibrate on, to evaluate on)"""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    cut = len(text) * 9 // 10
    return text[:cut], text[cut : cut + 60_000]


def train(net: PreTrainedModel, path: Path) -> Path:
    """A few hundred thousand tokens: enough that its weights are no longer noise and its answers depend on them."""
    tokens = AutoTokenizer.from_pretrained(DEMO / "model")(prose()[0], return_tensors="pt")["input_ids"][0]
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, STEPS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        starts = torch.randint(0, len(tokens) - WINDOW, (16,), generator=generator)
        batch = torch.stack([tokens[s : s + WINDOW] for s in starts.tolist()])
        loss = net(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert loss.item() < 6.5  # of ln 4096 = 8.3 at the start
    net.to(torch.bfloat16).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / "model" / name, path / name)
    return path


@pytest.fixture(scope="module", params=["qwen2", "gpt2"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    still = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    made = {
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**QWEN, **ENDS)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, **ENDS, **still)),
    }
    return train(made[request.param](), tmp_path_factory.mktemp("trained") / request.param)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("prose")
    for name, text in zip(("learn.txt", "judge.txt"), prose(), strict=True):
        (folder / name).write_text(text, encoding="utf-8")
    return str(folder / "learn.txt"), str(folder / "judge.txt")


def test_the_order_of_the_methods_holds(trained: Path, texts: tuple[str, str], tmp_path: Path) -> None:
    learn, judge = texts
    recipes: dict[str, dict[str, Any]] = {
        "w4 rtn": {"scheme": "w4a16-g32", "method": "rtn"},
        "w4 gptq": {"scheme": "w4a16-g32", "method": "gptq"},
        "w4 awq+gptq": {"scheme": "w4a16-g32", "method": "awq+gptq"},
        "w3 rtn": {"scheme": "w3a16-g32", "method": "rtn"},
        "w3 gptq": {"scheme": "w3a16-g32", "method": "gptq"},
        "w3 signround": {"scheme": "w3a16-g32", "method": "signround"},
        "w2 gptq": {"scheme": "w2a16-g32", "method": "gptq"},
        "w2 lattice": {"scheme": "e8p2", "method": "quip"},
        "w8a8 smoothquant+gptq": {"scheme": "w8a8", "method": "smoothquant+gptq"},
        "fp8 rtn": {"scheme": "fp8", "method": "rtn"},
    }
    for name, recipe in recipes.items():
        lowbit.quantize(trained, tmp_path / name, calibration=learn, samples=64, seq_len=WINDOW, **recipe)
    paths = [str(tmp_path / name) for name in recipes]
    document = lowbit.evaluate(paths, judge, against=str(trained), seq_len=WINDOW, runtime="float32")
    kl = {name: row["kl"]["mean"] for name, row in zip(recipes, document["results"], strict=True)}
    print(kl)
    assert kl["w4 gptq"] < 0.8 * kl["w4 rtn"]
    assert kl["w4 awq+gptq"] < 0.8 * kl["w4 rtn"]
    assert kl["w3 gptq"] < 0.8 * kl["w3 rtn"]
    assert kl["w3 signround"] < kl["w3 gptq"]
    assert kl["w2 lattice"] < 0.7 * kl["w2 gptq"]
    assert kl["w8a8 smoothquant+gptq"] < 0.5 * kl["w4 gptq"]
    assert kl["fp8 rtn"] < kl["w3 gptq"]
