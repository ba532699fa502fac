"""vLLM's CPU build, prefill: for every line on stdin, the tokens a second of one prompt of random tokens.

    VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 vllm/bin/python run_vllm.py MODEL_DIRECTORY

Offline engine in this process, bfloat16, no prefix cache, one generated token: its time is counted with the prompt's.
"""

import json
import os
import random
import sys
import time

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

if __name__ == "__main__":
    replies = os.fdopen(os.dup(1), "w")  # the engine prints to stdout
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams

    model = LLM(
        sys.argv[1], dtype="bfloat16", max_model_len=1024, enable_prefix_caching=False, skip_tokenizer_init=True,
        enforce_eager=bool(os.environ.get("EAGER")),
    )  # fmt: skip
    one = SamplingParams(max_tokens=1, detokenize=False, temperature=0.0)

    def prefill(length: int) -> float:
        """Seconds."""
        prompt = {"prompt_token_ids": [random.randrange(10, 31000) for _ in range(length)]}
        start = time.perf_counter()
        model.generate([prompt], one, use_tqdm=False)
        return time.perf_counter() - start

    prefill(512)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        length = json.loads(line)["prefill"]
        print(json.dumps({"tokens_per_s": length / min(prefill(length) for _ in range(2))}), file=replies, flush=True)
