"""transformers reads DIRECTORY: read_transformers.py DIRECTORY TOKENS.npy OUT.npz (in an environment of its own)."""

import json
import sys
from importlib.metadata import version

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig


@torch.no_grad()
def main() -> None:
    path, tokens, out = sys.argv[1:]
    config = CompressedTensorsConfig(dequantize=True)  # packed zero points need it
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config).eval()
    logits = model(torch.from_numpy(np.load(tokens))).logits.float()
    np.savez(out, logprobs=logits.log_softmax(-1).numpy())
    names = ("transformers", "compressed-tensors")
    print(json.dumps({"versions": {name: version(name) for name in names}}))


if __name__ == "__main__":
    main()
