"""Quantize the model with llm-compressor and measure the result: run_llmcompressor.py KIND [--windows FILE.npz].

Blocks' linears only, groups of 128 input channels where weights are grouped. Symmetric, except awq4.
"""

from typing import Any

import torch
from common import WINDOW, Stopwatch, arguments, calibration_windows, evaluate, keep_stdout, load_reference, report

KINDS = ("rtn4", "rtn3", "gptq4", "gptq3", "gptq2", "awq4", "smoothquant-gptq-w8a8", "rtn-w8a8", "fp8-dynamic")
LINEARS: dict[str, Any] = {"targets": "Linear", "ignore": ["lm_head"]}


def grouped(bits: int, symmetric: bool = True) -> dict[str, Any]:
    """The arguments of a modifier that quantizes weights alone, in groups of 128."""
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 128}
    return {"config_groups": {"linears": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}


def recipe(kind: str) -> list[Any]:
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    match kind:
        case "rtn3" | "rtn4":
            return [QuantizationModifier(**grouped(int(kind[-1])))]
        case "gptq2" | "gptq3" | "gptq4":
            return [GPTQModifier(**grouped(int(kind[-1])))]
        case "awq4":
            return [AWQModifier(), QuantizationModifier(**grouped(4, symmetric=False))]
        case "rtn-w8a8":
            return [QuantizationModifier(scheme="W8A8", **LINEARS)]
        case "smoothquant-gptq-w8a8":
            return [SmoothQuantModifier(smoothing_strength=0.8), GPTQModifier(scheme="W8A8", **LINEARS)]
        case "fp8-dynamic":
            return [QuantizationModifier(scheme="FP8_DYNAMIC", **LINEARS)]
    raise ValueError(f"{kind}: expected one of {', '.join(KINDS)}")


def main() -> None:
    args = arguments("kind", KINDS, __doc__)
    stdout = keep_stdout()
    if not torch.accelerator.is_available():  # AWQ pins memory for an accelerator that need not be there
        torch.Tensor.pin_memory = lambda tensor, *_: tensor

    from datasets import Dataset
    from llmcompressor import oneshot

    rows = calibration_windows().tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * WINDOW] * len(rows)})
    model, reference, steps = load_reference(), load_reference(), recipe(args.kind)
    with Stopwatch() as watch:
        oneshot(
            model=model,
            dataset=data,
            recipe=steps,
            max_seq_length=WINDOW,
            num_calibration_samples=len(rows),
            shuffle_calibration_samples=False,
        )
    report(stdout, "llmcompressor", args.kind, watch, evaluate(model, reference), args.windows)


if __name__ == "__main__":
    main()
