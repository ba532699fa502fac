"""What the C library does with freed memory: keeping it is faster, giving it back is smaller.

Clearing new pages is a fifth of a quantization's processor time (docs/experiments.md). What the user set in the
environment stays. Only glibc can be told.
"""

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator


def give_back(*, thoroughly: bool) -> None:
    """Return freed memory to the system. The C library keeps what each finished thread's heap once held, and Python
    keeps what sits in reference cycles; a block's worth of each adds up."""
    if thoroughly:
        gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """What exists now stays: within, looking for cycles to give back passes over it (a fifth of a second each time,
    with torch and transformers loaded)."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def return_at_once(size: int) -> None:
    """From now on, memory blocks of `size` bytes and more go back to the system when they are freed. The C library
    otherwise raises that limit to 32 MB, and keeps each thread's former activations for its next ones."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for variable, option in (("MALLOC_MMAP_THRESHOLD_", -3), ("MALLOC_TRIM_THRESHOLD_", -1)):
        if mallopt is not None and variable not in os.environ:
            mallopt(option, size)
