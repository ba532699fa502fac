"""Engines that compute one sequence at a time answer as the others do, in the order of the requests."""

from pathlib import Path

import pytest

from lowbit.errors import InputError
from lowbit.runtime.engine import load
from lowbit.runtime.sampling import SamplingParams
from lowbit.serving.worker import OneByOne

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
