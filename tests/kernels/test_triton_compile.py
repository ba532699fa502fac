"""Every kernel compiles for real GPUs and fits them. (What it computes is tested in the interpreter.)"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.9", reason="Triton 3.9 or newer")

SHARED = {89: 101_376, 90: 232_448}  # bytes of shared memory a program may have


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
@pytest.mark.parametrize("capability", [89, 90])
def test_every_kernel_fits_the_gpu_and_uses_its_tensor_cores(capability: int, tmp_path: Path) -> None:
    """Ada has the least shared memory, Hopper other tensor-core instructions. Registers spill at most a few words."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("triton_offline.py")
    run = subprocess.run(
        [sys.executable, str(script), str(capability)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    kernels = {k["name"]: k for k in map(json.loads, run.stdout.splitlines())}
    assert len(kernels) == 14
    for name, k in kernels.items():
        assert k["shared"] <= SHARED[capability], name
        assert k["stack"] <= 32, name
    product = "wgmma" if capability == 90 else "mma.sync"
    for name in ("gemm int4, 16 rows", "gemm int4, 64 rows", "int8, 64 rows", "fp8 channels, 64 rows"):
        assert product in kernels[name]["ptx"], name
    assert ".s8.s8" in kernels["int8, 64 rows"]["ptx"]
    assert ".e4m3.e4m3" in kernels["fp8 channels, 64 rows"]["ptx"]
    assert "v4.b32" in kernels["gemv int4"]["ptx"]  # 16 bytes a thread
