"""Peak memory bandwidth of this machine, measured: what MBU is a share of.

Several simple read-only passes over a buffer far larger than the caches; the best of them counts. A lower peak would
flatter us, so every pattern that reads faster raises it.
"""

import time
from collections.abc import Callable

import torch

from lowbit.kernels.pack import native

_BYTES = 512 * 2**20


def measure_bandwidth(repeats: int = 7) -> float:
    """Bytes a second that all threads together read from main memory."""
    buffer = torch.ones(_BYTES // 4, dtype=torch.float32)
    matrix = buffer.view(-1, 16384)
    vector = torch.ones(16384)
    bfloat = buffer.view(torch.bfloat16).view(-1, 16384)
    bvector = vector.to(torch.bfloat16)
    passes: list[Callable[[], object]] = [
        lambda: buffer.sum(),
        lambda: buffer.view(torch.int64).amax(),
        lambda: torch.mv(matrix, vector),
        lambda: torch.nn.functional.linear(bvector[None], bfloat),
    ]
    best = 0.0
    for read in passes:
        for _ in range(repeats):
            start = time.perf_counter()
            read()
            best = max(best, _BYTES / (time.perf_counter() - start))
    if native is not None:  # plain loads by the kernels' own threads, in two orders
        rates = [native.read_rate(buffer.data_ptr(), _BYTES, order) for order in (0, 1) for _ in range(repeats)]
        best = max(best, *rates)
    return best
