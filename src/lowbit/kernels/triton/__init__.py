"""The GPU kernels, in Triton: `ops` (torch operators), `twins` (their definitions in torch), one file for each idea.

Triton is imported only when a kernel runs, so lowbit imports as before on a machine without it. With
TRITON_INTERPRET=1 the same kernels run on CPU tensors, which is how they are tested where there is no GPU.
"""

from __future__ import annotations

import importlib.util
import os

from torch import Tensor

from lowbit.errors import InputError

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # read when kernels are made, as Triton does
PLACE = "cpu" if INTERPRETED else "cuda"  # where the kernels find their tensors


def available() -> bool:
    """Is Triton installed?"""
    return importlib.util.find_spec("triton") is not None


def require(*tensors: Tensor) -> None:
    """Raise InputError unless Triton is here and the tensors are where its kernels can read them."""
    if not available():
        raise InputError("the GPU kernels need Triton, which is not installed: pip install 'lowbit[gpu]'.")
    for t in tensors:
        if t.device.type != PLACE:
            raise InputError(f"the GPU kernels got a tensor on {t.device}; expected {PLACE}. Move it there first.")
