"""GPTQ against the peers' GPTQ: same model, calibration windows, grid and evaluation text, in alternating runs.

    python benchmarks/compare_gptq.py --llmcompressor VENV/bin/python --gptqmodel VENV/bin/python [--rounds 2]

Each round quantizes with every tool in turn (a fresh process each; only the quantization is timed, as the peers'
scripts do). Accuracy is of the weights alone: dequantized, in float32, window by window, so that two tools are
compared on the same windows: a paired difference with its 95 % interval. benchmarks/peers/README.md says how the
peers' environments are made.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
BITS = (4, 3)

_LOWBIT = """
import json, sys, time
from lowbit.console import set_verbosity
from lowbit.pipeline import quantize
set_verbosity(0)
document = quantize("demo", sys.argv[1], scheme=sys.argv[2], method="gptq", force=True)
losses = [(r["loss"], r["loss_rtn"]) for r in document["layers"]]
print(json.dumps({"tool": "lowbit", "kind": sys.argv[2], "seconds": document["seconds"],
                  "peak_memory_bytes": document["peak_memory_bytes"],
                  "layers_below_rtn": sum(a < b for a, b in losses), "layers": len(losses),
                  "fallbacks": sum(r["fallback"] is not None for r in document["layers"])}))
"""


def last_json(command: list[str]) -> dict[str, Any]:
    """Run a command; the last line of its output is one JSON object."""
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{run.stderr[-3000:]}")
    row: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    return row


def lowbit_windows(model: str, original: str = "demo") -> dict[str, np.ndarray]:
    """Per-window results of a lowbit output as the peers' scripts compute theirs: float32, windows of 512 of the demo's
    evaluation text."""
    from lowbit.accuracy.measure import cut_windows, measure
    from lowbit.calibration import read_text, tokenize
    from lowbit.model.checkpoint import DEMO
    from lowbit.runtime.engine import load

    reference, engine = load(original, "float32"), load(model, "float32")
    text = DEMO / "evaluation.txt"
    windows = cut_windows(tokenize(read_text(text), reference.tokenizer), 512, str(text))
    _, scores = measure(reference.logits, [engine.logits], windows, reference.vocab_size)
    return {"nll": scores.nll, "kl": scores.kl, "agree": scores.agreement}


def paired(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Mean over windows of ours - theirs, and the half-width of its 95 % interval."""
    difference = ours - theirs
    return {
        "mean": float(difference.mean()),
        "half_width_95": float(1.96 * difference.std(ddof=1) / np.sqrt(len(difference))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llmcompressor", required=True, help="its virtual environment's python")
    parser.add_argument("--gptqmodel", required=True, help="its virtual environment's python")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "gptq.json")
    args = parser.parse_args()

    from lowbit.environment import environment

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    document: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "environment": environment(),
        "rounds": args.rounds,
        "bits": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for bits in BITS:
            out, rows = f"{folder}/w{bits}", []
            saved = {name: f"{folder}/{name}{bits}.npz" for name in ("llmcompressor", "gptqmodel")}
            for _ in range(args.rounds):
                rows.append(last_json([sys.executable, "-c", _LOWBIT, out, f"w{bits}a16-g128"]))
                peers = HERE / "peers"
                rows.append(
                    last_json([args.llmcompressor, str(peers / "run_llmcompressor.py"), f"gptq{bits}",
                               "--windows", saved["llmcompressor"]])
                )  # fmt: skip
                rows.append(
                    last_json([args.gptqmodel, str(peers / "run_gptqmodel.py"), str(bits),
                               "--windows", saved["gptqmodel"]])
                )  # fmt: skip
                print(*(f"{r['tool']} {r['seconds']:.1f} s" for r in rows[-3:]), sep=", ", flush=True)
            document["bits"][str(bits)] = compare(lowbit_windows(out), saved, rows)
            print(json.dumps(document["bits"][str(bits)]["summary"], indent=2), flush=True)
    args.output.write_text(json.dumps(document, indent=2) + "\n")


def compare(ours: dict[str, np.ndarray], saved: dict[str, str], rows: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = {tool: [r["seconds"] for r in rows if r["tool"] == tool] for tool in {r["tool"] for r in rows}}
    fastest_peer = min(min(v) for k, v in seconds.items() if k != "lowbit")
    summary: dict[str, Any] = {
        "lowbit": {
            "perplexity": float(np.exp(ours["nll"].mean())),
            "kl": float(ours["kl"].mean()),
            "top1": float(ours["agree"].mean()),
            "seconds": seconds["lowbit"],
        }
    }
    for name, file in saved.items():
        theirs = np.load(file)
        nll = theirs["nll"] / theirs["positions"]
        summary[name] = {
            "perplexity": float(np.exp(nll.mean())),
            "kl": float(theirs["kl"].mean()),
            "top1": float(theirs["agree"].mean()),
            "seconds": seconds[name],
            "lowbit_minus_this": {"nll": paired(ours["nll"], nll), "kl": paired(ours["kl"], theirs["kl"])},
        }
    summary["lowbit_time_over_fastest_peer"] = float(np.median(seconds["lowbit"])) / fastest_peer
    return {"summary": summary, "runs": rows}


if __name__ == "__main__":
    main()
