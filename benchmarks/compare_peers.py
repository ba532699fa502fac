"""W8A8, FP8 and 4 bits against llm-compressor, window by window: is lowbit's KL to the original larger?

    python benchmarks/compare_peers.py --llmcompressor VENV/bin/python [--model demo --model DIRECTORY ...]

For every model and every kind of peers/run_llmcompressor.py below, the peer's result and lowbit's are judged on the
same windows of the same text against the same float32 original: weights dequantized, activations rounded as the scheme
says. The ratio of the mean KLs has a paired bootstrap interval over windows; 1.05 as its upper end means "no worse".
Pairs that results/peers.json holds already are skipped, so an interrupted run goes on; --again measures them anew.
No times: benchmarks/compare_gptq.py takes those in alternating runs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from compare_gptq import last_json, lowbit_windows

from lowbit.environment import environment
from lowbit.model.checkpoint import DEMO

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "peers.json"
# the peer's kind -> what of lowbit's it is compared with: scheme, method
KINDS = {
    "smoothquant-gptq-w8a8": [("w8a8", "smoothquant+gptq")],
    "fp8-dynamic": [("fp8", "rtn"), ("fp8", "gptq")],
    "awq4": [("w4a16-asym", "awq"), ("w4a16", "awq"), ("w4a16", "awq+gptq")],
    "gptq4": [("w4a16", "gptq"), ("w4a16", "awq+gptq")],
}
RESAMPLES = 10_000
_QUANTIZE = """
import json, sys
import lowbit
from lowbit.console import set_verbosity
set_verbosity(0)
model, out, scheme, method, text = sys.argv[1:]
d = lowbit.quantize(model, out, scheme=scheme, method=method, calibration=text)
print(json.dumps({"bits_per_weight": d["bits_per_weight"],
                  "fallbacks": sum(r["fallback"] is not None for r in d["layers"])}))
"""


def kl_ratio(ours: np.ndarray, theirs: np.ndarray, seed: int = 0) -> dict[str, float]:
    """mean(ours) / mean(theirs) of one KL a window each, and its two-sided 95 % interval: windows are resampled."""
    n = len(ours)
    pick = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    ratios = ours[pick].mean(1) / theirs[pick].mean(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return {"estimate": float(ours.mean() / theirs.mean()), "low": float(low), "high": float(high)}


def run_peer(python: str, kind: str, model: Path, file: Path) -> dict[str, Any]:
    """The peer's own line, without its times; its windows go to `file`."""
    command = [
        "env",
        f"MODEL={model}",
        python,
        str(HERE / "peers" / "run_llmcompressor.py"),
        kind,
        "--windows",
        str(file),
    ]
    row = last_json(command)
    return {key: row[key] for key in ("tool", "version", "kind", "perplexity", "kl", "top1")}


def run_lowbit(model: Path, scheme: str, method: str, folder: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    out = f"{folder}/{scheme}-{method}"
    text = str(DEMO / "calibration.txt")
    row = last_json([sys.executable, "-c", _QUANTIZE, str(model), out, scheme, method, text])
    windows = lowbit_windows(out, str(model))
    return row | {
        "scheme": scheme, "method": method, "perplexity": float(np.exp(windows["nll"].mean())),
        "kl": float(windows["kl"].mean()), "top1": float(windows["agree"].mean()),
    }, windows  # fmt: skip


def compare(python: str, name: str, model: Path, kind: str, wanted: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """One row for every recipe of lowbit's beside one run of the peer's."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "peer.npz"
        peer = run_peer(python, kind, model, saved)
        theirs = np.load(saved)["kl"]
        for scheme, method in wanted:
            own, windows = run_lowbit(model, scheme, method, folder)
            rows.append({"model": name, "peer": peer, "lowbit": own, "kl_ratio": kl_ratio(windows["kl"], theirs)})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def key(row: dict[str, Any]) -> tuple[str, str, str, str]:
    return row["model"], row["peer"]["kind"], row["lowbit"]["scheme"], row["lowbit"]["method"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llmcompressor", required=True, help="its virtual environment's python")
    parser.add_argument("--model", action="append", help="'demo' (the default) or a directory; may be repeated")
    parser.add_argument("--kind", action="append", choices=KINDS, help="only this kind; may be repeated")
    parser.add_argument("--again", action="store_true", help="measure pairs that the results hold already")
    args = parser.parse_args()
    old = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    rows = {key(r): r for r in old}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    for model in args.model or ["demo"]:
        path = DEMO / "model" if model == "demo" else Path(os.path.abspath(model))
        name = "demo" if model == "demo" else path.name
        for kind in args.kind or KINDS:
            wanted = [(s, m) for s, m in KINDS[kind] if args.again or (name, kind, s, m) not in rows]
            if not wanted:
                continue
            for row in compare(args.llmcompressor, name, path, kind, wanted):
                rows[key(row)] = row | {"commit": commit.stdout.strip()}
            document = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment()}
            RESULTS.write_text(json.dumps(document | {"rows": list(rows.values())}, indent=1) + "\n")


if __name__ == "__main__":
    main()
