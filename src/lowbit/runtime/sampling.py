"""From logits to the next token: greedy, or a draw from a cut and reshaped distribution.

A model gives a logit for every token, p = softmax(logits). Drawing from p itself now and then picks a token from its
long unreliable tail, after which the text derails; always taking the most likely token is dull and loops. The remedies,
in the order in which transformers applies them:

    repetition_penalty r   logit -> logit / r if positive, logit * r if not, for tokens seen (Keskar et al. 2019, 4.1)
    presence_penalty a,    logit - a * [token is in the answer] - b * (times it is in the answer so far)
    frequency_penalty b    (as OpenAI's API defines them: the prompt does not count)
    temperature T          logits / T; T = 0 is greedy: the largest logit, the first of equals
    top_k                  only tokens with a logit not below the k-th largest
    top_p                  the smallest set of most likely tokens with p >= top_p together (Holtzman et al. 2020, 3.1)
    min_p                  only tokens with p >= min_p times the largest p (Nguyen et al. 2024, 3)

What is left is renormalized and drawn by inverting its distribution function with one uniform number per token. The
random numbers belong to the request and not to the batch, so the same seed gives the same text whatever runs beside it.

Log-probabilities are those of the model, before anything above is applied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import InputError, LowbitError, nearest

MAX_LOGPROBS = 100


@dataclass(frozen=True)
class SamplingParams:
    """How an answer is chosen and when it ends. The defaults are greedy. Raises InputError for values out of range.

    Args:
        temperature: 0 is greedy.
        top_k: 0 keeps all. top_p: 1 keeps all. min_p: 0 keeps all.
        repetition_penalty: 1 changes nothing; counts the prompt's tokens as seen.
        presence_penalty: -2 to 2; taken from the logit of every token that the answer has already.
        frequency_penalty: -2 to 2; the same, once for every time the answer has it.
        seed: of the draws; None takes a fresh one.
        max_new_tokens: None goes on to the end of the context.
        stop: the answer ends before the first of these strings.
        stop_token_ids: the answer ends at these tokens, beside the model's own end-of-text tokens.
        ignore_eos: go on past the model's own end-of-text tokens.
        logprobs: None for none; n for the chosen token's log-probability and those of the n most likely.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_new_tokens: int | None = 64
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check("temperature", _real(self.temperature) and 0 <= self.temperature < math.inf, "a number from 0 up")
        self._check("top_k", _whole(self.top_k) and self.top_k >= 0, "a whole number from 0 (all tokens) up")
        self._check("top_p", _real(self.top_p) and 0 < self.top_p <= 1, "a share above 0 and up to 1")
        self._check("min_p", _real(self.min_p) and 0 <= self.min_p <= 1, "a share from 0 to 1")
        penalty = self.repetition_penalty
        self._check("repetition_penalty", _real(penalty) and 0 < penalty < math.inf, "a number above 0 (1: none)")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            self._check(name, _real(value) and -2 <= value <= 2, "a number from -2 to 2 (0: none)")
        self._check("seed", self.seed is None or (_whole(self.seed) and self.seed >= 0), "a whole number from 0 up")
        limit = self.max_new_tokens
        self._check("max_new_tokens", limit is None or (_whole(limit) and limit >= 1), "a whole number from 1 up")
        self._check("stop", all(isinstance(s, str) and s for s in self.stop), "strings that are not empty")
        self._check("stop_token_ids", all(_whole(t) and t >= 0 for t in self.stop_token_ids), "token ids")
        n = self.logprobs
        self._check("logprobs", n is None or (_whole(n) and 0 <= n <= MAX_LOGPROBS), f"0 to {MAX_LOGPROBS}")

    def _check(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise InputError(f"{name} is {getattr(self, name)!r}; expected {expected}.")

    @property
    def needs_logits(self) -> bool:
        """Whether the most likely token alone is not enough to choose."""
        return self.temperature > 0 or self.penalizes or self.logprobs is not None

    @property
    def penalizes(self) -> bool:
        """Whether tokens that were there before count."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def sampling_params(params: SamplingParams | None, options: dict[str, Any]) -> SamplingParams:
    """`params`, or the defaults, with `options` put in. Raises InputError for an option that there is not."""
    known = [f.name for f in fields(SamplingParams)]
    for name in options:
        if name not in known:
            raise InputError(f"unknown sampling option {name!r}. {nearest(name, known)}")
    return replace(params or SamplingParams(), **options)


@dataclass(frozen=True)
class Choice:
    """A chosen token; with `logprobs`, its log-probability (nats) and the most likely tokens with theirs."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def fresh_seed() -> int:
    """A seed from the operating system, for one who wants to know which."""
    return int(np.random.SeedSequence().generate_state(1)[0])


def new_rng(seed: int | None) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def sample(
    logits: Tensor, history: Sequence[int], params: SamplingParams, rng: np.random.Generator, prompt_length: int = 0
) -> Choice:
    """The next token from a row of logits (vocabulary,), after `history`: `prompt_length` tokens of prompt, then the
    answer so far.

    Raises LowbitError if the logits have NaN: nothing can be chosen from them.
    """
    row = logits.float()
    if bool(torch.isnan(row).any()):
        raise LowbitError("the model's logits are not numbers (NaN): its weights are damaged or overflow.")
    scores = penalize(row, history, params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        scores = penalize_counts(scores, history[prompt_length:], params.presence_penalty, params.frequency_penalty)
    if params.temperature == 0:
        token = int(scores.argmax())
    else:
        tokens, probabilities = distribution(scores, params)
        token = int(tokens[draw(probabilities, rng)])
    if params.logprobs is None:
        return Choice(token)
    return with_log_probabilities(row[None], [token], params.logprobs)[0]


def penalize(row: Tensor, history: Sequence[int], penalty: float) -> Tensor:
    """Logits with those of the tokens in `history` made less likely (more, for a penalty below 1), each once."""
    if penalty == 1 or not history:
        return row
    seen = torch.tensor(sorted(set(history)), dtype=torch.long)
    value = row[seen]
    return row.index_copy(0, seen, torch.where(value < 0, value * penalty, value / penalty))


def penalize_counts(row: Tensor, answer: Sequence[int], presence: float, frequency: float) -> Tensor:
    """Logits less `presence` for each token in `answer`, and `frequency` for each time it is there."""
    if not answer:
        return row
    seen, times = torch.tensor(answer, dtype=torch.long).unique(return_counts=True)
    return row.index_add(0, seen, -(presence + frequency * times.to(row.dtype)))


def distribution(scores: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The tokens that survive temperature, top_k, top_p and min_p, and their probabilities, float64, sum 1."""
    scaled = (scores - scores.max()) / params.temperature  # the largest is 0: no temperature overflows
    tokens = torch.arange(len(scaled))
    if 0 < params.top_k < len(scaled):
        tokens = (scaled >= scaled.topk(params.top_k).values[-1]).nonzero()[:, 0]
    if params.top_p < 1:
        tokens = tokens[_nucleus(scaled[tokens].softmax(0), params.top_p)]
    if params.min_p > 0:
        p = scaled[tokens].softmax(0)
        tokens = tokens[p >= params.min_p * p.max()]
    return tokens, scaled[tokens].double().softmax(0)


def _nucleus(p: Tensor, top_p: float) -> Tensor:
    """Mask of the tokens that are not in the tail: the least likely ones with at most 1 - top_p together.

    Tokens below (1 - top_p) / len(p) each are in the tail without any sorting: that spares sorting the vocabulary.
    """
    kept = p > (1 - top_p) / len(p)
    kept[p.argmax()] = True
    tail, index = p[~kept].sum(), kept.nonzero()[:, 0]
    ordered, order = p[index].sort()
    gone = (tail + ordered.cumsum(0)) <= 1 - top_p
    gone[-1] = False
    kept[index[order[gone]]] = False
    return kept


def draw(probabilities: Tensor, rng: np.random.Generator) -> int:
    """An index, each with its probability, from one uniform number."""
    edges = probabilities.numpy().cumsum()
    found = int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))
    return min(found, len(edges) - 1)


def with_log_probabilities(logits: Tensor, tokens: Sequence[int], n: int) -> list[Choice]:
    """Each row's (rows, vocabulary) chosen token with its log softmax, in nats, and those of the n likeliest tokens."""
    logs = logits.log_softmax(-1)
    own = logs.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    top = logs.topk(min(n, logs.shape[1]))
    rows = zip(tokens, own.tolist(), top.indices.tolist(), top.values.tolist(), strict=True)
    return [Choice(token, log, tuple(zip(*pairs, strict=True))) for token, log, *pairs in rows]
