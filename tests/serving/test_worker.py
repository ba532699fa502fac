"""Engines that compute one sequence at a time answer in the order of the requests; a failure is heard of by all."""

import queue
import threading
import time
from pathlib import Path

import pytest

from lowbit.errors import InputError, LowbitError
from lowbit.runtime.engine import load
from lowbit.runtime.sampling import SamplingParams
from lowbit.runtime.scheduler import Event
from lowbit.serving.worker import OneByOne, Reply, Worker

GREEDY = SamplingParams(max_new_tokens=6)


def test_one_by_one(tiny: Path) -> None:
    engine = load(str(tiny), "float32")
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    expected = {i: [o.token for o in engine.outputs(p, GREEDY)] for i, p in enumerate(prompts)}
    steps = OneByOne(engine)
    assert [steps.submit(p, GREEDY) for p in prompts] == [0, 1, 2]
    said: dict[int, list[int]] = {}
    order = []
    while steps.busy:
        for event in steps.step():
            assert event.output is not None
            said.setdefault(event.request, []).append(event.output.token)
            order.append(event.request)
    assert said == expected
    assert order == sorted(order)


def test_cancelling(tiny: Path) -> None:
    steps = OneByOne(load(str(tiny), "float32"))
    first, second, third = (steps.submit([5, 6], GREEDY) for _ in range(3))
    steps.step()
    assert steps.cancel(first)
    assert steps.cancel(second)
    assert not steps.cancel(first)
    while steps.busy:
        assert {e.request for e in steps.step()} == {third}


def test_what_can_never_be_answered_is_refused_at_once(tiny: Path) -> None:
    steps = OneByOne(load(str(tiny), "float32"))
    for prompt in ([], [10**6], [5] * 300):
        with pytest.raises(InputError):
            steps.submit(prompt, GREEDY)
    assert not steps.busy


def test_everybody_hears_of_a_failure(tiny: Path) -> None:
    """Whoever asked before it, whoever asked while it happened, and not whoever asks later: they are refused."""
    worker = Worker(load(str(tiny), "float32"))
    failing, replies = threading.Event(), queue.Queue[Reply]()

    def step() -> list[Event]:
        failing.set()
        time.sleep(0.2)
        raise ZeroDivisionError("on fire")

    worker.steps.step = step  # type: ignore[method-assign]
    worker.ask([5, 6], GREEDY, replies.put)
    assert failing.wait(10)
    worker.ask([7, 8], GREEDY, replies.put)
    assert [replies.get(timeout=10).error for _ in range(2)] == ["ZeroDivisionError: on fire"] * 2
    with pytest.raises(LowbitError, match="out of service: ZeroDivisionError: on fire"):
        worker.ask([9], GREEDY, replies.put)
    worker.stop()
