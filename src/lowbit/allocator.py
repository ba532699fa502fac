"""What the C library does with freed memory: keeping it is faster, giving it back is smaller.

Clearing new pages took a quarter of a quantization's processor time before workers kept theirs (docs/experiments.md).
What the user set in the environment stays. Only glibc can be told.
"""

import ctypes
import gc
import os

_THRESHOLDS = {"MALLOC_MMAP_THRESHOLD_": -3, "MALLOC_TRIM_THRESHOLD_": -1}
_MOST = 32 << 20  # that glibc takes for the first


def give_back(*, thoroughly: bool) -> None:
    """Return freed memory to the system. The C library keeps what each finished thread's heap once held, and Python
    keeps what sits in reference cycles; a block's worth of each adds up."""
    if thoroughly:
        gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def return_at_once(size: int) -> None:
    """From now on, memory blocks of `size` bytes and more go back to the system when they are freed. The C library
    otherwise raises that limit to 32 MB, and keeps each thread's former activations for its next ones."""
    _set(dict.fromkeys(_THRESHOLDS, size))


def keep() -> None:
    """From now on nothing goes back but blocks of 32 MB: for a process that lives for seconds."""
    _set(dict(zip(_THRESHOLDS, (_MOST, 1 << 30), strict=True)))


def _set(sizes: dict[str, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for name, size in sizes.items():
        if mallopt is not None and name not in os.environ:
            mallopt(_THRESHOLDS[name], size)
