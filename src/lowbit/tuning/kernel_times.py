"""How long one token's product with a matrix of some shape and scheme takes on this machine, measured.

The latency budget of `auto:2ms` is spent in these times: what a decoding step spends in the quantized linears, one
after the other. Codes and scales are random; the time does not depend on them. Matrices small enough to stay in the
cache are run in turn through copies that together exceed it, as the layers of a model do. What a call from Python
costs, which the decoder does not pay, is subtracted; the fastest round counts, because other work only ever adds.
"""

import time
from collections.abc import Sequence
from functools import lru_cache

import torch

from lowbit.errors import InputError
from lowbit.kernels import pack
from lowbit.kernels.ops import native_linear
from lowbit.kernels.pack import PackedWeight
from lowbit.numerics import scale_shape
from lowbit.scheme import Scheme

_CACHE_BYTES = 64 * 2**20
_REPEATS = 9
_MOST_BYTES_PER_S = 1e12  # faster than any cache: the difference of two small times may be nothing but noise


def product_seconds(shape: tuple[int, int], scheme: str) -> float:
    """Seconds of x (1, in) @ W^T for W of `shape` (out, in): the best round's mean over copies.

    The scheme 'none' is bfloat16. Raises InputError for a scheme that the kernels cannot carry.
    """
    if pack.native is None:
        raise InputError("a budget in time needs lowbit's compiled kernels; give it in bits or bytes.")
    generator = torch.Generator().manual_seed(0)
    try:
        group = 32 if Scheme.parse(scheme).activation is None else 0  # columns a scale of the activations; 0: all
        packed = _random(shape, Scheme.parse(scheme), group, generator)
        copies = max(1, min(16, _CACHE_BYTES // packed.nbytes))
        weights = [packed, *(_random(shape, Scheme.parse(scheme), group, generator) for _ in range(copies - 1))]
    except ValueError as error:
        raise InputError(f"no kernel for {scheme} on {shape[0]} x {shape[1]}: {error}.") from error
    whole, call = _best_rounds([(weights, group), (_nothing(), 32)])
    return max(whole - call, packed.nbytes / _MOST_BYTES_PER_S)


def _best_rounds(kinds: Sequence[tuple[Sequence[PackedWeight], int]]) -> list[float]:
    """Seconds a product of each kind, (weights, columns a scale of the activations), in rounds that take turns, so that
    what the machine does besides meets all of them."""
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(1, weights[0].cols, generator=generator) for weights, _ in kinds]
    best = [float("inf")] * len(kinds)
    for _ in range(_REPEATS + 1):
        for k, ((weights, group), x) in enumerate(zip(kinds, inputs, strict=True)):
            start = time.perf_counter()
            for w in weights:
                native_linear(w, x, group)
            best[k] = min(best[k], (time.perf_counter() - start) / len(weights))
    return best


@lru_cache
def _nothing() -> list[PackedWeight]:
    """Products so small that they are all call."""
    return [_random((32, 32), Scheme.parse("w8a16-g32"), 32, torch.Generator().manual_seed(0))] * 100


def _random(shape: tuple[int, int], scheme: Scheme, group: int, generator: torch.Generator) -> PackedWeight:
    """A matrix of random codes in the kernels' layout."""
    weight = scheme.weight
    if weight is None:
        return pack.pack_bf16(torch.randn(shape, generator=generator, dtype=torch.bfloat16))
    table = weight.kind in ("nf", "learned", "midrise") and weight.bits == 4
    if weight.granularity not in ("channel", "group") or not (table or weight.kind == "int"):
        raise InputError(f"no kernel time for {scheme}: give a budget in bits or bytes, or integer schemes.")
    scale = torch.full(scale_shape(weight, shape), 0.01, dtype=torch.bfloat16)
    if table:
        codes = torch.randint(0, 16, shape, generator=generator, dtype=torch.int8)
        return pack.pack_table(codes, scale, torch.linspace(-1, 1, 16)[None], act_group=group)
    codes = torch.randint(int(weight.qmin), int(weight.qmax) + 1, shape, generator=generator, dtype=torch.int8)
    return pack.pack_int(codes, scale, bits=weight.bits, act_group=group)


def group_seconds(shapes: Sequence[tuple[int, int]], schemes: Sequence[str]) -> dict[tuple[int, int], list[float]]:
    """{shape: seconds in each scheme} for the different shapes among `shapes`."""
    return {shape: [product_seconds(shape, s) for s in schemes] for shape in dict.fromkeys(shapes)}
