"""What each part of GPTQ contributes on the demo model: python benchmarks/ablate_gptq.py [--output FILE].

Every variant is quantized with the demo's calibration text and all are evaluated in one pass (float32, dequantized).
"""

import argparse
import json
import tempfile
from pathlib import Path

from lowbit.accuracy import evaluate
from lowbit.environment import environment
from lowbit.pipeline import quantize

VARIANTS = {
    "rtn, min-max": ("rtn", {"scale_search": "false"}),
    "rtn, searched scales": ("rtn", {}),
    "gptq, min-max scales, no sweeps, no order": (
        "gptq", {"scale_search": "false", "sweeps": "0", "desc_act": "false"}
    ),
    "gptq, searched scales, no sweeps, no order": ("gptq", {"sweeps": "0", "desc_act": "false"}),
    "gptq, searched scales, no sweeps": ("gptq", {"sweeps": "0"}),
    "gptq (as shipped: two sweeps)": ("gptq", {}),
    "gptq, eight sweeps": ("gptq", {"sweeps": "8"}),
    "gptq, dampening_frac 0.001": ("gptq", {"dampening_frac": "0.001"}),
    "gptq, dampening_frac 0.1": ("gptq", {"dampening_frac": "0.1"}),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gptq-ablation.json")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for scheme in ("w4a16-g128", "w3a16-g128", "w2a16-g128"):
            paths = []
            for i, (method, settings) in enumerate(VARIANTS.values()):
                paths.append(f"{folder}/{scheme}-{i}")
                quantize("demo", paths[-1], scheme=scheme, method=method, set=tuple(settings.items()))
            results = evaluate(paths, seq_len=512, runtime="float32")["results"]
            for name, result in zip(VARIANTS, results, strict=True):
                row = {"scheme": scheme, "variant": name, "perplexity": result["perplexity"], "kl": result["kl"]}
                print(json.dumps(row), flush=True)
                rows.append(row)
            args.output.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
