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
import torch
from torch import nn
from transformers import PreTrainedModel

from lowbit.algorithms import METHODS
from lowbit.algorithms.compose import parse_method, settings_of
from lowbit.console import note
from lowbit.errors import InputError
from lowbit.model.load import compute_dtype
from lowbit.model.walk import Blocks, linears
from lowbit.recipe import Recipe
from lowbit.tensor import rows_at_once

BATCH = 4  # windows a batch: the activations of a small model stay in the cache


@dataclass(frozen=True)
class Memory:
    """Predicted bytes: `base` is held already; one of the others comes on top, `activations` only beside `block`
    and only if they stay in memory. `spilled` is what a file of activations takes on disk."""

    base: int
    outside: int
    block: int
    proof: int
    activations: int
    spilled: int = 0

    @property
    def peak(self) -> int:
        return self.base + max(self.outside, self.block + self.activations, self.proof)

    @property
    def least(self) -> int:
        """The peak with activations on disk."""
        return self.base + max(self.outside, self.block, self.proof)


def estimate_memory(
    model: PreTrainedModel, blocks: Blocks, recipe: Recipe, stored: torch.dtype, threads: int, workers: int = 1
) -> Memory:
    """From shapes alone, and the process's size now. `stored`: the checkpoint's dtype."""
    size = compute_dtype().itemsize
    parameters = {n: p.numel() for n, p in model.named_parameters()}
    by_block = [sum(v for n, v in parameters.items() if n.startswith(b + ".")) for b in blocks.names]
    largest = max(by_block)
    outside = sum(parameters.values()) - sum(by_block)
    block = model.get_submodule(blocks.names[by_block.index(largest)])
    modules = linears(block)
    inner = max(m.in_features for m in modules.values())
    hidden = getattr(model.config.get_text_config(), "hidden_size", None) or min(
        m.in_features for m in modules.values()
    )
    needed = parse_method(recipe.method).needs_calibration or recipe.stores_kv_scales
    calibrates = needed or recipe.calibration is not None
    tokens = recipe.samples * recipe.seq_len if calibrates else 0
    passing = threads * BATCH * recipe.seq_len * 4 * inner * size if calibrates else 0
    working = max(
        _group(rows, width, stored.itemsize, calibrates, threads, workers) for rows, width in inputs_of(block)
    )
    one = max(m.weight.numel() for m in modules.values())
    proving = largest + one * _PROOF  # the block's codes, and one linear read back from its file beside them
    composition = parse_method(recipe.method)
    settings = settings_of(composition, dict(recipe.set))[composition.rounding]
    learns = settings.scope if METHODS[composition.rounding].learns else None
    graphs = passing * _GRAPH * len(blocks.names)
    whole = sum(parameters.values()) * _LEARNING * 4 + graphs if learns == "model" else 0
    taught = largest * _LEARNING * 4 + passing * _GRAPH if learns == "block" else 0
    return Memory(
        base=psutil.Process().memory_info().rss,
        outside=(outside + largest) * size + tokens * hidden * size,
        block=largest * size + max(working, passing, proving, taught),
        proof=max((outside + largest) * 4, whole),
        activations=tokens * size * (2 * hidden + inner),
        spilled=tokens * hidden * size,
    )


def inputs_of(block: nn.Module) -> list[tuple[int, int]]:
    """(rows, columns) of the matrices that linears of one input make together; siblings of a width are taken for it."""
    rows: dict[tuple[str, int], int] = {}
    for name, module in linears(block).items():
        key = (name.rpartition(".")[0], module.in_features)
        rows[key] = rows.get(key, 0) + module.out_features
    return [(n, width) for (_, width), n in rows.items()]


def _group(rows: int, width: int, stored: int, calibrates: bool, threads: int, workers: int) -> int:
    """Collecting an input's statistics (a Hessian a thread, and the held-out one), then rounding what reads it: two
    Hessians and a factor; the weights twice and their codes twice; what pieces of the rows are worked on with."""
    square = width * width * 4 if calibrates else 0
    pieces = min(rows, rows_at_once(width)) * width * 4 * _PIECE * workers
    return max((threads + 1) * square, 3 * square + rows * width * (2 * stored + 2) + pieces)


def give_back(*, thoroughly: bool) -> None:
    """Return freed memory to the system. The C library keeps what each finished thread's heap once held, and Python
    keeps what sits in reference cycles; a block's worth of each adds up."""
    if thoroughly:
        gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


_PIECE = 8  # float32 copies of a piece's weights while it is rounded
_PROOF = 20  # bytes a weight: two float32 copies of a linear, and what they are made of
_LEARNING = 6  # weights, latents, values, gradients, the start, the step
_GRAPH = 4  # what a backward pass needs of a block's forward pass, in what one batch holds while it passes


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
