"""Whatever is batched, cached, pushed out or cancelled beside it, a request gets the answer it would get alone."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
from lowbit.errors import InputError
from lowbit.kernels.pack import native
from lowbit.pipeline import quantize
from lowbit.runtime.answer import Output
from lowbit.runtime.base import Engine
from lowbit.runtime.sampling import SamplingParams
from lowbit.runtime.scheduler import Event, Scheduler

pytestmark = pytest.mark.skipif(native is None, reason="the compiled kernels were not built")
KINDS = [
    SamplingParams(max_new_tokens=20, ignore_eos=True),
    SamplingParams(max_new_tokens=15, temperature=1.0, seed=1, top_p=0.9, logprobs=3),
    SamplingParams(max_new_tokens=25, temperature=0.7, seed=2, repetition_penalty=1.2, ignore_eos=True),
    SamplingParams(max_new_tokens=12, logprobs=0, stop=("e",)),
]


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Engine:
    return lowbit.load(tiny)


def requests(n: int, seed: int = 0, longest: int = 120) -> list[tuple[list[int], SamplingParams]]:
    rng = random.Random(seed)
    shared = [rng.randrange(3, 4096) for _ in range(70)]
    made = []
    for i in range(n):
        own = [rng.randrange(3, 4096) for _ in range(rng.randrange(1, longest - 70))]
        prompt = shared[: rng.randrange(71)] + own
        made.append((prompt, KINDS[i % len(KINDS)]))
    return made


def alone(engine: Engine, prompt: list[int], params: SamplingParams) -> list[Output]:
    return list(engine.outputs(prompt, params))


def drain(scheduler: Scheduler, limit: int = 10_000) -> dict[int, list[Output]]:
    answers: dict[int, list[Output]] = {}
    for _ in range(limit):
        if not scheduler.busy:
            return answers
        collect(answers, scheduler.step())
    raise AssertionError("the scheduler does not come to an end")


def collect(answers: dict[int, list[Output]], events: list[Event]) -> None:
    for event in events:
        assert event.output is not None, event.error
        answers.setdefault(event.request, []).append(event.output)


@pytest.mark.parametrize("options", [{}, {"step_tokens": 7}, {"max_running": 2, "reuse": False}], ids=str)
def test_random_arrivals_answer_as_one_by_one(engine: Engine, options: dict[str, Any]) -> None:
    """Tokens, texts, ends and log-probabilities, bit for bit."""
    todo, rng = requests(12), random.Random(3)
    expected = [alone(engine, p, s) for p, s in todo]
    scheduler = Scheduler(engine, cache_tokens=2048, **options)
    answers: dict[int, list[Output]] = {}
    numbers = []
    for prompt, params in todo:
        numbers.append(scheduler.submit(prompt, params))
        for _ in range(rng.randrange(4)):
            collect(answers, scheduler.step())
    for number, outputs in drain(scheduler).items():
        answers.setdefault(number, []).extend(outputs)
    assert [answers[n] for n in numbers] == expected
    assert {o[-1].finish for o in expected} == {"length", "stop"}  # both ends are met
    assert scheduler.stats.blocks_used == 0
    assert scheduler.stats.generated_tokens == sum(map(len, expected))


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w3a16-g64-asym", "w2a16-channel", "w8a8"])
def test_quantized_kernels_are_batch_invariant_too(scheme: str, tiny: Path, tmp_path: Path) -> None:
    quantize(tiny, tmp_path / "q", scheme=scheme, method="rtn")
    engine = lowbit.load(tmp_path / "q")
    todo = requests(10, seed=2)
    scheduler = Scheduler(engine, cache_tokens=16 * 32, step_tokens=100)
    numbers = [scheduler.submit(p, s) for p, s in todo]
    answers = drain(scheduler)
    for number, (prompt, params) in zip(numbers, todo, strict=True):
        plain = alone(engine, prompt, params)
        assert answers[number] == plain
        assert list(engine.outputs(prompt, params, prompt_lookup=5)) == plain


@pytest.mark.model
def test_the_demo_model_answers_many_as_one() -> None:
    demo = lowbit.load("demo")
    texts = ["import os\n", "def add(a, b):\n", "class Stack:\n", "import os\n\ndef path(", '"""A module'] * 3
    kinds = [replace(KINDS[i % 4], seed=i, max_new_tokens=30 + 2 * i) for i in range(len(texts))]
    scheduler = Scheduler(demo, cache_tokens=1024)
    numbers = [scheduler.submit(t, k) for t, k in zip(texts, kinds, strict=True)]
    answers = drain(scheduler)
    for number, text, params in zip(numbers, texts, kinds, strict=True):
        assert answers[number] == list(demo.outputs(text, params))
        assert "".join(o.text for o in answers[number]) == demo.generate(text, params)
    assert scheduler.stats.steps < sum(map(len, answers.values())) / 5


def test_a_step_mixes_answers_and_pieces_of_prompts(engine: Engine) -> None:
    scheduler = Scheduler(engine, cache_tokens=1024, step_tokens=16)
    scheduler.submit([5] * 4, KINDS[0])
    assert len(scheduler.step()) == 1
    scheduler.submit([7] * 45, KINDS[0])
    seen = [[e.request for e in scheduler.step()] for _ in range(4)]
    assert seen == [[0], [0], [0, 1], [0, 1]]  # 15 prompt tokens a step beside the running answer


def test_a_cached_prefix_changes_nothing_but_the_work(engine: Engine) -> None:
    (prompt, _), params = requests(1, seed=5)[0], KINDS[1]
    prompt = [9] * 64 + prompt
    scheduler = Scheduler(engine, cache_tokens=1024)
    answers, cached = [], []
    for _ in range(3):
        scheduler.submit(prompt, params)
        first = next(events for _ in range(9) if (events := scheduler.step()))
        cached.append(first[0].cached_tokens)
        answers.append([first[0].output, *next(iter(drain(scheduler).values()))])
    assert cached == [0] + [(len(prompt) - 1) // 32 * 32] * 2
    assert answers[0] == answers[1] == answers[2] == alone(engine, prompt, params)
    stats = scheduler.stats
    assert stats.prefix_hit_tokens == 2 * ((len(prompt) - 1) // 32 * 32)
    assert stats.prompt_tokens == 3 * len(prompt) - stats.prefix_hit_tokens


def test_an_answer_is_a_cached_prefix_of_the_next_turn(engine: Engine) -> None:
    scheduler = Scheduler(engine, cache_tokens=1024)
    scheduler.submit([9] * 40, KINDS[0])
    first = [o.token for o in next(iter(drain(scheduler).values()))]
    turn = [9] * 40 + first + [11] * 5
    scheduler.submit(turn, KINDS[0])
    assert next(iter(drain(scheduler).values())) == alone(engine, turn, KINDS[0])
    assert scheduler.stats.prefix_hit_tokens == 32


@pytest.mark.parametrize("reuse", [True, False])
def test_a_cache_too_small_for_all_pushes_out_and_comes_back(engine: Engine, reuse: bool) -> None:
    """Six sequences that grow beyond a cache of seven blocks: some start again, all answer as alone."""
    todo = [
        ([i + 3] * 60, replace(s, max_new_tokens=60, stop=(), ignore_eos=True)) for i, s in enumerate(KINDS[:3] * 2)
    ]
    expected = [alone(engine, p, s) for p, s in todo]
    scheduler = Scheduler(engine, cache_tokens=7 * 32, reuse=reuse)
    numbers = [scheduler.submit(p, s) for p, s in todo]
    answers = drain(scheduler)
    assert [answers[n] for n in numbers] == expected
    assert scheduler.stats.preemptions > 0
    assert scheduler.stats.blocks_used == 0


def test_eviction_pressure_never_serves_a_wrong_prefix(engine: Engine) -> None:
    todo = requests(30, seed=8)
    scheduler = Scheduler(engine, cache_tokens=10 * 32, step_tokens=64)
    numbers = [scheduler.submit(p, s) for p, s in todo]
    answers = drain(scheduler)
    assert [answers[n] for n in numbers] == [alone(engine, p, s) for p, s in todo]
    assert scheduler.stats.prefix_hit_tokens > 0


def test_cancelled_requests_free_their_blocks_and_disturb_nobody(engine: Engine) -> None:
    todo = requests(8, seed=4)
    scheduler = Scheduler(engine, cache_tokens=1024, max_running=3)
    numbers = [scheduler.submit(p, s) for p, s in todo]
    answers: dict[int, list[Output]] = {}
    for _ in range(4):
        collect(answers, scheduler.step())
    running, waiting = numbers[0], numbers[-1]
    assert scheduler.cancel(running)
    assert scheduler.cancel(waiting)
    assert not scheduler.cancel(running)
    assert not scheduler.cancel(99)
    gone = len(answers[running])
    for number, outputs in drain(scheduler).items():
        answers.setdefault(number, []).extend(outputs)
    assert len(answers[running]) == gone
    assert waiting not in answers
    for n, (p, s) in zip(numbers[1:-1], todo[1:-1], strict=True):
        assert answers[n] == alone(engine, p, s)
    assert scheduler.stats.blocks_used == 0


@pytest.mark.parametrize(
    ("prompt", "params", "says"),
    [
        ([], {}, "prompt is empty"),
        ("", {}, "prompt is empty"),
        ([5000], {}, "token 5000, but the model knows 0 to 4095"),
        ([-1], {}, "token -1"),
        ([3] * 100, {}, "100 prompt tokens and 64 new ones exceed the scheduler's cache of 128.*at most 28"),
        ([3] * 128, {}, "leaves no room for an answer in the scheduler's cache of 128"),
    ],
)
def test_what_can_never_be_answered_is_refused(engine: Engine, prompt: Any, params: Any, says: str) -> None:
    scheduler = Scheduler(engine, cache_tokens=128)
    with pytest.raises(InputError, match=says):
        scheduler.submit(prompt, SamplingParams(**params))
    assert not scheduler.busy
    assert scheduler.step() == []


def test_an_answer_may_fill_the_cache_to_its_end(engine: Engine) -> None:
    scheduler = Scheduler(engine, cache_tokens=128)
    params = SamplingParams(max_new_tokens=None, ignore_eos=True)
    scheduler.submit([3] * 100, params)
    (outputs,) = drain(scheduler).values()
    assert len(outputs) == 28
    assert outputs[-1].finish == "length"


def test_broken_logits_end_one_request_only(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(engine, cache_tokens=1024)
    forward = scheduler._decoder.forward

    def poisoned(*args: Any, **words: Any) -> tuple[torch.Tensor | None, torch.Tensor]:
        logits, best = forward(*args, **words)
        if logits is not None:
            logits[0] = float("nan")
        return logits, best

    monkeypatch.setattr(scheduler._decoder, "forward", poisoned)
    bad, good = scheduler.submit([3] * 5, KINDS[1]), scheduler.submit([4] * 5, KINDS[0])
    events = scheduler.step()
    assert [(e.request, "NaN" in (e.error or "")) for e in events] == [(bad, True), (good, False)]
    assert drain(scheduler)[good] == alone(engine, [4] * 5, KINDS[0])[1:]


def test_the_scheduler_needs_the_native_decoder(tiny: Path, engine: Engine) -> None:
    with pytest.raises(InputError, match="needs the native decoder"):
        Scheduler(lowbit.load(tiny, "float32"))
    with pytest.raises(InputError, match="max_running is 0"):
        Scheduler(engine, max_running=0)
    with pytest.raises(InputError, match="memory does not hold a key-value cache of 1099511627776 tokens"):
        Scheduler(engine, cache_tokens=2**40)
