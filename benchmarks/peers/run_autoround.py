"""Quantize the model with AutoRound and measure the result: run_autoround.py BITS [--windows FILE.npz].

Symmetric, groups of 128, 200 iterations (its default), float32, in memory.
"""

import contextlib
import tempfile

import torch
from common import (
    MODEL,
    WINDOW,
    Stopwatch,
    arguments,
    calibration_windows,
    evaluate,
    keep_stdout,
    load_reference,
    report,
)

ITERATIONS, SAMPLES = 200, 128


def main() -> None:
    args = arguments("bits", ("2", "3", "4"), __doc__)
    stdout = keep_stdout()

    from auto_round import AutoRound
    from transformers import AutoTokenizer

    ones = torch.ones(1, WINDOW, dtype=torch.long)
    data = [{"input_ids": row[None], "attention_mask": ones} for row in calibration_windows(SAMPLES)]
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        rounder = AutoRound(
            load_reference(), AutoTokenizer.from_pretrained(MODEL), bits=int(args.bits), group_size=128, sym=True,
            iters=ITERATIONS, nsamples=SAMPLES, seqlen=WINDOW, dataset=data, device_map="cpu",
        )  # fmt: skip
        with Stopwatch() as watch:
            model, _ = rounder.quantize()
        windows = evaluate(model, load_reference())
    report(stdout, "auto-round", f"autoround{args.bits}", watch, windows, args.windows)


if __name__ == "__main__":
    main()
