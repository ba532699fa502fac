"""The structure of a model, discovered by looking and not by a list of architectures.

blocks        the outermost ModuleList of one class: what the residual stream passes through
entry         what each block is called with (masks, positions), captured once while nothing is computed
input groups  linears that receive *the same tensor object* share one statistic and, later, one equalization
lockstep      all calibration batches walk through a block together and pause where the next group's input is known
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import InputError


@dataclass(frozen=True)
class Blocks:
    """The repeated part of a model: `name` of its ModuleList and the blocks' own names, in order."""

    name: str
    names: tuple[str, ...]


def find_blocks(model: nn.Module) -> Blocks:
    """The outermost ModuleList whose members are of one class and hold the most parameters."""
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and len({type(m) for m in module}) == 1:
            size = sum(p.numel() for p in module.parameters())
            if best is None or size > best[0]:
                best = (size, name, module)
    if best is None:
        raise InputError(f"{type(model).__name__}: no list of equal blocks was found, so there is nothing to walk.")
    return Blocks(best[1], tuple(f"{best[1]}.{i}" for i in range(len(best[2]))))


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    """Every nn.Linear below `module` by its name there."""
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}


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

    def run(self, block: nn.Module, index: int) -> Tensor:
        """The hidden states after `block`, the index-th."""
        args, kwargs = self.arguments[index]
        output = block(self.hidden, *args, **kwargs)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden


class _PassedAllBlocks(Exception):
    pass


class _PassThrough(nn.Module):
    """Stands in for a block: notes what it was called with and hands the hidden states on unchanged."""

    def __init__(self, entry: Entry, last: bool, stand_in_for: nn.Module, returns_tuple: bool) -> None:
        super().__init__()
        self.entry, self.last, self.returns_tuple = entry, last, returns_tuple
        self.attribute_source = [stand_in_for]  # in a list, so that it is no submodule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["attribute_source"][0], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.entry.arguments:
            self.entry.hidden = hidden
        self.entry.arguments.append((args, kwargs))
        if self.last:
            raise _PassedAllBlocks
        return (hidden,) if self.returns_tuple else hidden


def capture_entries(model: nn.Module, blocks: Blocks, batches: Sequence[Tensor]) -> list[Entry]:
    """Run the part of the model before the blocks on each batch of token ids (batch, tokens).

    That part and the first block must be materialized; the other blocks may be on the meta device.
    """
    holder = model.get_submodule(blocks.name)
    assert isinstance(holder, nn.ModuleList)
    originals = list(holder)
    first = _enter(model, holder, originals, batches[0], returns_tuple=False)
    args, kwargs = first.arguments[0]
    returns_tuple = isinstance(originals[0](first.hidden, *args, **kwargs), tuple)
    return [_enter(model, holder, originals, tokens, returns_tuple) for tokens in batches]


def _enter(
    model: nn.Module, holder: nn.ModuleList, originals: list[nn.Module], tokens: Tensor, returns_tuple: bool
) -> Entry:
    """One batch's entry. The first call of all learns only its first block's arguments when blocks return tuples."""
    entry = Entry(torch.empty(0), [])
    try:
        for i, block in enumerate(originals):
            holder[i] = _PassThrough(entry, i == len(originals) - 1, block, returns_tuple)
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


def input_groups(block: nn.Module, entry: Entry, index: int) -> list[InputGroup]:
    """One hooked pass of the block: which linears share an input, in the order the data flows."""
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
    return [InputGroup(tuple(dict.fromkeys(names))) for _, names in seen]
