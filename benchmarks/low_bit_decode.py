"""One row of activations by weights of 2, 3 and 4 bits, on integers and on the lattice, and by bf16: who is faster?

All cases take turns, round after round, so what else the machine does falls on each of them alike; a figure is the
median over rounds of a ratio within one round. In the cache that is arithmetic, outside of it mostly memory.

    python benchmarks/low_bit_decode.py --threads 1 --rows 2048 --cols 8192
    python benchmarks/low_bit_decode.py --threads 2 --rows 65536 --cols 2048
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from decoder_1b import random_weight

from lowbit import lattice
from lowbit.kernels import ops, pack

BASES = ("bf16", "int4")


def lattice_weight(rows: int, cols: int, bits: int) -> pack.PackedWeight:
    """Random codes: speed does not depend on them."""
    stages = [torch.randint(0, 1 << b, (rows, cols // 8), dtype=torch.int32) for b in lattice.STAGE_BITS[bits]]
    return pack.pack_lattice(torch.stack(stages, -1), torch.ones(rows, 1), bits=bits)


def main() -> None:
    """Print time and bytes of every case relative to bf16 and to 4 bits."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--rows", type=int, default=2048)
    p.add_argument("--cols", type=int, default=8192)
    p.add_argument("--rounds", type=int, default=200)
    a = p.parse_args()
    pack.native.set_threads(a.threads)
    cases = {"bf16": random_weight(a.rows, a.cols, 16, 0, 32)}
    cases |= {f"int{bits}": random_weight(a.rows, a.cols, bits, 128, 32) for bits in (4, 3, 2)}
    cases |= {f"e8p{bits}": lattice_weight(a.rows, a.cols, bits) for bits in (4, 3, 2)}
    x = torch.randn(1, a.cols)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(a.rounds):
        for name, w in cases.items():
            start = time.perf_counter()
            ops.native_linear(w, x)
            seconds[name].append(time.perf_counter() - start)
    print(f"{pack.native.isa()}, {a.threads} threads, {a.rows} x {a.cols}: speed-up (median of ratios; of best times)")
    for name, w in cases.items():
        cells = []
        for base in BASES:
            ratio = statistics.median(b / t for b, t in zip(seconds[base], seconds[name], strict=True))
            cells.append(f"{ratio:5.2f} {min(seconds[base]) / min(seconds[name]):5.2f} of {base}")
        bits = 8 * w.nbytes / (a.rows * a.cols)
        rate = w.nbytes / cases["int4"].nbytes * min(seconds["int4"]) / min(seconds[name])
        print(f"{name:5s} {bits:5.2f} bits  {'  '.join(cells)}  bytes/s {rate:.2f} of int4")


if __name__ == "__main__":
    main()
