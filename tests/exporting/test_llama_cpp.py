"""llama.cpp computes from our files what transformers computes from the originals (needs llama-cpp-python)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_gguf import FAMILIES, save_random

from lowbit.exporting import export
from lowbit.model.checkpoint import open_checkpoint
from lowbit.model.load import load_tokenizer

pytestmark = [pytest.mark.interop, pytest.mark.interop_heavy]
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {kind: (kind, words) for kind, words in FAMILIES.items()} | {
    "one key head a query head": ("llama", {"num_key_value_heads": 4}),
    "biases": ("llama", {"attention_bias": True}),
    "llama 3 frequencies": ("llama", {"rope_parameters": LLAMA3}),
    "linear scaling": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    "gpt2": ("gpt2", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_teacher_forced_agreement(tmp_path: Path, case: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    kind, words = CASES[case]
    model = save_random(tmp_path / "m", kind, **words)  # llama.cpp treats files named phi3 in a special way
    export(tmp_path / "m", tmp_path / "m.gguf", "gguf", type="f32")
    tokens = np.random.default_rng(0).integers(3, 4096, 48)
    with torch.no_grad():
        own = model(input_ids=torch.from_numpy(tokens)[None]).logits[0].float().log_softmax(-1)
    engine = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    engine.eval(tokens.tolist())
    theirs = torch.from_numpy(np.array(engine.scores[: len(tokens)])).log_softmax(-1)
    assert float((own.argmax(-1) == theirs.argmax(-1)).float().mean()) >= 0.99
    assert float((own - theirs).abs().mean()) < 0.002


def test_text_becomes_the_same_tokens(tiny: Path, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    export(tiny, tmp_path / "m.gguf", "gguf", type="f16")
    engine = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    tokenizer = load_tokenizer(open_checkpoint(tiny))
    for text in ("def f(x):\n    return x ** 2  # ümläut\n", "  two  spaces\t", "it's 12345 — naïve 日本"):
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert engine.tokenize(text.encode(), add_bos=False) == own
