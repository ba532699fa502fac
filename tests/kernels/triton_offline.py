"""Compile Triton kernels for a GPU that is not here: every launch inside `compiling` is compiled and not run.

The interpreter knows nothing of a GPU's types, smallest tensor-core shapes or registers; the compiler does, and needs
no GPU. Only in a process without TRITON_INTERPRET, which decides at import what a kernel is.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from lowbit.kernels import triton as package
from lowbit.kernels.triton import activations, fp8, kv, layout, w4a16, w8a8


class _Absent:
    """A driver that answers what the compiler asks."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


@contextlib.contextmanager
def compiling(capability: int) -> Iterator[list[Any]]:
    """Launches become compilations for compute capability `capability` (80, 89, 90); yields the compiled kernels."""
    found: list[Any] = []
    run, place = JITFunction.run, package.PLACE

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:  # noqa: ARG001
        self.device_caches.clear()  # of another capability
        found.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    triton.runtime.driver.set_active(_Absent(capability))
    JITFunction.run, package.PLACE = compile_only, "cpu"
    try:
        yield found
    finally:
        JITFunction.run, package.PLACE = run, place


def resources(kernel: Any) -> tuple[int, int]:
    """(registers a thread, bytes of stack a thread) of a compiled kernel; a stack means spilled registers."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    words = dict(w.split(":") for w in text.split() if w.startswith(("REG:", "STACK:")))
    return int(words["REG"]), int(words["STACK"])


def launches(capability: int) -> dict[str, Callable[[], object]]:
    """Name -> a call of the product's own functions, which launches one kernel (attention: two) of useful size."""
    torch.manual_seed(0)

    def weight(bits: int) -> layout.TiledWeight:
        codes, groups = torch.randint(0, 1 << bits, (256, 2048), dtype=torch.uint8), torch.ones(256, 16)
        return layout.pack_int(codes, groups, groups.byte() * 0, bits=bits)

    table = layout.pack_table(torch.zeros(256, 2048, dtype=torch.uint8), torch.ones(256, 16), torch.ones(16))
    x = torch.zeros(64, 2048).bfloat16()
    codes, row, column = torch.zeros(256, 2048, dtype=torch.int8), torch.ones(64), torch.ones(256)
    cache = (torch.zeros(64, 2, 16, 128, dtype=torch.int8),) * 2 + (torch.zeros(64, 2, 16),) * 2
    pages, lengths = torch.zeros(1, 64, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    keys, slots = torch.zeros(1, 2, 128).bfloat16(), torch.zeros(1, dtype=torch.int64)
    found: dict[str, Callable[[], object]] = {
        "gemv int4": lambda: w4a16.linear(x[:1], weight(4)),
        "gemv int3": lambda: w4a16.linear(x[:1], weight(3)),
        "gemm int4, 16 rows": lambda: w4a16.linear(x[:16], weight(4)),
        "gemm int4, 64 rows": lambda: w4a16.linear(x, weight(4)),
        "gemm table, 64 rows": lambda: w4a16.linear(x, table),
        "int8, 16 rows": lambda: w8a8.linear(codes[:16], row[:16], codes, column),
        "int8, 64 rows": lambda: w8a8.linear(codes[:64], row, codes, column),
        "norm and int8": lambda: activations.quantize(x, torch.ones(2048), 1e-5),
        "store int8": lambda: kv.store(keys, keys, cache, slots),
        "attention int8": lambda: kv.attention(x[:1, :1024].view(1, 8, 128), cache, pages, lengths, 0.1),
    }
    if capability >= 89:
        e4m3 = codes.to(torch.float8_e4m3fn)
        store = tuple(t.to(torch.float8_e4m3fn) for t in cache[:2]) + cache[2:]
        found |= {
            "fp8 blocks, 16 rows": lambda: fp8.linear(e4m3[:16], torch.ones(16, 16), e4m3, torch.ones(2, 16)),
            "fp8 channels, 64 rows": lambda: fp8.linear(e4m3[:64], torch.ones(64, 1), e4m3, torch.ones(256, 1)),
            "fp8 groups": lambda: activations.quantize(x, None, 0.0, 128, torch.float8_e4m3fn),
            "attention fp8": lambda: kv.attention(x[:1, :1024].view(1, 8, 128), store, pages, lengths, 0.1),
        }
    return found


def main(capability: int) -> None:
    """Compile every launch and print what the compiler made of it."""
    for name, call in launches(capability).items():
        with compiling(capability) as kernels:
            call()
        ptx, (registers, stack) = kernels[0].asm["ptx"], resources(kernels[0])
        words = ("wgmma", "mma.sync", "ld.global", "v4.b32", ".s8.s8", ".e4m3.e4m3")
        facts = {"name": name, "registers": registers, "stack": stack, "shared": kernels[0].metadata.shared}
        print(json.dumps(facts | {"ptx": [word for word in words if word in ptx]}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
