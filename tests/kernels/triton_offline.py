"""Compile Triton kernels for a GPU that is not here: every launch inside `compiling` is compiled and not run.

The interpreter knows nothing of a GPU's types, smallest tensor-core shapes or registers; the compiler does, and needs
no GPU. Only in a process without TRITON_INTERPRET, which decides at import what a kernel is.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from lowbit.kernels import triton as package


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
