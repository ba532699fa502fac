"""GPU kernels: GB/s of weights and TFLOP/s for 1 to 4096 rows, beside torch's bf16 product of the same shape.

Each time is the median of `--repeats` runs, timed on the GPU by events, with the L2 cache flushed before each: a weight
that is still in L2 from the run before flatters everything that is bound by memory. Launches are part of a CUDA graph
with --graphs, as in decoding. Every kernel is compared with its torch twin before it is timed.

    python benchmarks/gpu_kernels.py --rows 4096 --cols 4096 --json rates.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.kernels.triton import activations, fp8, graphs, kv, layout, twins, w4a16, w8a8

TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)
E4M3 = torch.float8_e4m3fn


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median time of `call` on the GPU with a cold L2."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times = []
    for i in range(repeats + 3):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def integer_weight(rows: int, cols: int, bits: int, group: int, asym: bool) -> layout.TiledWeight:
    """Random codes with scales near 1 / sqrt(cols)."""
    codes = torch.randint(0, 1 << bits, (rows, cols), dtype=torch.uint8)
    scale = (torch.rand(rows, -(-cols // group)) + 0.5).bfloat16() / cols**0.5
    zero = torch.randint(0, 1 << bits, scale.shape) if asym else torch.full(scale.shape, 1 << (bits - 1))
    return layout.pack_int(codes, scale, zero, bits=bits).to("cuda")


def products(rows: int, cols: int) -> list[tuple[str, int, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
    """(name, bytes of weights, kernel, twin): functions of x (m, cols) bf16."""
    found: list[tuple[str, int, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = []
    for bits, group, asym in ((4, 128, False), (4, 32, True), (3, 128, False), (2, 64, True), (8, cols, False)):
        w = integer_weight(rows, cols, bits, group, asym)
        name = f"int{bits} g{group}{' asym' if asym else ''}"
        found.append((name, w.nbytes, lambda x, w=w: w4a16.linear(x, w), lambda x, w=w: twins.linear(x, w)))  # type: ignore[misc]
    codes = torch.randint(0, 16, (rows, cols), dtype=torch.uint8)
    t = layout.pack_table(codes, torch.full((rows, 1), cols**-0.5), torch.randn(rows, 16).bfloat16()).to("cuda")
    found.append(("table", t.nbytes, lambda x: w4a16.linear(x, t), lambda x: twins.linear(x, t)))

    w8 = torch.randint(-127, 128, (rows, cols), dtype=torch.int8, device="cuda")
    s8 = torch.rand(rows, device="cuda") / 127 / cols**0.5

    def int8(x: Tensor) -> Tensor:
        codes, scale = activations.quantize(x)
        return w8a8.linear(codes, scale[:, 0], w8, s8)

    def int8_twin(x: Tensor) -> Tensor:
        codes, scale = twins.quantize(x, None, 0.0, 0)
        return twins.int8_linear(codes, scale[:, 0], w8, s8, None, torch.bfloat16)

    found.append(("w8a8, quantization included", rows * cols, int8, int8_twin))
    if not fp8.supported(torch.device("cuda")):
        return found
    wf = torch.randn(rows, cols, device="cuda").to(E4M3)
    for name, group, shape in (("channel", 0, (rows, 1)), ("block", 128, (-(-rows // 128), -(-cols // 128)))):
        s = torch.rand(shape, device="cuda") / cols**0.5

        def float8(x: Tensor, group: int = group, s: Tensor = s) -> Tensor:
            codes, scale = activations.quantize(x, None, 0.0, group, E4M3)
            return fp8.linear(codes, scale, wf, s)

        def float8_twin(x: Tensor, group: int = group, s: Tensor = s) -> Tensor:
            codes, scale = twins.quantize(x, None, 0.0, group, E4M3)
            return twins.fp8_linear(codes, scale, wf, s, None, torch.bfloat16)

        found.append((f"fp8 {name}, quantization included", rows * cols, float8, float8_twin))
    return found


def measure_products(rows: int, cols: int, repeats: int, use_graphs: bool) -> list[dict[str, Any]]:
    """A row of results for every product and number of tokens."""
    dense, results = torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16), []
    for name, nbytes, kernel, twin in products(rows, cols):
        for m in TOKENS:
            x = torch.randn(m, cols, device="cuda", dtype=torch.bfloat16)
            got, expected = kernel(x).float(), twin(x).float()
            error = float((got - expected).norm() / expected.norm())
            call, plain = (
                (graphs.CapturedStep(f, x) if use_graphs else f) for f in (kernel, lambda x: x @ dense.T)
            )  # fmt: skip
            time, bf16 = seconds(lambda c=call, x=x: c(x), repeats), seconds(lambda c=plain, x=x: c(x), repeats)  # type: ignore[misc]
            results.append(
                {
                    "kernel": name, "tokens": m, "seconds": time, "bf16_seconds": bf16, "faster": bf16 / time,
                    "gigabytes_per_s": nbytes / time / 1e9, "tflops": 2 * m * rows * cols / time / 1e12, "error": error,
                }
            )  # fmt: skip
            print(
                f"{name:32s} m={m:<5d} {time * 1e6:8.1f} us  {nbytes / time / 1e9:7.0f} GB/s  "
                f"{results[-1]['tflops']:7.1f} TFLOP/s  {bf16 / time:5.2f}x bf16  error {error:.1e}",
                flush=True,
            )
    return results


def _dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def measure_attention(context: int, repeats: int) -> list[dict[str, Any]]:
    """Decoding attention, 32 heads of 128 over 8 key heads, against torch's own over a bf16 cache."""
    results, page = [], 16
    for dtype in (torch.int8, E4M3) if fp8.supported(torch.device("cuda")) else (torch.int8,):
        for batch in (1, 8, 32):
            pages = batch * -(-context // page)
            codes = torch.randint(-100, 100, (pages, 8, page, 128), device="cuda").to(dtype)
            scales = torch.rand(pages, 8, page, device="cuda") / 100
            cache = (codes, codes.clone(), scales, scales.clone())
            table = torch.randperm(pages, device="cuda").view(batch, -1).to(torch.int32)
            lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
            q = torch.randn(batch, 32, 128, device="cuda", dtype=torch.bfloat16)
            time = seconds(lambda a=(q, cache, table, lengths): kv.attention(*a, 128**-0.5), repeats)  # type: ignore[misc]
            k, v = torch.randn(2, batch, 8, context, 128, device="cuda", dtype=torch.bfloat16)
            bf16 = seconds(lambda a=(q[:, :, None], k, v): _dense_attention(*a), repeats)  # type: ignore[misc]
            nbytes = 2 * (codes.numel() + 4 * scales.numel())
            results.append(
                {
                    "cache": str(dtype), "batch": batch, "context": context, "seconds": time, "bf16_seconds": bf16,
                    "gigabytes_per_s": nbytes / time / 1e9,
                }
            )  # fmt: skip
            print(
                f"attention {dtype} batch {batch:<3d} {time * 1e6:8.1f} us  {nbytes / time / 1e9:7.0f} GB/s  "
                f"{bf16 / time:5.2f}x bf16",
                flush=True,
            )
    return results


def main() -> None:
    """Measure, print, and write JSON if asked."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", type=int, default=4096)
    p.add_argument("--cols", type=int, default=4096)
    p.add_argument("--context", type=int, default=8192)
    p.add_argument("--repeats", type=int, default=50)
    p.add_argument("--graphs", action="store_true", help="replay CUDA graphs instead of launching")
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA GPU, and torch finds none")
    torch.manual_seed(0)
    document = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "products": measure_products(a.rows, a.cols, a.repeats, a.graphs),
        "attention": measure_attention(a.context, a.repeats),
    }
    if a.json:
        a.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
