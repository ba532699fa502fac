"""What a model expected of a text: log-probabilities of a prompt's own tokens."""

from collections.abc import Iterator, Sequence

from lowbit.errors import InputError
from lowbit.runtime.base import Engine
from lowbit.runtime.generate import check_tokens
from lowbit.runtime.sampling import Choice, with_log_probabilities

MOST_TOP = 4096  # likeliest tokens beside each
_ROWS = 256  # at once: a row has a number for each token of the vocabulary


def score(engine: Engine, tokens: Sequence[int], top: int) -> Iterator[list[Choice]]:
    """Each token but the first as if it had been chosen after those before it, with the `top` likeliest in its place;
    some at a time. Nothing else may run on the engine's own cache meanwhile; what does makes it slower, not wrong.

    Raises InputError for a text that is empty or too long, or has unknown tokens.
    """
    tokens = list(tokens)
    check_tokens(tokens, engine.vocab_size)
    if len(tokens) > engine.context_length:
        raise InputError(f"the prompt has {len(tokens)} tokens, the model's context {engine.context_length}.")
    if len(tokens) > 1:
        engine.reserve(len(tokens))
    for start in range(0, len(tokens) - 1, _ROWS):
        end = min(start + _ROWS, len(tokens) - 1)
        logits, _ = engine.next_logits(tokens[:end], end - start, True)
        assert logits is not None
        yield with_log_probabilities(logits, tokens[start + 1 : end + 1], top)
