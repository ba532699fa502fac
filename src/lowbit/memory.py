"""How much memory a quantization will take, before it takes it.

The process never holds the model. At any time it holds one of

    entering    embeddings, head and first block in the compute dtype; hidden states of all calibration batches
    a block     its weights; the Hessians of one input group and what rounding makes of the group; hidden states, and
                what each batch has computed so far in the block
    proving     embeddings, head and one block in float32, at the beginning and at the end

and the peak is the largest, above what the process had before. Where that is more than there is, hidden states go to
a mapped file and each batch is computed anew for every input group (`Recompute`): slower, with the same result.
"""

import ctypes
import gc
import resource
from dataclasses import dataclass

import psutil
from torch import nn

from lowbit.algorithms.compose import parse_method
from lowbit.console import note
from lowbit.errors import InputError
from lowbit.model.load import compute_dtype
from lowbit.model.walk import Blocks, linears
from lowbit.recipe import Recipe

BATCH = 4  # windows a batch: the activations of a small model stay in the cache


@dataclass(frozen=True)
class Memory:
    """Predicted bytes: `base` is held already; one of the others comes on top, `activations` only beside `block`
    and only if they stay in memory."""

    base: int
    outside: int
    block: int
    proof: int
    activations: int

    @property
    def peak(self) -> int:
        return self.base + max(self.outside, self.block + self.activations, self.proof)

    @property
    def least(self) -> int:
        """The peak with activations on disk."""
        return self.base + max(self.outside, self.block, self.proof)


def estimate_memory(model: nn.Module, blocks: Blocks, recipe: Recipe, threads: int) -> Memory:
    """From shapes alone, and the process's size now."""
    size = compute_dtype().itemsize
    parameters = {n: p.numel() for n, p in model.named_parameters()}
    by_block = [sum(v for n, v in parameters.items() if n.startswith(b + ".")) for b in blocks.names]
    largest = max(by_block)
    outside = sum(parameters.values()) - sum(by_block)
    block = blocks.names[by_block.index(largest)]
    shapes = [(m.out_features, m.in_features) for n, m in linears(model).items() if n.startswith(block + ".")]
    hidden = min(width for _, width in shapes)
    inner = max(width for _, width in shapes)
    needed = parse_method(recipe.method).needs_calibration or recipe.stores_kv_scales
    calibrates = needed or recipe.calibration is not None
    tokens = recipe.samples * recipe.seq_len if calibrates else 0
    # one group: its rows stacked, min-max result, searched result, error; its statistics, train and held out
    rounding = max(rows * width for rows, width in shapes) * _COPIES * 4
    hessians = inner * inner * 4 * (2 * threads + _SQUARES) if calibrates else 0
    passing = threads * BATCH * recipe.seq_len * 4 * inner * size if calibrates else 0
    return Memory(
        base=psutil.Process().memory_info().rss,
        outside=(outside + largest) * size + tokens * hidden * size,
        block=largest * size + rounding + hessians + passing,
        proof=(outside + largest) * 4,
        activations=tokens * size * (2 * hidden + inner),
    )


def give_back(*, thoroughly: bool) -> None:
    """Return freed memory to the system. The C library keeps what each finished thread's heap once held, and Python
    keeps what sits in reference cycles; a block's worth of each adds up."""
    if thoroughly:
        gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


_COPIES = 6
_SQUARES = 8


def choose_frugal(memory: Memory, limit: int | None) -> bool:
    """Whether activations go to disk. Raises InputError if the memory does not suffice even so.

    Without a limit it is what is available, or what the process is allowed (RLIMIT_DATA, RLIMIT_AS).
    """
    asked = limit is not None
    if limit is None:
        limit = memory.base + psutil.virtual_memory().available
        for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS):
            allowed, _ = resource.getrlimit(kind)
            if allowed != resource.RLIM_INFINITY:
                limit = min(limit, allowed)
    if asked and memory.least > limit:
        raise InputError(
            f"--max-memory {limit / 1e6:.0f} MB: the largest piece of this model needs about "
            f"{memory.least / 1e6:.0f} MB. Allow that much; the rest of the model is never in memory."
        )
    frugal = memory.peak > limit
    if frugal:
        note(f"activations are kept on disk: {memory.peak / 1e6:.0f} MB would be needed, {limit / 1e6:.0f} MB allowed")
    return frugal
