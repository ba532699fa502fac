"""Independent pieces of work side by side, with the same result whatever the number of workers.

A piece is a function of values that exist already (rows of a weight, the Hessian of their input) and returns new ones.
What the pieces are never depends on how many workers there are, each piece is computed with one torch thread, and
results come back in the pieces' order, so sums are the same to the last bit.

Workers are forked: a child sees the Hessian and the weights where they are, and only results travel. Threads would
share them as well, but the work is thousands of operations of some microseconds, each of which takes Python's lock.
A child that dies takes nothing with it: it writes no file of the job's.

The number is the process's setting, as torch's number of threads is. Several GPUs would be served at the same place:
a piece a device, each by a thread, since there the operations run without Python.
"""

import contextlib
import ctypes
import os
import pickle
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, NoReturn, TypeVar

import torch

from lowbit import allocator
from lowbit.errors import InputError, LowbitError

T = TypeVar("T")
_setting = {"workers": 1, "threads": 0}  # threads: torch's number outside `one_thread`, 0 if that is not in force
_PR_SET_PDEATHSIG = 1


class WorkerError(LowbitError):
    """A worker process ended without an answer."""


def default_workers() -> int:
    """One for each of torch's threads, where processes can be forked."""
    return torch.get_num_threads() if sys.platform == "linux" else 1


def check_workers(workers: int) -> None:
    """Raise InputError for a number of workers that is none, or if this system cannot fork safely."""
    if workers < 1:
        raise InputError(f"workers must be at least 1, got {workers}.")
    if workers > 1 and sys.platform != "linux":
        raise InputError(f"--workers {workers}: worker processes need Linux. Leave --workers out.")


@contextlib.contextmanager
def using(workers: int) -> Iterator[None]:
    """`side_by_side` takes so many processes within."""
    check_workers(workers)
    before, _setting["workers"] = _setting["workers"], workers
    try:
        yield
    finally:
        _setting["workers"] = before


def one_thread() -> contextlib.AbstractContextManager[None]:
    """Column loops are thousands of operations of a few microseconds: a second thread costs more than it brings,
    and on a busy machine each waits for it."""
    return _single(_setting["threads"] or torch.get_num_threads())


def _alone() -> contextlib.AbstractContextManager[None]:
    """One thread for a piece, whatever it asks for."""
    return _single(1)


@contextlib.contextmanager
def _single(most: int) -> Iterator[None]:
    """One thread, and `most` within `every_thread`."""
    before, _setting["threads"] = _setting["threads"], most
    try:
        with _threads(1):
            yield
    finally:
        _setting["threads"] = before


@contextlib.contextmanager
def every_thread() -> Iterator[None]:
    """Within `one_thread`, for a product that is large: torch's threads as they are outside. Not in a piece of work
    side by side, whose result must not depend on how many others there are."""
    with _threads(_setting["threads"] or torch.get_num_threads()):
        yield


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def side_by_side(pieces: Sequence[Callable[[], T]], *, worth_it: bool = True) -> list[T]:
    """The pieces' results, in order; one after the other in this process where it is not worth starting others.

    Raises what the first failing piece raised, or WorkerError if a worker died.
    """
    workers = min(_setting["workers"], len(pieces)) if worth_it else 1
    if workers <= 1:
        with _alone():
            return [piece() for piece in pieces]
    children: list[_Child] = []
    try:
        with _interrupts_held():
            for k in range(workers):
                children.append(_start(pieces[k::workers]))
        answers = _answers(children)
    finally:
        for child in children:
            child.end()
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return [answers[i % workers][i // workers] for i in range(len(pieces))]


@dataclass
class _Child:
    pid: int
    pipe: Connection
    status: int | None = None

    def end(self) -> int:
        """Stop it if it still runs; its exit status, negative for a signal."""
        self.pipe.close()
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status


def _start(pieces: Sequence[Callable[[], Any]]) -> _Child:
    receiving, sending = Pipe(duplex=False)
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings(), _no_remark_on_forking():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads exist, and wait
        pid = os.fork()
    if pid == 0:
        receiving.close()
        _work(pieces, sending, parent)
    sending.close()
    return _Child(pid, receiving)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """A Ctrl-C within counts at the end. In the middle of a fork it would be raised in one of the functions that
    Python calls after it, where exceptions are printed and forgotten."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[tuple[int, Any]] = []
    before = signal.signal(signal.SIGINT, lambda *interrupt: held.append(interrupt))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held and callable(before):
        before(*held[0])


@contextlib.contextmanager
def _no_remark_on_forking() -> Iterator[None]:
    """The tokenizers library otherwise prints a warning in every child, none of which tokenizes."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = before or "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def _work(pieces: Sequence[Callable[[], Any]], pipe: Connection, parent: int) -> NoReturn:
    """What a child does: its pieces, one answer, and an end without any of the parent's cleaning up."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its children
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            allocator.return_at_once(4 << 20)  # it needs little, and not for long: fewer new pages
            _setting["workers"] = 1
            torch.set_grad_enabled(False)
            answer: Any
            try:
                with _alone():
                    answer = [piece() for piece in pieces]
            except Exception as error:  # the parent raises it
                answer = error
            pipe.send_bytes(pickle.dumps(answer, protocol=5))  # by value: what torch shares would end with the child
            status = 0
    finally:
        os._exit(status)


def _answers(children: Sequence[_Child]) -> list[Any]:
    """Each child's list of results, or its exception, as they come. Raises WorkerError as soon as one has died."""
    answers: dict[int, Any] = {}
    waiting: dict[Any, int] = {child.pipe: k for k, child in enumerate(children)}
    while waiting:
        for pipe in wait(list(waiting)):
            k = waiting.pop(pipe)
            try:
                answers[k] = pickle.loads(children[k].pipe.recv_bytes())
            except (EOFError, OSError) as error:
                raise WorkerError(_ending(k, len(children), children[k])) from error
    return [answers[k] for k in range(len(children))]


def _ending(k: int, count: int, child: _Child) -> str:
    status = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
    child.status = status
    how = f"ended with status {status}" if status >= 0 else f"was killed by {signal.Signals(-status).name}"
    hint = ", most likely for want of memory" if status == -signal.SIGKILL else ""
    return (
        f"worker process {k + 1} of {count} {how}{hint}. What is finished is kept: repeat the command with --resume, "
        "with fewer --workers if memory is short (the result is the same)."
    )
