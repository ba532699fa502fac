"""How much memory a quantization will take, before it takes it.

The process never holds the model. At any time it holds one of

    entering    embeddings and first block; hidden states of all calibration batches
    a block     its weights; the Hessians of one input group and what rounding makes of the group; hidden states, and
                what each batch has computed so far in the block
    proving     one block or the head in float32, at the beginning and at the end

and the peak is the largest, above what the process had before. Where that is more than there is, or activations are
much of it, hidden states go to a mapped file, each batch goes through the block anew for every input group
(`Recompute`), and while a wide input's linears are rounded, the block's weights wait on disk, and the Hessian as long
as only its factor is needed (parking.py): a little slower, with the same result.
"""

import resource
from dataclasses import dataclass

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from lowbit.algorithms import METHODS
from lowbit.algorithms.compose import parse_method, settings_of
from lowbit.console import note
from lowbit.environment import compute_dtype
from lowbit.errors import InputError
from lowbit.model.outside import LARGE
from lowbit.model.recompute import WORTH_KEEPING
from lowbit.model.walk import Blocks, linears
from lowbit.parking import WIDE
from lowbit.recipe import Recipe
from lowbit.tensor import rows_at_once

BATCH = 4  # windows a batch at most
_CACHE = 8 << 20  # bytes: a batch's widest activations stay in the cache
_WORTH_SPILLING = 256e6  # bytes that need not be in memory
_FEW_GROUPS = 8  # so often may a batch pass a block without being asked to,
_LITTLE = 0.5  # with so much of the block computed anew each time


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
    parked: int = 0  # what `block` has that can wait on disk while a wide input's linears are rounded
    spills: bool = False  # whether passing the block again for each group is cheap

    @property
    def peak(self) -> int:
        return self.base + max(self.outside, self.block + self.activations, self.proof)

    @property
    def least(self) -> int:
        """The peak with activations and waiting matrices on disk."""
        return self.base + max(self.outside, self.block - self.parked, self.proof)

    @property
    def pays(self) -> bool:
        """Whether the disk takes enough for its price, a second forward pass or two of each block."""
        return self.spills and self.peak - self.least > _WORTH_SPILLING and self.peak > 1.2 * self.least


def windows_at_once(model: PreTrainedModel, blocks: Blocks, seq_len: int) -> int:
    """Calibration windows that pass a block together: few enough that their activations stay in the cache."""
    widest = max((m.in_features for m in linears(model.get_submodule(blocks.names[0])).values()), default=1)
    return max(1, min(BATCH, _CACHE // (seq_len * widest * compute_dtype().itemsize)))


def estimate_memory(
    model: PreTrainedModel, blocks: Blocks, recipe: Recipe, stored: torch.dtype, threads: int, workers: int = 1
) -> Memory:
    """From shapes alone, and the process's size now. `stored`: the checkpoint's dtype."""
    size = compute_dtype().itemsize
    parameters = {n: p.numel() for n, p in model.named_parameters()}
    by_block = [sum(v for n, v in parameters.items() if n.startswith(b + ".")) for b in blocks.names]
    largest = max(by_block)
    block = model.get_submodule(blocks.names[by_block.index(largest)])
    modules = linears(block)
    inner = max(m.in_features for m in modules.values())
    hidden = getattr(model.config.get_text_config(), "hidden_size", None) or min(
        m.in_features for m in modules.values()
    )
    needed = parse_method(recipe.method).needs_calibration or recipe.stores_kv_scales
    calibrates = needed or recipe.calibration is not None
    tokens = recipe.samples * recipe.seq_len if calibrates else 0
    batch = windows_at_once(model, blocks, recipe.seq_len) * recipe.seq_len
    passing = threads * batch * 4 * inner * size if calibrates else 0
    groups = [_Group(rows, width, stored.itemsize, size, calibrates, batch) for rows, width in inputs_of(block)]
    working = max(max(g.collecting(threads, passing), g.rounding(workers)) for g in groups)
    away = [g.factor + largest * size if g.wide else 0 for g in groups]
    least = max(max(g.collecting(threads, passing), g.rounding(workers) - a) for g, a in zip(groups, away, strict=True))
    parked = working - least
    one = max(m.weight.numel() for m in modules.values())
    proving = one * _PROOF  # one linear read back from its file, beside the block's codes
    composition = parse_method(recipe.method)
    settings = settings_of(composition, dict(recipe.set))[composition.rounding]
    learns = settings.scope if METHODS[composition.rounding].learns else None
    graphs = passing * _GRAPH * len(blocks.names)
    whole = sum(parameters.values()) * _LEARNING * 4 + graphs if learns == "model" else 0
    taught = largest * _LEARNING * 4 + passing * _GRAPH if learns == "block" else 0
    again = sum(m.weight.numel() for m in modules.values() if m.in_features < WORTH_KEEPING)
    outside = [v for n, v in parameters.items() if not n.startswith(blocks.name + ".")]
    table = max((v for v in outside if v >= LARGE), default=0)
    small = sum(v for v in outside if v < LARGE)
    held = largest * size + largest  # the weights, and the codes that become of them
    return Memory(
        base=psutil.Process().memory_info().rss,
        outside=(small + table + largest) * size + tokens * hidden * size,
        block=held + max(working, proving, taught),
        proof=max(small * 4 + max(table * stored.itemsize + largest * 4, table * (stored.itemsize + 4)), whole),
        activations=tokens * size * (2 * hidden + inner),
        spilled=tokens * hidden * size + parked,
        parked=parked if max(working, proving, taught) == working else 0,
        spills=len(groups) <= _FEW_GROUPS and learns is None and again < _LITTLE * largest,
    )


def inputs_of(block: nn.Module) -> list[tuple[int, int]]:
    """(rows, columns) of the matrices that linears of one input make together; siblings of a width are taken for it."""
    rows: dict[tuple[str, int], int] = {}
    for name, module in linears(block).items():
        key = (name.rpartition(".")[0], module.in_features)
        rows[key] = rows.get(key, 0) + module.out_features
    return [(n, width) for (_, width), n in rows.items()]


@dataclass(frozen=True)
class _Group:
    """An input that linears of `rows` outputs together read: what looking at it takes, and what rounding them takes."""

    rows: int
    width: int
    stored: int  # bytes a weight
    size: int  # bytes a value that passes
    calibrates: bool
    batch: int  # tokens

    @property
    def wide(self) -> bool:
        return self.width >= WIDE

    @property
    def square(self) -> int:
        return self.width * self.width * 4 if self.calibrates else 0

    @property
    def factor(self) -> int:
        """What a file can take while it is not needed."""
        return self.square if self.wide else 0

    @property
    def judging(self) -> int:
        """The held-out windows' Hessian, or of a wide input their rows."""
        return self.batch * self.width * self.size if self.wide and self.calibrates else self.square

    def collecting(self, threads: int, passing: int) -> int:
        return (1 if self.wide else threads) * self.square + self.judging + passing

    def rounding(self, workers: int) -> int:
        """The Hessians and a factor; the weights (twice, where several make one matrix) and two kinds of codes; what
        pieces of the rows are worked on with."""
        pieces = min(self.rows, rows_at_once(self.width)) * self.width * 4 * _PIECE * workers
        return 2 * self.square + self.judging + self.rows * self.width * (2 * self.stored + 2) + pieces


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
    if memory.peak > limit:
        note(f"activations are kept on disk: {memory.peak / 1e6:.0f} MB would be needed, {limit / 1e6:.0f} MB allowed")
    elif memory.pays and not asked:
        note(f"activations are kept on disk: {memory.least / 1e6:.0f} MB are needed instead of {memory.peak / 1e6:.0f}")
        return True
    return memory.peak > limit
