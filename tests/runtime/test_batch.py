"""Several prompts in one call are several calls of one prompt."""

from pathlib import Path

import pytest

import lowbit
from lowbit.errors import InputError
from lowbit.runtime.engine import Runtime
from lowbit.runtime.sampling import SamplingParams

PROMPTS = [[5, 6, 7], [9] * 40, [11, 12], [5, 6, 7, 8]]


@pytest.mark.parametrize("runtime", ["auto", "float32"])
def test_answers_are_those_of_one_by_one(tiny: Path, runtime: Runtime) -> None:
    engine = lowbit.load(tiny, runtime)
    each = [SamplingParams(max_new_tokens=4 + i, temperature=i % 2, seed=i, frequency_penalty=0.5) for i in range(4)]
    answers = lowbit.generate_batch(engine, PROMPTS, each, max_running=3)
    for prompt, params, answer in zip(PROMPTS, each, answers, strict=True):
        alone = list(engine.outputs(prompt, params))
        assert list(answer.outputs) == alone
        assert answer.text == engine.generate(prompt, params)
        assert answer.finish == alone[-1].finish


def test_options_hold_for_all_and_nothing_is_an_answer_to_nothing(tiny: Path) -> None:
    engine = lowbit.load(tiny)
    answers = lowbit.generate_batch(engine, PROMPTS, max_new_tokens=3, ignore_eos=True)
    assert [len(a.outputs) for a in answers] == [3] * 4
    assert lowbit.generate_batch(engine, []) == []


def test_bad_prompts_are_named_before_anything_runs(tiny: Path) -> None:
    engine = lowbit.load(tiny)
    with pytest.raises(InputError, match="the prompt is empty"):
        lowbit.generate_batch(engine, [[5], []])
    with pytest.raises(InputError, match="4 prompts came with 1 sampling parameters"):
        lowbit.generate_batch(engine, PROMPTS, [SamplingParams()])
