"""A walk of calibration batches through a block that holds one batch at a time.

Each group's input is computed from the block's beginning: the same values from the same operations as in lockstep, so
the result is the same to the last bit. What the linears of earlier groups make of it no longer changes once those are
rounded, so it is computed once and read from a file from then on, and so is what a part of the block with such linears
alone makes (its attention); only what lies between them is computed anew.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lowbit.model.walk import Entry, InputGroup, hook_linears, linears
from lowbit.parking import Shelf
from lowbit.tensor import InputGrid

WORTH_KEEPING = 512  # inputs of a linear: with fewer, computing an output is as fast as writing and reading it
_SHARE_OF_DISK = 0.5  # of what is free, for all threads together


class _Reached(Exception):
    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x


class Recompute:
    """What Lockstep does, one batch after the other, one pass for each group."""

    def __init__(
        self,
        block: nn.Module,
        index: int,
        entries: list[Entry],
        groups: Sequence[InputGroup],
        activations: Mapping[str, InputGrid],
        watched: Sequence[str] = (),
        *,
        threads: int = 1,
    ) -> None:
        assert not watched, "nothing is kept of what passes by"
        self._block, self._index = block, index
        self._entries, self._groups = entries, groups
        self._thread = threading.get_ident()
        self._wanted: int | None = None
        self._batch = 0
        self._calls: dict[str, int] = {}  # of this pass, by linear: one may be called several times
        self._shelf = Shelf(_SHARE_OF_DISK / threads)
        self._others: dict[tuple[int, str, int], tuple[None, ...] | None] = {}  # what a part returns beside its tensor
        self._handles = hook_linears(block, groups, lambda k, name: self._before(k, name, activations))
        self._handles += [m.register_forward_hook(self._after(n)) for n, m in linears(block).items()]
        self._parts = self._last_groups()
        for name in self._parts:
            _Part.of(block.get_submodule(name)).callers[self._thread] = functools.partial(self._part, name)

    def _last_groups(self) -> dict[str, int]:
        """Parts of the block that are worth keeping the output of, and the group after which it no longer changes."""
        group_of = {name: k for k, group in enumerate(self._groups) for name in group.names}
        parts = {}
        for name, child in self._block.named_children():
            inner = {f"{name}.{n}": m.in_features for n, m in linears(child).items()}
            known = [group_of[n] for n in inner if n in group_of]
            if len(known) == len(inner) > 1 and max(inner.values()) >= WORTH_KEEPING:
                parts[name] = max(known)
        return parts

    def _part(self, name: str, forward: Callable[..., Any], *args: Any, **words: Any) -> Any:
        """A part's output, from the shelf if it is there."""
        self._calls[name] = self._calls.get(name, 0) + 1
        key = self._key(name)
        if key in self._shelf:
            values, others = self._shelf.get(key), self._others[key]
            return values if others is None else (values, *others)
        output = forward(*args, **words)
        values, others = (output[0], output[1:]) if isinstance(output, tuple) and output else (output, None)
        keeps = isinstance(values, Tensor) and all(other is None for other in others or ())
        if keeps and self._final(self._parts[name]):
            self._others[key] = others
            self._shelf.put(key, values)
        return output

    def _final(self, group: int | None) -> bool:
        """Whether linears of a group are rounded by now, and their outputs will be wanted again."""
        return self._wanted is not None and group is not None and group < self._wanted

    def _before(self, k: int | None, name: str, activations: Mapping[str, InputGrid]) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if threading.get_ident() != self._thread:
                return None  # a batch of another thread's walk through the same block
            if k is not None and k == self._wanted:
                raise _Reached(args[0])
            self._calls[name] = self._calls.get(name, 0) + 1
            if self._key(name) in self._shelf:
                return (args[0][:0], *args[1:])  # nothing to compute
            grid = activations.get(name)
            return None if grid is None else (grid.round(args[0]), *args[1:])

        return hook

    def _after(self, name: str) -> Callable[..., Any]:
        group = next((k for k, group in enumerate(self._groups) if name in group.names), None)

        def hook(module: nn.Linear, _args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if threading.get_ident() != self._thread:
                return None
            key = self._key(name)
            if key in self._shelf:
                return self._shelf.get(key)
            kept_as_part = self._final(self._parts.get(name.partition(".")[0]))
            if self._final(group) and module.in_features >= WORTH_KEEPING and not kept_as_part:
                self._shelf.put(key, output)
            return None

        return hook

    def _key(self, name: str) -> tuple[int, str, int]:
        return self._batch, name, self._calls[name]

    def _passes(self, wanted: int | None) -> Iterator[Entry]:
        """Every batch, about to begin its pass."""
        self._wanted = wanted
        for i, entry in enumerate(self._entries):
            self._batch, self._calls = i, {}
            yield entry

    def inputs(self, k: int) -> Iterator[tuple[Entry, Tensor]]:
        """The k-th group's input, batch by batch (a batch that never reaches the group yields nothing)."""
        for entry in self._passes(k):
            try:
                entry.run(self._block, self._index)
            except _Reached as reached:
                yield entry, reached.x

    def outputs(self) -> list[Tensor]:
        return [entry.keep(entry.run(self._block, self._index)) for entry in self._passes(None)]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        for name in self._parts:
            _Part.of(self._block.get_submodule(name)).leave(self._thread)
        self._shelf.close()


class _Part:
    """A module's `forward` while threads walk through it: each has a caller of its own."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._forward, self._own = module, module.forward, "forward" in vars(module)
        self.callers: dict[int, Callable[..., Any]] = {}
        functools.update_wrapper(self, module.forward)

    @staticmethod
    def of(module: nn.Module) -> "_Part":
        """The module's present one, or a new one in the place of its `forward`."""
        if not isinstance(module.forward, _Part):
            module.__dict__["forward"] = _Part(module)  # a hook cannot skip what it stands before
        assert isinstance(module.forward, _Part)
        return module.forward

    def __call__(self, *args: Any, **words: Any) -> Any:
        caller = self.callers.get(threading.get_ident())
        return self._forward(*args, **words) if caller is None else caller(self._forward, *args, **words)

    def leave(self, thread: int) -> None:
        self.callers.pop(thread, None)
        if self.callers:
            return
        if self._own:
            self._module.__dict__["forward"] = self._forward
        else:
            del self._module.__dict__["forward"]
