"""What a quantized key-value cache costs in accuracy: KL of the demo model, weights as they were, cache by cache.

    python benchmarks/kv_cache.py [--windows 12] [--json FILE]

Scored as `lowbit evaluate` does, on windows of 512 spread over the evaluation text, through the cache of the engine.
"float32" is transformers' model class with the quantized cache; "native" is lowbit's decoder with the original's bf16
weights, whose own distance with its fp16 cache is the first row.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.accuracy.measure import Scores, cut_windows, measure
from lowbit.calibration import tokenize
from lowbit.console import set_verbosity
from lowbit.kv_scheme import KV_SCHEMES
from lowbit.model.checkpoint import DEMO, open_checkpoint
from lowbit.model.load import load_tokenizer
from lowbit.pipeline import quantize
from lowbit.runtime.base import Engine
from lowbit.runtime.engine import load

SAMPLES = 16  # calibration windows of 512 tokens
SEQ_LEN, CONTEXT = 512, 1024


def engines(kv: str, work: Path) -> tuple[Engine, Engine]:
    """(float32, native) with one cache: calibrated where its scales are stored."""
    model = "demo"
    if kv != "none" and KV_SCHEMES[kv].static:
        model = str(work / kv)
        quantize("demo", model, scheme="none", method="rtn", kv=kv, samples=SAMPLES)
    return load(model, "float32", kv=kv), load(model, "auto", kv=kv)


def figures(own: Scores) -> dict[str, Any]:
    return {"kl": float(own.kl.mean()), "stderr": Scores.stderr(own.kl), "perplexity": own.perplexity}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    set_verbosity(0)
    text = (DEMO / "evaluation.txt").read_text(encoding="utf-8")
    cut = cut_windows(tokenize(text, load_tokenizer(open_checkpoint("demo"))), SEQ_LEN, "the demo's text")
    cut = cut[np.linspace(0, len(cut) - 1, a.windows).round().astype(int)]
    with tempfile.TemporaryDirectory() as work:
        names = ["none", *KV_SCHEMES]
        both = [engines(kv, Path(work)) for kv in names]
    reference = load("demo", "float32")
    flat = [engine.logits for pair in both for engine in pair]
    scores = [figures(s) for s in measure(reference.logits, flat, cut, reference.vocab_size)[1:]]
    rows = []
    print("| cache | bytes a token | KL, float32 engine | KL, native engine |\n|---|---|---|---|")
    for i, (kv, (_, native)) in enumerate(zip(names, both, strict=True)):
        f, n = scores[2 * i : 2 * i + 2]
        size = native.kv_bytes(CONTEXT) / CONTEXT
        rows.append({"kv": kv, "bytes_per_token": size, "float32": f, "native": n, "runtime": native.runtime})
        print(f"| `{kv}` | {size:.0f} |", " | ".join(f"{x['kl']:.5f} ± {x['stderr']:.5f}" for x in (f, n)), "|")
    if a.json:
        a.json.write_text(json.dumps({"windows": a.windows, "seq_len": SEQ_LEN, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
