"""Many requests at once: continuous batching over the native decoder's paged cache.

Decoding reads all weights whether it is for one sequence or for thirty, so sequences should share steps; but they come
and go at different times. Therefore the batch is made anew for every step (Yu et al. 2022, "Orca", 3.1): running
sequences bring their next token, and what is left of a budget of tokens goes to prompts, in pieces, so that a long
prompt does not hold up the answers of others (Agrawal et al. 2024, "Sarathi-Serve", 4). One native call runs it all.

Cache blocks are given out as tokens need them (kv_blocks.py). When none is left, the youngest running sequence gives
its blocks back and waits at the head of the queue; its tokens are computed again later, and since the decoder's logits
are the same bits whatever they are computed beside, its answer is the one it would have had (Kwon et al. 2023, 4.5).
The oldest is never pushed out, so every step makes progress.

(All of that is exact with a cache of floats, which the engines use. An int8 cache rounds single tokens differently.)

A plain synchronous object: nothing happens but in `step`, and there is no thread or lock inside.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lowbit.errors import InputError, LowbitError
from lowbit.runtime import conversation
from lowbit.runtime.answer import Answer, Output
from lowbit.runtime.base import Engine
from lowbit.runtime.generate import check_prompt
from lowbit.runtime.kv_blocks import BlockPool
from lowbit.runtime.native import NativeEngine
from lowbit.runtime.sampling import SamplingParams


@dataclass(frozen=True)
class Event:
    """A new token of a request. `error` says why a request ended without one (`output` is None then).

    `cached_tokens` of the prompt were not computed because an earlier request had left them in the cache.
    """

    request: int
    output: Output | None
    cached_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Stats:
    """Counts for a dashboard; tokens and requests since the scheduler was made, the rest as it is now."""

    running: int
    waiting: int
    blocks: int
    blocks_used: int
    steps: int
    prompt_tokens: int  # computed, not taken from the cache
    generated_tokens: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    preemptions: int


@dataclass(eq=False)
class _Sequence:
    request: int
    answer: Answer
    table: np.ndarray  # int32, cache blocks
    owned: int = 0  # blocks of the table in use
    computed: int = 0  # tokens whose keys and values are in the cache
    sealed: int = 0  # blocks named for reuse
    name: bytes = b""  # of the last of them
    cached: int | None = None  # prompt tokens found in the cache when it first started

    @property
    def pending(self) -> int:
        return len(self.answer.tokens) - self.computed

    @property
    def blocks(self) -> list[int]:
        return [int(b) for b in self.table[: self.owned]]


_Plan = dict[_Sequence, int]  # who brings how many tokens to a step


class Scheduler:
    """Serves requests on an engine.

    Args:
        engine: of `lowbit.load`; it must run on the native decoder.
        cache_tokens: size of the key-value cache, shared by all requests (default 16384).
        max_running: the most sequences in a step.
        step_tokens: the most tokens in a step (at most what the decoder takes, 512).
        reuse: keep the cache of finished prompts for later ones that begin alike.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        cache_tokens: int = 16384,
        max_running: int = 32,
        step_tokens: int = 512,
        reuse: bool = True,
    ) -> None:
        if not isinstance(engine, NativeEngine):
            raise InputError(
                f"the scheduler needs the native decoder, and this model runs on {engine.runtime}: load it with the "
                "runtime 'auto' in a scheme that has native kernels, or answer its requests one by one."
            )
        for name, value in (("cache_tokens", cache_tokens), ("max_running", max_running), ("step_tokens", step_tokens)):
            if value < 1:
                raise InputError(f"{name} is {value}; expected a whole number from 1 up.")
        self.engine = engine
        self._decoder = engine.make_decoder(cache_tokens)
        self._pool = BlockPool(self._decoder.kv_blocks, self._decoder.kv_block, reuse=reuse)
        self._max_running = max_running
        self._step_tokens = min(step_tokens, self._decoder.max_tokens)
        self._limit = min(engine.context_length, self._decoder.max_position)  # tokens of one sequence
        self._end = conversation.end_tokens(engine.checkpoint, engine.tokenizer)
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._next_request = 0
        self._steps = self._prompt_tokens = self._generated = self._preemptions = 0

    def submit(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> int:
        """Queue a request; its number. Raises InputError for one that can never be answered."""
        params = params or SamplingParams()
        tokens = conversation.encode(self.engine.tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
        what = "the model's context" if self._limit == self.engine.context_length else "the scheduler's cache"
        limit = check_prompt(tokens, self.engine.vocab_size, self._limit, params, what)
        answer = Answer(tokens, params, limit, self._end, self.engine.tokenizer)
        table = np.zeros(-(-(len(tokens) + limit) // self._pool.block_size), np.int32)
        self._waiting.append(_Sequence(self._next_request, answer, table))
        self._next_request += 1
        return self._next_request - 1

    def cancel(self, request: int) -> bool:
        """Forget a request and free what it holds; whether it was still there. No event follows."""
        for sequence in (*self._running, *self._waiting):
            if sequence.request == request:
                self._remove(sequence)
                return True
        return False

    @property
    def busy(self) -> bool:
        return bool(self._running or self._waiting)

    @property
    def stats(self) -> Stats:
        pool = self._pool
        return Stats(
            len(self._running), len(self._waiting), pool.blocks, pool.used, self._steps, self._prompt_tokens,
            self._generated, pool.query_tokens, pool.hit_tokens, self._preemptions,
        )  # fmt: skip

    def step(self) -> list[Event]:
        """Run one call of the decoder and say what came of it; nothing if there is nothing to do."""
        plan: _Plan = {}
        preemptions = self._preemptions
        for first in (True, False):  # answers before prompts
            for sequence in list(self._running):
                if sequence in self._running and (sequence.pending == 1) is first:
                    self._schedule(plan, sequence)
        while self._waiting and preemptions == self._preemptions and self._admit(plan):
            continue
        return self._run(plan) if plan else []

    def _schedule(self, plan: _Plan, sequence: _Sequence) -> None:
        """Give a running sequence its share of the step, and the blocks for it."""
        n = min(sequence.pending, self._step_tokens - sum(plan.values()))
        if n < 1:
            return
        needed = self._blocks_for(sequence.computed + n)
        while sequence.owned + self._pool.available < needed:
            youngest = max(self._running, key=lambda s: s.request)
            self._preempt(plan, youngest)
            if youngest is sequence:
                return
        while sequence.owned < needed:
            sequence.table[sequence.owned] = self._pool.take()
            sequence.owned += 1
        plan[sequence] = n

    def _admit(self, plan: _Plan) -> bool:
        """Start the first of those that wait, if a place, tokens of the step and blocks for all it has are free."""
        sequence, pool = self._waiting[0], self._pool
        if len(self._running) >= self._max_running or sum(plan.values()) >= self._step_tokens:
            return False
        found = pool.match(sequence.answer.tokens)
        fresh = self._blocks_for(len(sequence.answer.tokens)) - len(found)
        if fresh > pool.available - pool.idle_among(found):
            return False
        self._waiting.popleft()
        pool.adopt(found, len(sequence.answer.tokens))
        sequence.table[: len(found)] = found
        sequence.owned = sequence.sealed = len(found)
        sequence.computed = len(found) * pool.block_size
        if sequence.cached is None:
            sequence.cached = sequence.computed
        sequence.name = pool.name_of(found[-1]) if found else b""
        self._running.append(sequence)
        self._schedule(plan, sequence)
        return True

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._pool.block_size)

    def _run(self, plan: _Plan) -> list[Event]:
        tokens, rows = [], []
        for sequence, n in plan.items():
            at = sequence.computed
            tokens += sequence.answer.tokens[at : at + n]
            rows.append((n, at, n == 1))
        width = max(s.owned for s in plan)
        tables = np.zeros((len(plan), width), np.int32)
        for i, sequence in enumerate(plan):
            tables[i, : sequence.owned] = sequence.table[: sequence.owned]
        wanted = any(s.answer.params.needs_logits and s.pending == n for s, n in plan.items())
        logits, best = self._decoder.forward(
            torch.tensor(tokens, dtype=torch.int32), rows, torch.from_numpy(tables), logits=wanted
        )
        self._steps += 1
        events = []
        for i, ((sequence, n), choice) in enumerate(zip(plan.items(), best.tolist(), strict=True)):
            self._computed(sequence, n)
            if sequence.pending == 0:
                events.append(self._choose(sequence, None if logits is None else logits[i], choice))
        return events

    def _computed(self, sequence: _Sequence, n: int) -> None:
        """Take note that n more tokens are in the cache, and name the blocks that they fill."""
        size, tokens = self._pool.block_size, sequence.answer.tokens
        self._prompt_tokens += max(0, min(sequence.computed + n, sequence.answer.prompt_length) - sequence.computed)
        sequence.computed += n
        while (sequence.sealed + 1) * size <= sequence.computed:
            at = sequence.sealed * size
            block = int(sequence.table[sequence.sealed])
            sequence.name = self._pool.seal(block, sequence.name, tokens[at : at + size])
            sequence.sealed += 1

    def _choose(self, sequence: _Sequence, logits: torch.Tensor | None, best: int) -> Event:
        """The next token of a sequence that is computed to its end. Only the sequence at fault ends by an error."""
        try:
            output = sequence.answer.choose(logits, best)
        except LowbitError as error:
            self._remove(sequence)
            return Event(sequence.request, None, error=str(error))
        self._generated += 1
        if output.finish:
            self._remove(sequence)
        return Event(sequence.request, output, sequence.cached or 0)

    def _preempt(self, plan: _Plan, sequence: _Sequence) -> None:
        """Take a running sequence's blocks away; it starts again when there is room, before all others."""
        plan.pop(sequence, None)
        self._remove(sequence)
        self._preemptions += 1
        self._waiting.appendleft(sequence)

    def _remove(self, sequence: _Sequence) -> None:
        self._pool.release(sequence.blocks)
        sequence.owned = sequence.computed = sequence.sealed = 0
        sequence.name = b""
        for queue in (self._running, self._waiting):
            if sequence in queue:
                queue.remove(sequence)
