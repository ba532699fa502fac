"""Learned rounding: lowbit's signround against AutoRound (200 iterations), time and KL, in turns.

    python benchmarks/compare_learned.py --autoround VENV/bin/python [--bits 4 --bits 3] [--rounds 1]

Both get the same 128 windows of 512 tokens of the demo's calibration text and round the demo model onto symmetric
integers in groups of 128; KL to the float32 original is compared window by window on all of the demo's evaluation text.
`seconds` are of the quantization call alone, loading and imports apart for AutoRound, loading included for lowbit.
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
from compare_gptq import HERE, last_json, lowbit_windows
from compare_peers import kl_ratio

from lowbit.environment import environment

_QUANTIZE = """
import json, sys
import lowbit
from lowbit.console import set_verbosity
set_verbosity(0)
d = lowbit.quantize("demo", sys.argv[1], scheme=sys.argv[2], method="signround", set=json.loads(sys.argv[3]))
print(json.dumps({k: d[k] for k in ("seconds", "bits_per_weight", "peak_memory_bytes")}))
"""


def run(python: str, bits: int, settings: dict[str, str], folder: str) -> dict[str, Any]:
    saved, out = Path(folder) / f"peer{bits}.npz", f"{folder}/w{bits}"
    own = last_json([sys.executable, "-c", _QUANTIZE, out, f"w{bits}a16", json.dumps(settings)])
    peer = last_json([python, str(HERE / "peers/run_autoround.py"), str(bits), "--windows", str(saved)])
    windows = lowbit_windows(out)
    own |= {"set": settings, "kl": float(windows["kl"].mean()), "perplexity": float(np.exp(windows["nll"].mean()))}
    return {
        "bits": bits,
        "lowbit": own,
        "autoround": peer,
        "kl_ratio": kl_ratio(windows["kl"], np.load(saved)["kl"]),
        "seconds_ratio": own["seconds"] / peer["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autoround", required=True, help="its virtual environment's python")
    parser.add_argument("--bits", type=int, action="append", choices=(2, 3, 4))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="signround's, e.g. iterations=50"
    )
    parser.add_argument("--output", type=Path, default=HERE / "results" / "learned.json")
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    rows = []
    for _ in range(args.rounds):
        for bits in args.bits or [4]:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(run(args.autoround, bits, dict(s.split("=", 1) for s in args.set), folder))
            print(json.dumps(rows[-1]), flush=True)
            document = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit.stdout.strip()}
            args.output.write_text(json.dumps(document | {"environment": environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
