"""All calibration batches walk through a block in step, and pause where the next group's input is known.

`Lockstep` does it in one thread, holding what every batch has computed so far; `Recompute` (recompute.py) does it where
memory does not allow that. `Walk` deals the batches out to a fixed number of threads, each computing with a single
torch thread: large independent pieces of work, instead of splitting every operation and waiting at its end.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import greenlet
import torch
from torch import Tensor, nn

from lowbit.model.recompute import Recompute
from lowbit.model.walk import Entry, InputGroup, hook_linears
from lowbit.tensor import InputGrid

T = TypeVar("T")


class _Walker(greenlet.greenlet):
    """One batch on its way through a block: which groups it has passed, and what it is waiting with."""

    lockstep: "Lockstep"
    entry: Entry
    passed: set[int]
    seen: dict[str, Tensor]
    waiting: tuple[int, Tensor] | None
    output: Tensor


class Lockstep:
    """All batches walk through one block together, each computing every operation once.

    Each batch's forward pass is a coroutine (a greenlet, since the block's code is not ours to split) that pauses
    when an input group is reached. While all are paused, the group's linears can be replaced; the walk then goes on
    with the new weights. That is GPTQ's "true sequential" order at the cost of a single pass.
    """

    def __init__(
        self,
        block: nn.Module,
        index: int,
        entries: list[Entry],
        groups: Sequence[InputGroup],
        activations: Mapping[str, InputGrid],
        watched: Sequence[str] = (),
    ) -> None:
        """`activations`: the grid that a linear's input is rounded to once its weight is quantized, by local name;
        looked up when the linear is called, so that a pause can add to it. `watched`: modules whose input is kept
        until the batch has passed the block."""
        self._main = greenlet.getcurrent()
        self._walkers = [_Walker(lambda e=e: e.run(block, index)) for e in entries]
        for walker, entry in zip(self._walkers, entries, strict=True):
            walker.lockstep, walker.entry, walker.passed, walker.waiting = self, entry, set(), None
            walker.seen = {}
        self._handles = hook_linears(block, groups, lambda k, name: self._pause_and_round(k, name, activations))
        self._handles += [block.get_submodule(n).register_forward_pre_hook(self._keep(n)) for n in watched]

    def _keep(self, name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            walker = greenlet.getcurrent()
            if isinstance(walker, _Walker) and walker.lockstep is self:
                walker.seen[name] = args[0]

        return hook

    def _pause_and_round(self, k: int | None, name: str, activations: Mapping[str, InputGrid]) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            walker = greenlet.getcurrent()
            if not isinstance(walker, _Walker) or walker.lockstep is not self:
                return None  # a batch of another thread's walk through the same block
            if k is not None and k not in walker.passed:
                walker.passed.add(k)
                walker.waiting = (k, args[0])
                self._main.switch(None)
            grid = activations.get(name)
            return None if grid is None else (grid.round(args[0]), *args[1:])

        return hook

    def inputs(self, k: int) -> Iterator[tuple[Entry, Tensor]]:
        """The k-th group's input, batch by batch (a batch that never reaches the group yields nothing)."""
        for walker in self._walkers:
            while not walker.dead and (walker.waiting is None or walker.waiting[0] < k):
                walker.waiting = None
                self._resume(walker)
            if walker.waiting is not None and walker.waiting[0] == k:
                yield walker.entry, walker.waiting[1]

    def kept(self, name: str) -> list[Tensor]:
        """The input of a watched module, batch by batch, once all have reached it."""
        return [walker.seen[name] for walker in self._walkers]

    def finish(self) -> list[Tensor]:
        """The hidden states after the block, batch by batch; then the block is left as it was."""
        outputs = self.outputs()
        self.close()
        return outputs

    def outputs(self) -> list[Tensor]:
        outputs = []
        for walker in self._walkers:
            while not walker.dead:
                walker.waiting = None
                self._resume(walker)
            outputs.append(walker.output)
        return outputs

    def _resume(self, walker: _Walker) -> None:
        result = walker.switch()
        if walker.dead:
            walker.output = result

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        for walker in self._walkers:  # greenlets and this object refer to each other: let go of the tensors now
            walker.waiting = None
            walker.__dict__.pop("output", None)
        self._walkers = []


class _Turns:
    """Whose turn it is among several threads: one after the other, those that have left are skipped. Nobody is skipped
    who has not said that it leaves, so the order does not depend on timing."""

    def __init__(self, count: int) -> None:
        self._waiting = list(range(count))  # the first one's turn it is
        self._changed = threading.Condition()

    def wait(self, index: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting[0] == index)

    def pass_on(self, index: int) -> None:
        with self._changed:
            self._waiting.remove(index)
            self._waiting.append(index)
            self._changed.notify_all()

    def leave(self, index: int) -> None:
        with self._changed:
            self._waiting.remove(index)
            self._changed.notify_all()


class Walk:
    """The walk of all batches through one block, dealt out to `threads` threads in contiguous shares.

    What is summed is summed share by share and then over the shares in order, so a result depends on the number of
    threads but not on their timing.
    """

    def __init__(
        self,
        block: nn.Module,
        index: int,
        entries: list[Entry],
        groups: Sequence[InputGroup],
        activations: Mapping[str, InputGrid],
        threads: int,
        watched: Sequence[str] = (),
        *,
        recompute: bool = False,
    ) -> None:
        kind: Callable[..., Lockstep | Recompute] = partial(Recompute, threads=threads) if recompute else Lockstep
        size = -(-len(entries) // threads)
        shares = [entries[i : i + size] for i in range(0, len(entries), size)]
        # a greenlet lives in the thread it was made in: each share has a thread of its own
        self._pools = [ThreadPoolExecutor(1, initializer=_begin_thread) for _ in shares]
        self._walks = [
            pool.submit(kind, block, index, share, groups, activations, watched).result()
            for pool, share in zip(self._pools, shares, strict=True)
        ]

    def collect(self, k: int, gather: Callable[[Iterator[tuple[Entry, Tensor]]], T]) -> list[T]:
        """`gather` over the k-th group's inputs, once a share, in the shares' order."""
        return self._each(lambda walk: gather(walk.inputs(k)))

    def in_turn(self, k: int, use: Callable[[Entry, Tensor], None]) -> None:
        """`use` of the k-th group's input, batch by batch and one at a time: the threads compute their inputs side by
        side and take turns with `use`, in a fixed order."""
        turns = _Turns(len(self._walks))

        def share(index: int, walk: Lockstep | Recompute) -> None:
            try:
                for entry, x in walk.inputs(k):
                    turns.wait(index)
                    use(entry, x)
                    turns.pass_on(index)
            finally:
                turns.leave(index)

        work = [pool.submit(share, i, w) for i, (pool, w) in enumerate(zip(self._pools, self._walks, strict=True))]
        for future in work:
            future.result()

    def finish(self) -> list[Tensor]:
        """The hidden states after the block, batch by batch; then the block is left as it was."""
        outputs = self._each(lambda walk: walk.outputs())
        for walk in self._walks:
            walk.close()
        for pool in self._pools:
            pool.shutdown()
        return [hidden for share in outputs for hidden in share]

    def kept(self, name: str) -> list[Tensor]:
        """The input of a watched module, batch by batch, once all have reached it."""
        kept = self._each(lambda walk: walk.kept(name) if isinstance(walk, Lockstep) else [])
        return [value for share in kept for value in share]

    def _each(self, work: Callable[[Lockstep | Recompute], T]) -> list[T]:
        futures = [pool.submit(work, walk) for pool, walk in zip(self._pools, self._walks, strict=True)]
        return [future.result() for future in futures]


def _begin_thread() -> None:
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
