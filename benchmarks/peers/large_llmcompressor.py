"""llm-compressor's GPTQ, w4 in groups of 128, on a model of any size, saved as it would be used:

    MODEL=DIR large_llmcompressor.py SAMPLES OUT

The model is loaded in its own dtype, and there is no reference beside it: what is in memory is the job's.
"""

import json
import os
import sys
from importlib.metadata import version

import torch
from common import MODEL, WINDOW, Stopwatch, calibration_windows, keep_stdout, machine
from run_llmcompressor import recipe


def main() -> None:
    samples, out = int(sys.argv[1]), os.path.abspath(sys.argv[2])
    stdout = keep_stdout()

    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    rows = calibration_windows(samples).tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * WINDOW] * samples})
    with Stopwatch() as watch:
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto").eval()
        oneshot(
            model=model,
            dataset=data,
            recipe=recipe("gptq4"),
            max_seq_length=WINDOW,
            num_calibration_samples=samples,
            shuffle_calibration_samples=False,
        )
        model.save_pretrained(out, save_compressed=True)
    row = {
        "tool": "llmcompressor",
        "version": version("llmcompressor"),
        "seconds": round(watch.seconds, 1),
        "cpu_seconds": round(watch.cpu_seconds, 1),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": machine(),
    }
    os.write(stdout, (json.dumps(row) + "\n").encode())


if __name__ == "__main__":
    main()
