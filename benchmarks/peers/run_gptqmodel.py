"""Quantize the model with GPTQModel and measure what it saved: run_gptqmodel.py BITS [--windows FILE.npz].

Symmetric, groups of 128, no activation order. The saved model is reloaded with GPTQModel's torch kernel.
"""

import contextlib
import os
import tempfile

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

BATCH = 8


def main() -> None:
    args = arguments("bits", ("2", "3", "4", "8"), __doc__)
    stdout = keep_stdout()
    cores = os.cpu_count() or 1
    os.cpu_count = lambda: max(cores, 8)  # its thread pools refuse to start on a few cores

    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    rows = calibration_windows().tolist()
    data = [{"input_ids": row, "attention_mask": [1] * WINDOW} for row in rows]
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):  # it leaves its log where it runs
        config = QuantizeConfig(bits=int(args.bits), group_size=128, desc_act=False)
        model = GPTQModel.load(MODEL, config, device="cpu")
        with Stopwatch() as watch:
            model.quantize(data, batch_size=BATCH)
        model.save("out")
        quantized = GPTQModel.load("out", device="cpu", backend=BACKEND.TORCH).model
        windows = evaluate(quantized, load_reference())
    report(stdout, "gptqmodel", f"gptq{args.bits}", watch, windows, args.windows)


if __name__ == "__main__":
    main()
