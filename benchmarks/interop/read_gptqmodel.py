"""GPTQModel reads DIRECTORY: read_gptqmodel.py DIRECTORY TOKENS.npy OUT.npz (in GPTQModel's own environment)."""

import contextlib
import json
import os
import sys
import tempfile
from importlib.metadata import version

import numpy as np
import torch


@torch.no_grad()
def main() -> None:
    path, tokens, out = map(os.path.abspath, sys.argv[1:])
    cores = os.cpu_count() or 1
    os.cpu_count = lambda: max(cores, 8)  # its thread pools refuse to start on a few cores
    from gptqmodel import BACKEND, GPTQModel

    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):  # it leaves its log where it runs
        backend = BACKEND.TORCH_AWQ if "awq" in os.path.basename(path) else BACKEND.TORCH
        model = GPTQModel.load(path, device="cpu", backend=backend, dtype=torch.float16).model.eval()
        logits = model(input_ids=torch.from_numpy(np.load(tokens))).logits.float()
    np.savez(out, logprobs=logits.log_softmax(-1).numpy())
    print(json.dumps({"versions": {"GPTQModel": version("gptqmodel")}}))


if __name__ == "__main__":
    main()
