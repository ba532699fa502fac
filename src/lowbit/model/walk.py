"""The structure of a model, discovered by looking and not by a list of architectures.

blocks        the outermost ModuleList of one class: what the residual stream passes through
entry         what each block is called with (masks, positions), captured once while nothing is computed
input groups  linears that receive *the same tensor object* share one statistic and, later, one equalization
lockstep      all calibration batches walk through a block together and pause where the next group's input is known
"""

import contextlib
import ctypes
import graphlib
import itertools
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lowbit.errors import InputError


@dataclass(frozen=True)
class Blocks:
    """The repeated part of a model: `name` of its ModuleList and the blocks' own names, in order."""

    name: str
    names: tuple[str, ...]


def find_blocks(model: nn.Module) -> Blocks:
    """The outermost ModuleList whose members are of one class and hold the most parameters, in the part of the model
    that reads text (a vision tower has blocks too)."""
    root = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    lists = [(n, m) for n, m in root.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    alike = [(n, m) for n, m in lists if len({type(block) for block in m}) == 1]
    best: tuple[int, nn.ModuleList] | None = None
    for _, module in alike or lists:
        size = sum(p.numel() for p in module.parameters())
        if best is None or size > best[0]:
            best = (size, module)
    if best is None:
        raise InputError(f"{type(model).__name__}: no list of equal blocks was found, so there is nothing to walk.")
    name = next(n for n, m in model.named_modules() if m is best[1])
    return Blocks(name, tuple(f"{name}.{i}" for i in range(len(best[1]))))


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    """Every nn.Linear below `module` by its name there."""
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}


def hook_linears(
    block: nn.Module, groups: Sequence["InputGroup"], hook: Callable[[int | None, str], Any]
) -> list[RemovableHandle]:
    """Put hook(index of its group if it is in one, local name) before every linear of the block."""
    group_of = {name: k for k, group in enumerate(groups) for name in group.names}
    return [m.register_forward_pre_hook(hook(group_of.get(name), name)) for name, m in linears(block).items()]


def attentions(model: nn.Module) -> list[str]:
    """The modules that keep keys and values, in the layers' order: they know their `layer_idx` and project."""
    found = [
        (int(m.layer_idx), name)
        for name, m in model.named_modules()
        if isinstance(getattr(m, "layer_idx", None), int)
        and sum(isinstance(child, nn.Linear) for child in m.children()) > 1
    ]
    return [name for _, name in sorted(found)]


def routers(model: nn.Module) -> frozenset[str]:
    """The linears that choose experts, or weigh a shared one: beside a list of experts, with one output for each of
    them or a single one. Tiny, and a wrong choice costs more than any rounding."""
    found = set()
    for name, module in model.named_modules():
        for child, experts in module.named_children():
            count = _experts_in(experts)
            if count:
                prefix = f"{name}.{child}." if name else f"{child}."
                found |= {
                    full
                    for local, linear in linears(module).items()
                    if not (full := f"{name}.{local}".lstrip(".")).startswith(prefix)
                    and linear.out_features in (1, count)
                }
    return frozenset(found)


def other_products(model: nn.Module) -> frozenset[str]:
    """Modules that multiply by a matrix of their own without being an nn.Linear (today's routers). In another engine
    they may be linears, so a config must name them as left alone."""
    lookups = (nn.Linear, nn.Embedding)
    return frozenset(
        name
        for name, module in model.named_modules()
        if not isinstance(module, lookups) and getattr(module._parameters.get("weight"), "ndim", 0) == 2
    )


def _experts_in(module: nn.Module) -> int:
    """How many experts a module holds, numbered or stacked; 0 if it is not a holder of experts."""
    numbered = [m for n, m in module.named_children() if n.isdigit()]
    if len(numbered) > 1 and len({type(m) for m in numbered}) == 1:
        return len(numbered)
    stacked = {len(p) for p in module.parameters(recurse=False) if p.dim() == 3}
    return stacked.pop() if len(stacked) == 1 else 0


def head_width(config: Any) -> int | None:
    """Channels of one attention head by the text model's config, or None if it does not say."""
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    return getattr(config, "head_dim", None) or (width // heads if width and heads else None)


@dataclass
class Entry:
    """What enters the blocks for one batch: the hidden states, and each block's other arguments."""

    hidden: Tensor  # (batch, tokens, width)
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]
    held_out: bool = False  # checks a method's result instead of feeding the method
    keyword: str | None = None  # the hidden states' name, if blocks take them by name
    returns_tuple: bool = False  # whether blocks return the hidden states as the first of several things

    room: Tensor | None = None  # where the hidden states are kept, if that is not ordinary memory

    def keep(self, hidden: Tensor) -> Tensor:
        """`hidden`, moved to this entry's room if it has one."""
        if self.room is None:
            return hidden
        self.room.copy_(hidden)
        self._rest()
        return self.room

    def _rest(self) -> None:
        """Pages of a mapped file count as memory until they are let go; the system keeps them if it has room."""
        if self.room is not None:
            start, end = self.room.data_ptr(), self.room.data_ptr() + self.room.nbytes
            start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
            if end > start and hasattr(mmap, "MADV_DONTNEED"):
                ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)

    def call(self, block: Callable[..., Any], index: int) -> Any:
        """What `block`, the index-th, returns."""
        args, kwargs = self.arguments[index]
        try:
            if self.keyword is None:
                return block(self.hidden, *args, **kwargs)
            return block(*args, **kwargs, **{self.keyword: self.hidden})
        finally:
            self._rest()

    def run(self, block: Callable[..., Any], index: int) -> Tensor:
        """The hidden states after `block`, the index-th."""
        output = self.call(block, index)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden


class _PassedAllBlocks(Exception):
    pass


class _PassThrough(nn.Module):
    """Stands in for a block: notes what it was called with and hands the hidden states on unchanged."""

    def __init__(self, entry: Entry, last: bool, stand_in_for: nn.Module) -> None:
        super().__init__()
        self.entry, self.last = entry, last
        self.attribute_source = [stand_in_for]  # in a list, so that it is no submodule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["attribute_source"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            hidden, *rest = args
            args = tuple(rest)
        else:
            self.entry.keyword = "hidden_states"
            hidden = kwargs.pop("hidden_states")
        if not self.entry.arguments:
            self.entry.hidden = hidden
        self.entry.arguments.append((args, kwargs))
        if self.last:
            raise _PassedAllBlocks
        return (hidden,) if self.entry.returns_tuple else hidden


def capture_entries(
    model: nn.Module, blocks: Blocks, batches: Sequence[Tensor], file: Path | None = None
) -> list[Entry]:
    """Run the part of the model before the blocks on each batch of token ids (batch, tokens).

    That part and the first block must be materialized; the other blocks may be on the meta device. With a `file` the
    hidden states live there, mapped into memory: the operating system keeps of it what fits. Raises OSError if the
    disk is full.
    """
    holder = model.get_submodule(blocks.name)
    assert isinstance(holder, nn.ModuleList)
    originals = list(holder)
    first = _enter(model, holder, originals, batches[0], returns_tuple=False)
    returns_tuple = isinstance(first.call(originals[0], 0), tuple)
    if file is None:
        return [_enter(model, holder, originals, tokens, returns_tuple) for tokens in batches]
    width, dtype = first.hidden.shape[-1], first.hidden.dtype
    sizes = [tokens.numel() * width for tokens in batches]
    with file.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, sum(sizes) * dtype.itemsize)  # full now or never
    mapped = torch.from_file(str(file), shared=True, size=sum(sizes), dtype=dtype)
    entries = []
    for tokens, room in zip(batches, mapped.split(sizes), strict=True):
        entry = _enter(model, holder, originals, tokens, returns_tuple)
        entry.room = room.view(entry.hidden.shape)
        entry.hidden = entry.keep(entry.hidden)
        entries.append(entry)
    return entries


def _enter(
    model: nn.Module, holder: nn.ModuleList, originals: list[nn.Module], tokens: Tensor, returns_tuple: bool
) -> Entry:
    """One batch's entry. The first call of all learns only its first block's arguments when blocks return tuples."""
    entry = Entry(torch.empty(0), [], returns_tuple=returns_tuple)
    try:
        for i, block in enumerate(originals):
            holder[i] = _PassThrough(entry, i == len(originals) - 1, block)
        with contextlib.suppress(_PassedAllBlocks):
            model(input_ids=tokens, use_cache=False)
    finally:
        for i, block in enumerate(originals):
            holder[i] = block
    return entry


@dataclass(frozen=True)
class InputGroup:
    """Linears of one block that receive the same tensor, by their names in the block, in the order of the calls."""

    names: tuple[str, ...]


def input_groups(block: nn.Module, entry: Entry, index: int, others: Sequence[Entry] = ()) -> list[InputGroup]:
    """Which linears share an input, in the order the data flows: a hooked pass of the block, and further ones with
    the `others` until every linear was reached (a mixture's experts see only the tokens routed to them)."""
    unseen = set(linears(block))
    groups: list[tuple[str, ...]] = []
    sorter: graphlib.TopologicalSorter[str] = graphlib.TopologicalSorter()
    for batch in (entry, *others):
        passed = _one_pass(block, batch, index)
        sorter.add(passed[0][0])
        for before, after in itertools.pairwise(passed):
            sorter.add(after[0], before[0])
        groups += [names for names in passed if names[0] in unseen]
        unseen -= {name for names in passed for name in names}
        if not unseen:
            break
    by_first = {names[0]: names for names in groups}
    return [InputGroup(by_first[first]) for first in sorter.static_order()]


def _one_pass(block: nn.Module, entry: Entry, index: int) -> list[tuple[str, ...]]:
    """The groups that one batch's pass reaches, in the order of the calls."""
    seen: list[tuple[Tensor, list[str]]] = []

    def note(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            for tensor, names in seen:
                if tensor is args[0]:
                    names.append(name)
                    return
            seen.append((args[0], [name]))

        return hook

    handles = [m.register_forward_pre_hook(note(name)) for name, m in linears(block).items()]
    try:
        entry.run(block, index)
    finally:
        for handle in handles:
            handle.remove()
    return [tuple(dict.fromkeys(names)) for _, names in seen]
