"""GPTQModel makes DIRECTORY: make_gptqmodel.py MODEL "gptq N bits" DIRECTORY TOKENS.npy OUT.npz (in its environment).

OUT.npz has the log-probabilities of what it wrote, as its own torch kernel reads it.
"""

import contextlib
import json
import os
import sys
import tempfile
from importlib.metadata import version

import numpy as np
import torch


def main() -> None:
    source, scheme, path, tokens, out = sys.argv[1:]
    source, path, tokens, out = map(os.path.abspath, (source, path, tokens, out))
    cores = os.cpu_count() or 1
    os.cpu_count = lambda: max(cores, 8)  # its thread pools refuse to start on a few cores
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    given = np.load(tokens)
    data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in given.tolist()]
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):  # it leaves its log where it runs
        config = QuantizeConfig(bits=int(scheme.split()[1]), group_size=128, desc_act=False)
        model = GPTQModel.load(source, config, device="cpu")
        model.quantize(data, batch_size=8)
        model.save(path)
        again = GPTQModel.load(path, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model.eval()
        with torch.no_grad():
            logits = again(input_ids=torch.from_numpy(given)).logits.float()
    np.savez(out, logprobs=logits.log_softmax(-1).numpy())
    print(json.dumps({"versions": {"GPTQModel": version("gptqmodel")}}))


if __name__ == "__main__":
    main()
