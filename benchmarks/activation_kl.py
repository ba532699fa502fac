"""What the native kernels' int8 activations and int8 head cost in accuracy, beside the same weights in float32.

    python benchmarks/activation_kl.py [--outlier DIRECTORY] [--windows 48]

Every recipe is evaluated twice on the same windows of 512 tokens, spread over the demo's evaluation text: through
transformers in float32 with dequantized weights, and through the native decoder. KL to the float32 original.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lowbit
from lowbit.console import set_verbosity
from lowbit.environment import environment
from lowbit.model.checkpoint import DEMO

HERE = Path(__file__).resolve().parent
INT8 = "w8a16-channel"
RECIPES: list[dict[str, Any]] = [
    {"scheme": "w4a16-g32", "method": "rtn"},
    {"scheme": INT8, "method": "rtn"},
    # the recipe whose size and speed are compared with llama.cpp's 4-bit files
    {"scheme": "w4a16-g128", "method": "gptq", "override": (("lm_head", INT8), ("embed_tokens", INT8))},
]


def measure(name: str, model: str, recipe: dict[str, Any], windows: int) -> dict[str, Any]:
    text = {"calibration": str(DEMO / "calibration.txt")} if recipe["method"] != "rtn" else {}
    row: dict[str, Any] = {"model": name, **recipe}
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "q")
        lowbit.quantize(model, out, **recipe, **text)
        for runtime in ("float32", "auto"):
            words: dict[str, Any] = {"against": model, "seq_len": 512, "windows": windows, "runtime": runtime}
            result = lowbit.evaluate([out], DEMO / "evaluation.txt", **words)["results"][0]
            row["float32" if runtime == "float32" else "native"] = {
                "runtime": result["runtime"],
                "kl": result["kl"]["mean"],
                "stderr": result["kl"]["stderr"],
            }
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--outlier", help="directory of the model with activation outliers")
    p.add_argument("--windows", type=int, default=48)
    p.add_argument("--output", type=Path, default=HERE / "results" / "activation_kl.json")
    a = p.parse_args()
    set_verbosity(0)
    models = {"demo": "demo"} | ({"outlier": a.outlier} if a.outlier else {})
    rows = [measure(name, path, recipe, a.windows) for name, path in models.items() for recipe in RECIPES]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "environment": environment(),
        "windows": a.windows,
        "rows": rows,
    }
    a.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
