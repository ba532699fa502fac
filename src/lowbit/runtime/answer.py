"""One request's answer as it grows: which token comes next, what text that gives, and whether it is the last.

Shared by the loop for one sequence (generate.py) and by the scheduler for many, so that both give the same answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lowbit.runtime.detokenize import Detokenizer, StopText
from lowbit.runtime.sampling import Choice, SamplingParams, new_rng, sample


@dataclass(frozen=True)
class Output:
    """A new token of an answer.

    `text` is what became final with it (often nothing: half a character, or what may begin a stop string). `finish` is
    None while the answer goes on, then "stop" (end-of-text token or stop string) or "length". `logprob` and `top` are
    those of sampling.Choice.
    """

    token: int
    text: str
    finish: str | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Answer:
    """The tokens so far and what decides the next.

    Args:
        prompt: its tokens.
        limit: the most tokens to generate.
        end: the model's end-of-text tokens.
        tokenizer: None gives no text (and knows no stop strings).
    """

    def __init__(
        self, prompt: Sequence[int], params: SamplingParams, limit: int, end: Sequence[int], tokenizer: Any
    ) -> None:
        self.params, self.limit = params, limit
        self.tokens = list(prompt)  # prompt and answer
        self.prompt_length = len(self.tokens)
        self._ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(end))
        self._rng = new_rng(params.seed)
        self._words = None if tokenizer is None else Detokenizer(tokenizer, self.tokens)
        self._text = StopText(params.stop)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    def choose(self, logits: Tensor | None, best: int) -> Output:
        """The next token from its row of logits (vocabulary,), or `best`, their argmax, where that is enough."""
        if self.params.needs_logits:
            assert logits is not None
            choice = sample(logits, self.tokens, self.params, self._rng, self.prompt_length)
        else:
            choice = Choice(best)
        self.tokens.append(choice.token)
        text = ""
        if choice.token in self._ends:
            finish: str | None = "stop"
        else:
            text = self._text.push(self._words.push(choice.token)) if self._words else ""
            finish = "stop" if self._text.stopped else "length" if self.generated >= self.limit else None
        if finish and self._words:
            text += self._text.push(self._words.flush()) + self._text.flush()
        return Output(choice.token, text, finish, choice.logprob, choice.top)
