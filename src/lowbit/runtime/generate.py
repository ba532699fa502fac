"""The loop of one sequence: ask for logits, choose, say what was chosen; with a guess, several tokens a call.

Many sequences at once are the scheduler's work (scheduler.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor

from lowbit.errors import InputError
from lowbit.runtime.answer import Answer, Output
from lowbit.runtime.sampling import SamplingParams
from lowbit.runtime.speculation import PromptLookup

MAX_LOOKUP = 64


class Model(Protocol):
    """What the loop needs of an engine."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def context_length(self) -> int: ...

    def reserve(self, tokens: int) -> None: ...

    def next_logits(self, tokens: list[int], rows: int, logits: bool) -> tuple[Tensor | None, list[int]]: ...


def check_tokens(prompt: Sequence[int], vocab_size: int) -> None:
    """Raises InputError for a prompt that is empty or has unknown tokens."""
    if not prompt:
        raise InputError("the prompt is empty: give at least one token.")
    unknown = next((t for t in prompt if not 0 <= t < vocab_size), None)
    if unknown is not None:
        raise InputError(f"the prompt has token {unknown}, but the model knows 0 to {vocab_size - 1}.")


def check_prompt(prompt: Sequence[int], vocab_size: int, limit: int, params: SamplingParams, what: str) -> int:
    """How many tokens the answer may have. Raises InputError for a prompt that cannot be answered within `limit`
    tokens, which is the size of `what`."""
    check_tokens(prompt, vocab_size)
    room = limit - len(prompt)
    if room < 1:
        raise InputError(
            f"the prompt has {len(prompt)} tokens and leaves no room for an answer in {what} of {limit}: shorten it."
        )
    if params.max_new_tokens is not None and params.max_new_tokens > room:
        raise InputError(
            f"{len(prompt)} prompt tokens and {params.max_new_tokens} new ones exceed {what} of {limit}: shorten the "
            f"prompt or ask for at most {room}."
        )
    return params.max_new_tokens or room


def generate(
    model: Model,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    end: Sequence[int],
    tokenizer: Any,
    prompt_lookup: int = 0,
) -> Iterator[Output]:
    """The answer to `prompt` (tokens), token by token; `prompt_lookup` guesses up to so many tokens ahead.

    Raises InputError, before anything is computed, for a prompt that cannot be answered.
    """
    if not 0 <= prompt_lookup <= MAX_LOOKUP:
        raise InputError(f"prompt_lookup is {prompt_lookup!r}; expected 0 (off) to {MAX_LOOKUP} tokens.")
    limit = check_prompt(prompt, model.vocab_size, model.context_length, params, "the model's context")
    model.reserve(len(prompt) + limit)
    return _loop(model, Answer(prompt, params, limit, end, tokenizer), prompt_lookup)


def _loop(model: Model, answer: Answer, prompt_lookup: int) -> Iterator[Output]:
    lookup = PromptLookup(answer.tokens) if prompt_lookup else None
    while True:
        guess = lookup.propose(min(prompt_lookup, answer.limit - answer.generated - 1)) if lookup else []
        logits, best = model.next_logits(answer.tokens + guess, 1 + len(guess), answer.params.needs_logits)
        for row, expected in enumerate([*guess, None]):
            output = answer.choose(None if logits is None else logits[row], best[row])
            yield output
            if output.finish:
                return
            if lookup:
                lookup.append(output.token)
            if output.token != expected:
                break
