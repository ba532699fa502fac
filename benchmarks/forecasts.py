"""What `quantize --dry-run` predicts, against what the run then takes: memory, time and output, on three models.

    python benchmarks/forecasts.py [--model DIR]... [--work DIR] [--samples 32] [--seq-len 512] [--workers N]

By default: the demo (8 M parameters), a random Llama of 100 M, and two blocks of the 1.1 B shape (0.25 B), the last two
made under --work if they are not there; compare_large.py keeps the prediction for all 16 blocks beside what they took.
Each prediction and each run is a process of its own. Times are the document's: imports are not counted.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compare_large import DEMO, HERE, make_model

from lowbit.workers import default_workers

SHAPES: dict[str, dict[str, int]] = {
    "random-100m": {
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
        "num_key_value_heads": 4, "vocab_size": 16000,
    },
    "random-250m": {"num_hidden_layers": 2},
}  # fmt: skip


def document(words: list[str]) -> dict[str, Any]:
    """The JSON document of a quantize command in a process of its own."""
    command = [sys.executable, "-m", "lowbit", "quantize", *words, "--quiet", "--json", "-"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{run.stderr[-3000:]}")
    made: dict[str, Any] = json.loads(run.stdout)
    return made


def compare(model: str, args: argparse.Namespace, method: str, scheme: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        out = Path(folder) / "out"
        words = [model, "-o", str(out), "--scheme", scheme, "--method", method, "--samples", str(args.samples)]
        words += ["--seq-len", str(args.seq_len), "--calibration", str(DEMO / "calibration.txt")]
        words += ["--workers", str(args.workers)]
        predicted = document([*words, "--dry-run"])["predicted"]
        measured = document(words)
        written = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    row = {
        "model": Path(model).name,
        "method": method,
        "scheme": scheme,
        "predicted": predicted,
        "seconds": measured["seconds"],
        "peak_memory_bytes": measured["peak_memory_bytes"],
        "output_bytes": written,
        "predicted_over_measured": {
            "seconds": predicted["seconds"] / measured["seconds"],
            "peak_memory_bytes": predicted["peak_memory_bytes"] / measured["peak_memory_bytes"],
            "output_bytes": predicted["output_bytes"] / written,
        },
    }
    print(row["model"], method, scheme, json.dumps(row["predicted_over_measured"]), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="instead of the three")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--workers", type=int, default=default_workers())
    parser.add_argument("--output", type=Path, default=HERE / "results" / "forecasts.json")
    args = parser.parse_args()
    if not args.model:
        for name, shape in SHAPES.items():
            if not (args.work / name / "config.json").exists():
                make_model(args.work / name, **shape)
    models = args.model or ["demo", *(str(args.work / name) for name in SHAPES)]

    from lowbit.environment import environment

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    rows = [compare(model, args, "gptq", "w4a16-g128") for model in models]
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "environment": environment(),
        "samples": args.samples,
        "seq_len": args.seq_len,
        "workers": args.workers,
        "rows": rows,
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
