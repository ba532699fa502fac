"""Several prompts, one call: their answers side by side, in the order of the prompts.

On the native decoder the prompts share steps (scheduler.py), and each answer is the one its prompt would get alone;
elsewhere they are answered one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowbit.errors import InputError, LowbitError
from lowbit.runtime import conversation
from lowbit.runtime.answer import Output
from lowbit.runtime.base import Engine
from lowbit.runtime.native import NativeEngine
from lowbit.runtime.sampling import SamplingParams, sampling_params
from lowbit.runtime.scheduler import Scheduler

_MOST_CACHE_TOKENS = 16384
_BLOCK = 32  # room for a last block that is not full


@dataclass(frozen=True)
class Completion:
    """A whole answer: its text, its tokens with their log-probabilities, and why it ended ("stop" or "length")."""

    text: str
    outputs: tuple[Output, ...]
    finish: str


def generate_batch(
    engine: Engine,
    prompts: Sequence[str | Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    max_running: int = 32,
    **options: Any,
) -> list[Completion]:
    """Answer every prompt (text or tokens).

    Args:
        engine: of `lowbit.load`.
        params: for all, or one for each prompt; `options` go by SamplingParams' names and take precedence.
        max_running: the most answers that grow at the same time.

    Raises InputError, before anything is computed, if a prompt cannot be answered or `params` are not as many as the
    prompts; LowbitError if a model's logits are not numbers.
    """
    each = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else list(params)
    if len(each) != len(prompts):
        raise InputError(
            f"{len(prompts)} prompts came with {len(each)} sampling parameters: give one, or one for each."
        )
    chosen = [sampling_params(p, options) for p in each]
    tokens = [conversation.encode(engine.tokenizer, p) if isinstance(p, str) else list(p) for p in prompts]
    if isinstance(engine, NativeEngine):
        answers = _together(engine, tokens, chosen, max_running)
    else:
        loops = [engine.outputs(t, c) for t, c in zip(tokens, chosen, strict=True)]  # checked here, all of them
        answers = [list(loop) for loop in loops]
    return [Completion("".join(o.text for o in a), tuple(a), a[-1].finish or "") for a in answers]


def _together(
    engine: NativeEngine, prompts: list[list[int]], params: list[SamplingParams], max_running: int
) -> list[list[Output]]:
    lengths = [
        min(len(t) + (p.max_new_tokens or engine.context_length), engine.context_length) + _BLOCK
        for t, p in zip(prompts, params, strict=True)
    ]
    cache = max(_MOST_CACHE_TOKENS, *lengths) if sum(lengths) > _MOST_CACHE_TOKENS else max(sum(lengths), _BLOCK)
    scheduler = Scheduler(engine, cache_tokens=cache, max_running=max_running)
    numbers = [scheduler.submit(t, p) for t, p in zip(prompts, params, strict=True)]
    answers: dict[int, list[Output]] = {n: [] for n in numbers}
    while scheduler.busy:
        for event in scheduler.step():
            if event.output is None:
                raise LowbitError(f"prompt {numbers.index(event.request)}: {event.error}")
            answers[event.request].append(event.output)
    return [answers[n] for n in numbers]
