"""docs/interop.md is what `make interop` measured, and what it measured is agreement."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "interop"))

from page import render, within  # noqa: E402

DOCUMENT = json.loads((ROOT / "benchmarks" / "results" / "interop.json").read_text())
# Files whose reader, or whose scheme, rounds activations: two correct engines differ by rounding's own noise. Each has
# a row beside it that leaves only the weights to differ, or a yardstick: lowbit against itself in float64, or, for
# kernels that know no float32, in bfloat16.
WEIGHTS_ALONE = {
    ("transformers", "fp8-block"): ("transformers", "fp8-block weights alone"),
    ("llama.cpp", "gguf q8_0"): ("llama.cpp", "gguf q8_0 as f32"),
    ("llama.cpp", "gguf q4_0"): ("gguf", "gguf q4_0"),
    ("llama.cpp", "w4a16-g32 gguf"): ("gguf", "w4a16-g32 gguf"),
    ("llmcompressor", "W8A8 made there"): ("llmcompressor", "W8A8 weights alone made there"),
    ("onnx", "w8a8 onnx"): ("onnx", "w8a16-channel onnx"),
    ("onnx", "w4a8 onnx"): ("onnx", "w4a16-g128 onnx"),
}
# this reader leaves activations as they are: the row is what FP8 activations cost, not how far two readers are apart
ONE_SIDED = {("transformers", "fp8-block")}
YARDSTICK, HALF = ("float64", "w8a8"), ("bfloat16", "w4a16-g128")
IN_BFLOAT16 = ("vllm", "w4a16-g128")
ROUNDED = {*WEIGHTS_ALONE, ("vllm", "w8a8"), YARDSTICK, HALF, IN_BFLOAT16}
FP8_CACHE = ("vllm", "none kv fp8")  # docs/interop.md says how it differs


def test_the_page_is_the_runs_numbers() -> None:
    assert (ROOT / "docs" / "interop.md").read_text() == render(DOCUMENT)


def test_readers_agree() -> None:
    rows = {(r["reader"], r["file"]): r for r in DOCUMENT["results"]}
    apart = [key for key, row in rows.items() if not within(row) and key not in ROUNDED | {FP8_CACHE}]
    assert not apart
    for rounded, weights in WEIGHTS_ALONE.items():
        assert rounded not in rows or (weights in rows and within(rows[weights])), f"nothing shows {rounded}'s weights"
    assert rows["llama.cpp", "gguf q8_0 as f32"]["same_token"] >= 0.995
    for key, own in ((("onnx", "w8a8 onnx"), YARDSTICK), (("vllm", "w8a8"), YARDSTICK), (IN_BFLOAT16, HALF)):
        assert rows[key]["mean_difference"] <= 1.5 * rows[own]["mean_difference"]
    for key in (ROUNDED - ONE_SIDED) & rows.keys():
        assert rows[key]["same_token"] >= 0.97
        assert rows[key]["mean_difference"] <= 0.05
