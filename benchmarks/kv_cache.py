"""What a quantized key-value cache costs in accuracy: KL of the demo model, weights as they were, cache by cache.

    python benchmarks/kv_cache.py [--windows 56] [--json FILE]

Every figure is `lowbit evaluate`'s, so the text goes through the cache of the engine. "float32" is transformers' model
class with the quantized cache; "native" is lowbit's decoder with the original's bf16 weights, whose own distance with
its fp16 cache is the first row.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from lowbit.accuracy import evaluate
from lowbit.console import set_verbosity
from lowbit.kv_scheme import KV_SCHEMES
from lowbit.pipeline import quantize
from lowbit.runtime.engine import load

SAMPLES = 32  # calibration windows of 512 tokens
CONTEXT = 1024


def figures(model: str, kv: str, runtime: str, windows: int) -> dict[str, Any]:
    result = evaluate([model], against="demo", seq_len=512, windows=windows, runtime=runtime, kv=kv)["results"][0]  # type: ignore[arg-type]
    return {"kl": result["kl"]["mean"], "stderr": result["kl"]["stderr"], "perplexity": result["perplexity"]}


def row(kv: str, windows: int, work: Path) -> dict[str, Any]:
    """One cache: quantized with calibration where its scales are stored, found at run time otherwise."""
    model = "demo"
    if kv != "none" and KV_SCHEMES[kv].static:
        model = str(work / kv)
        quantize("demo", model, scheme="none", method="rtn", kv=kv, samples=SAMPLES)
    engine = load(model, "auto", kv)
    return {
        "kv": kv,
        "bytes_per_token": engine.kv_bytes(CONTEXT) / CONTEXT,
        "float32": figures(model, kv, "float32", windows),
        "native": figures(model, kv, "auto", windows),
        "runtime": engine.runtime,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=56)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    set_verbosity(0)
    rows = []
    print("| cache | bytes a token | KL, float32 engine | KL, native engine |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        for kv in ("none", *KV_SCHEMES):
            rows.append(row(kv, a.windows, Path(work)))
            f, n = rows[-1]["float32"], rows[-1]["native"]
            cells = (f"{x['kl']:.5f} ± {x['stderr']:.5f}" for x in (f, n))
            print(f"| `{kv}` | {rows[-1]['bytes_per_token']:.0f} |", " | ".join(cells), "|", flush=True)
    if a.json:
        a.json.write_text(json.dumps({"windows": a.windows, "seq_len": 512, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
