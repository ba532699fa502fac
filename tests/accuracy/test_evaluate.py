"""evaluate's numbers against their definitions, computed another way."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowbit.accuracy import evaluate
from lowbit.accuracy.measure import cut_windows, measure
from lowbit.artifact import read_manifest
from lowbit.console import set_verbosity
from lowbit.errors import InputError
from lowbit.pipeline import quantize


@pytest.fixture(scope="module")
def quantized(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluate") / "w4"
    quantize(tiny, out, scheme="w4a16-g32", method="rtn")
    return out


def test_against_a_loop_over_tokens(tiny: Path, quantized: Path, text_file: Path) -> None:
    """Perplexity, KL and agreement from a plain transformers loop in float64 give the same numbers."""
    document = evaluate([quantized], text_file, against=tiny, seq_len=64, runtime="float32")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    ids = tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"]
    original = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    other = AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.float32)
    nll, kl, same = [], [], []
    for start in range(0, len(ids) - 63, 64):
        x = torch.tensor([ids[start : start + 64]])
        with torch.no_grad():
            p = original(x).logits[0, :-1].double().log_softmax(-1)
            q = other(x).logits[0, :-1].double().log_softmax(-1)
        for i in range(63):
            nll.append(-float(q[i, x[0, i + 1]]))
            kl.append(float((p[i].exp() * (p[i] - q[i])).sum()))
            same.append(bool(p[i].argmax() == q[i].argmax()))
    result = document["results"][0]
    assert document["tokens"] == len(ids) // 64 * 64
    assert result["perplexity"] == pytest.approx(np.exp(np.mean(nll)), rel=2e-4)
    assert result["kl"]["mean"] == pytest.approx(np.mean(kl), rel=1e-2)
    assert result["top1_agreement"] == pytest.approx(np.mean(same), abs=2e-3)


def test_a_model_against_itself_loses_nothing(tiny: Path, text_file: Path) -> None:
    document = evaluate([tiny], text_file, against=tiny, seq_len=64, runtime="float32")
    kl = document["results"][0]["kl"]
    assert (kl["mean"], kl["stderr"]) == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))
    assert document["results"][0]["mcnemar"]["p_value"] == 1
    assert document["results"][0]["top1_agreement"] == 1
    assert document["noise_floor"]["kl"] == pytest.approx(0, abs=1e-9)


def test_stderr_is_over_windows() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(16, 16, generator=generator)
    noise = 0.3 * torch.randn(16, 16, generator=generator)
    windows = torch.randint(0, 16, (40, 8), generator=generator)
    truth, other = measure(lambda x: table[x], [lambda x: (table + noise)[x]], windows, 16)
    assert (truth.kl == 0).all()
    assert len(other.kl) == 40
    assert other.stderr(other.kl) == pytest.approx(other.kl.std(ddof=1) / np.sqrt(40))


def test_the_reference_defaults_to_what_the_output_was_made_from(tiny: Path, quantized: Path, text_file: Path) -> None:
    document = evaluate([quantized], text_file, seq_len=64)
    assert document["reference"]["model"] == str(tiny) == read_manifest(quantized)["model"]["name"]
    assert json.loads((quantized / "evaluate.json").read_text())["results"][0]["kl"]["mean"] > 0


def test_gates_say_whether_they_are_met(tiny: Path, quantized: Path, text_file: Path) -> None:
    document = evaluate([quantized], text_file, against=tiny, seq_len=64, max_ppl_increase=1e-9, max_kl=1e9)
    gates = {g["gate"]: g for g in document["results"][0]["gates"]}
    assert gates["kl"]["met"]
    assert gates["perplexity_increase"]["met"] == (document["results"][0]["perplexity_increase"] <= 1e-9)


def test_bad_input(tiny: Path, quantized: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="itself quantized"):
        evaluate([tiny], text_file, against=quantized)
    with pytest.raises(InputError, match=r"exceeds the model's context \(256\)"):
        evaluate([tiny], text_file, seq_len=1000)
    short = tmp_path / "short.txt"
    short.write_text("import os\n")
    with pytest.raises(InputError, match="do not fill one window of 256"):
        evaluate([tiny], short)
    with pytest.raises(InputError, match="no text to evaluate on"):
        evaluate([tiny])
    with pytest.raises(InputError, match="at least 2"):
        cut_windows(np.arange(10), 1, "text")


def test_models_are_compared_window_by_window(tiny: Path, quantized: Path, text_file: Path, tmp_path: Path) -> None:
    quantize(tiny, tmp_path / "w8", scheme="w8a16-g32", method="rtn")
    document = evaluate([quantized, tmp_path / "w8"], text_file, against=tiny, seq_len=64, runtime="float32")
    (comparison,) = document["comparisons"]
    assert (comparison["model"], comparison["against"]) == (str(tmp_path / "w8"), str(quantized))
    w4, w8 = (np.array(r["per_window"]["kl"]) for r in document["results"])
    assert comparison["kl_difference"]["estimate"] == pytest.approx((w8 - w4).mean())
    assert comparison["kl_difference"]["high"] < 0


def test_a_text_too_short_for_the_limit_is_said_to_be(
    tiny: Path, quantized: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit at the estimate itself lies inside any interval; one far away does not; one window has no interval."""
    options: dict[str, Any] = {"against": tiny, "seq_len": 64, "windows": 6, "runtime": "float32"}
    kl = evaluate([quantized], text_file, **options)["results"][0]["kl"]["mean"]
    set_verbosity(1)
    try:
        (near,) = evaluate([quantized], text_file, **options, max_kl=kl * 1.001)["results"][0]["gates"]
        assert near["met"]
        assert not near["decided"]
        assert near["interval"]["low"] < kl < near["interval"]["high"]
        said = " ".join(capsys.readouterr().err.split())
        assert "too short to decide kl" in said
        assert int(re.search(r"about (\d+) windows would, this text has 6", said)[1]) > 100  # type: ignore[index]
        (far,) = evaluate([quantized], text_file, **options, max_kl=kl * 100)["results"][0]["gates"]
        assert far["met"]
        assert far["decided"]
        assert "too short" not in capsys.readouterr().err
    finally:
        set_verbosity(0)
    with pytest.raises(InputError, match="a single window, and one value has no interval"):
        evaluate([quantized], text_file, **options | {"windows": 1}, max_kl=1.0)
