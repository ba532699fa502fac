"""Kernel rates: GB/s of packed weights and TOP/s for 1 to 128 rows, beside the machine's own ceilings.

Best of many short runs: on a shared machine that is what the code can do when left alone.

    python benchmarks/kernel_rates.py --threads 2 --rows 65536
    python benchmarks/kernel_rates.py --rows 8192 --json benchmarks/results/kernels.json
    python benchmarks/roofline.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from decoder_1b import random_weight, read_bandwidth

from lowbit.environment import environment
from lowbit.kernels import ops, pack

# name, bits, group, activation group
CASES = [("int4 g128", 4, 128, 32), ("int4 g128 a128", 4, 128, 128), ("int4 g32", 4, 32, 32), ("int8", 8, 0, 32)]
CASES += [("int8 per token", 8, 0, 0), ("int3 g128", 3, 128, 32), ("int2 g128", 2, 128, 32), ("bf16", 16, 0, 32)]


def main() -> None:
    """Measure every case and print a line for each."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--threads", type=int, default=0)
    p.add_argument("--rows", type=int, default=1024, help="65536 leaves every cache, 1024 measures arithmetic")
    p.add_argument("--cols", type=int, default=2048)
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    if a.threads:
        pack.native.set_threads(a.threads)
    read = read_bandwidth()
    peak = max(pack.native.int8_rate(500_000) for _ in range(20))
    print(
        f"{pack.native.isa()}, {pack.native.threads()} threads: "
        f"read {read / 1e9:.1f} GB/s, int8 {peak / 1e12:.3f} TOP/s"
    )
    rates = []
    for name, bits, group, act_group in CASES:
        w, cells = random_weight(a.rows, a.cols, bits, group, act_group), []
        for m in (1, 2, 4, 8, 128):
            x, best, end = torch.randn(m, a.cols), float("inf"), time.perf_counter() + 1
            while time.perf_counter() < end:
                start = time.perf_counter()
                ops.native_linear(w, x, act_group)
                best = min(best, time.perf_counter() - start)
            rates.append({"case": name, "rows": m, "seconds": best, "bytes": w.nbytes, "ops": 2 * m * a.rows * a.cols})
            rate, work = w.nbytes / best, 2 * m * a.rows * a.cols / best
            cells.append(
                f"m={m}: {rate / 1e9:.1f} GB/s ({rate / read:.2f}), {work / 1e12:.3f} TOP/s ({work / peak:.2f})"
            )
        print(f"{name:15s}", "; ".join(cells), flush=True)
    if a.json:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        document = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit.stdout.strip(),
            "environment": environment(),
            "isa": pack.native.isa(),
            "shape": [a.rows, a.cols],
            "read_bytes_per_s": read,
            "int8_ops_per_s": peak,
            "rates": rates,
        }
        a.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
