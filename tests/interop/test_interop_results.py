"""docs/interop.md is what `make interop` measured, and what it measured is agreement."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "interop"))

from page import render, within  # noqa: E402

DOCUMENT = json.loads((ROOT / "benchmarks" / "results" / "interop.json").read_text())
# llama.cpp multiplies 8-bit activations with quantized weights: the same weights in full precision have to agree.
# Schemes that round activations: two correct engines differ by rounding's noise, as lowbit does from itself in float64.
ROUNDED = {("llama.cpp", "gguf q8_0"), ("llama.cpp", "gguf q4_0"), ("llama.cpp", "w4a16-g32 gguf"),
           ("onnx", "w8a8 onnx"), ("onnx", "w4a8 onnx"), ("vllm", "w8a8"), ("float64", "w8a8")}  # fmt: skip

FP8_CACHE = ("vllm", "none kv fp8")  # docs/interop.md says how it differs


def test_the_page_is_the_runs_numbers() -> None:
    assert (ROOT / "docs" / "interop.md").read_text() == render(DOCUMENT)


def test_readers_agree() -> None:
    rows = {(r["reader"], r["file"]): r for r in DOCUMENT["results"]}
    apart = [key for key, row in rows.items() if not within(row) and key not in ROUNDED | {FP8_CACHE}]
    assert not apart
    assert rows["llama.cpp", "gguf q8_0 as f32"]["same_token"] >= 0.995
    assert rows["onnx", "w8a8 onnx"]["mean_difference"] <= 1.5 * rows["float64", "w8a8"]["mean_difference"]
    for key in ROUNDED & rows.keys():
        assert rows[key]["same_token"] >= 0.97
        assert rows[key]["mean_difference"] <= 0.05
