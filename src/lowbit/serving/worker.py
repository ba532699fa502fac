"""The thread that computes: requests come in from anywhere, tokens go out to whoever asked.

A scheduler (runtime/scheduler.py) is a plain object without locks, so one thread owns it. Requests wait in a bounded
line: more than `most` at once are refused at the door, since an answer that comes too late is none.
"""

import copy
import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lowbit.errors import InputError, LowbitError
from lowbit.runtime import conversation
from lowbit.runtime.answer import Output
from lowbit.runtime.base import Engine
from lowbit.runtime.generate import check_prompt
from lowbit.runtime.native import NativeEngine
from lowbit.runtime.sampling import Choice, SamplingParams
from lowbit.runtime.scheduler import Event, Scheduler
from lowbit.runtime.scoring import score


@dataclass(frozen=True)
class Reply:
    """A new token, or what the model expected of the prompt (`scores`, of each token after the first), or why there is
    neither: `error`, the asker's fault if `refused`. After the `last` one nothing follows."""

    output: Output | None = None
    cached_tokens: int = 0
    scores: list[Choice] | None = None
    error: str | None = None
    refused: bool = False
    last: bool = False


Deliver = Callable[[Reply], None]


class Busy(LowbitError):
    """Too many requests are waiting."""


class Steps(Protocol):
    """What the thread needs of a scheduler."""

    @property
    def busy(self) -> bool: ...
    def submit(self, prompt: Sequence[int], params: SamplingParams) -> int: ...
    def cancel(self, request: int) -> bool: ...
    def step(self) -> list[Event]: ...


class OneByOne:
    """The scheduler of an engine that computes one sequence at a time."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: deque[tuple[int, list[int], SamplingParams]] = deque()
        self._running: tuple[int, Iterator[Output]] | None = None
        self._next = 0

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> int:
        check_prompt(prompt, self._engine.vocab_size, self._engine.context_length, params, "the model's context")
        self._waiting.append((self._next, list(prompt), params))
        self._next += 1
        return self._next - 1

    def cancel(self, request: int) -> bool:
        if self._running is not None and self._running[0] == request:
            self._running = None
            return True
        before = len(self._waiting)
        self._waiting = deque(w for w in self._waiting if w[0] != request)
        return len(self._waiting) < before

    def step(self) -> list[Event]:
        request = -1
        try:
            if self._running is None:
                request, tokens, params = self._waiting.popleft()
                self._running = request, iter(self._engine.outputs(tokens, params))
            request, outputs = self._running
            output = next(outputs)
        except LowbitError as error:
            self._running = None
            return [Event(request, None, error=str(error))]
        if output.finish:
            self._running = None
        return [Event(request, output)]


@dataclass(eq=False)
class _Task:
    """A request: its prompt's log-probabilities with `top` others each, if that is no None, and then an answer, unless
    `params` is None."""

    prompt: Sequence[int]
    params: SamplingParams | None
    top: int | None
    deliver: Deliver
    number: int | None = None  # the scheduler's
    parts: Iterator[list[Choice]] | None = None
    scores: list[Choice] = field(default_factory=list)


class Worker:
    """Answers requests on an engine until `stop`. `failure` is why it ended by itself, else None. `tokenizer` is the
    engine's, for whoever asks.

    Args:
        most: requests that are being answered or wait.
        cache_tokens, max_running: see Scheduler; for engines that compute one sequence at a time they mean nothing.
    """

    def __init__(self, engine: Engine, *, most: int = 256, cache_tokens: int = 16384, max_running: int = 32) -> None:
        self.engine = engine
        self.failure: str | None = None
        self.steps: Steps = (
            Scheduler(engine, cache_tokens=cache_tokens, max_running=max_running)
            if isinstance(engine, NativeEngine)
            else OneByOne(engine)
        )
        self.end = conversation.end_tokens(engine.checkpoint, engine.tokenizer)
        self.tokenizer = copy.deepcopy(engine.tokenizer)  # for other threads: one of these cannot be used by two
        self._most, self._count, self._lock = most, 0, threading.Lock()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._asking: dict[int, _Task] = {}  # that the scheduler answers
        self._scoring: deque[_Task] = deque()  # that come before it
        self._thread = threading.Thread(target=self._run, name="lowbit worker", daemon=True)
        self._thread.start()

    @property
    def count(self) -> int:
        """Requests that are being answered or wait."""
        return self._count

    def ask(
        self, prompt: Sequence[int], params: SamplingParams | None, deliver: Deliver, top: int | None = None
    ) -> Callable[[], None]:
        """Queue a request; what comes of it is delivered from the worker's thread. With `top` the prompt's own
        log-probabilities come first, and nothing else without `params`. Returns what cancels it. Raises Busy, or
        LowbitError if the worker has ended."""
        if self.failure is not None:
            raise LowbitError(f"the model is out of service: {self.failure}")
        with self._lock:
            if self._count >= self._most:
                raise Busy(f"{self._count} requests are waiting already. Try again later.")
            self._count += 1
        task = _Task(prompt, params, top, deliver)
        self._inbox.put(lambda: self._begin(task))
        return lambda: self._inbox.put(lambda: self._cancel(task))

    def stop(self) -> None:
        """End the thread after its present step; requests that are not answered end with an error."""
        self._inbox.put(None)
        self._thread.join()

    def _left(self) -> None:
        with self._lock:
            self._count -= 1

    def _begin(self, task: _Task) -> None:
        if self.failure is not None:
            task.deliver(Reply(error=self.failure, last=True))
        elif task.top is None:
            self._answer(task)
        else:
            task.parts = score(self.engine, task.prompt, task.top)
            self._scoring.append(task)

    def _answer(self, task: _Task) -> None:
        assert task.params is not None
        try:
            task.number = self.steps.submit(task.prompt, task.params)
        except InputError as error:
            self._left()
            task.deliver(Reply(error=str(error), refused=True, last=True))
            return
        self._asking[task.number] = task

    def _score(self) -> None:
        """Some more of the first prompt that is scored."""
        task = self._scoring[0]
        assert task.parts is not None
        try:
            part = next(task.parts, None)
        except LowbitError as error:
            self._scoring.popleft()
            self._left()
            task.deliver(Reply(error=str(error), refused=isinstance(error, InputError), last=True))
            return
        if part is not None:
            task.scores += part
            return
        self._scoring.popleft()
        if task.params is None:
            self._left()
        task.deliver(Reply(scores=task.scores, last=task.params is None))
        if task.params is not None:
            self._answer(task)

    def _cancel(self, task: _Task) -> None:
        if task in self._scoring:
            self._scoring.remove(task)
            self._left()
        elif task.number is not None and self._asking.pop(task.number, None) is not None:
            self.steps.cancel(task.number)
            self._left()

    def _run(self) -> None:
        try:
            while self._take_in():
                if self._scoring:
                    self._score()
                if self.steps.busy:
                    for event in self.steps.step():
                        self._pass_on(event)
            self._give_up("the server is stopping")
        except Exception as error:  # the model's own code, or a fault in lowbit: everybody who waits must hear of it
            traceback.print_exc()
            self.failure = f"{type(error).__name__}: {error}"
            self._give_up(self.failure)
            while (call := self._inbox.get()) is not None:  # from those who asked before they could know
                call()

    def _take_in(self) -> bool:
        """Do what was asked for meanwhile, waiting for it where nothing else is to be done; False to end."""
        while True:
            try:
                call = self._inbox.get(block=not (self.steps.busy or self._scoring))
            except queue.Empty:
                return True
            if call is None:
                return False
            call()

    def _pass_on(self, event: Event) -> None:
        task = self._asking.get(event.request)
        ended = event.error is not None or (event.output is not None and event.output.finish is not None)
        if ended and self._asking.pop(event.request, None) is not None:
            self._left()
        if task is not None:
            task.deliver(Reply(event.output, event.cached_tokens, error=event.error, last=ended))

    def _give_up(self, reason: str) -> None:
        for task in (*self._asking.values(), *self._scoring):
            task.deliver(Reply(error=reason, last=True))
        self._asking.clear()
        self._scoring.clear()
