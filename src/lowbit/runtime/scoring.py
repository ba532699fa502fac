"""What a model expected of a text: log-probabilities of a prompt's own tokens."""

from collections.abc import Iterator, Sequence

import torch

from lowbit.errors import InputError
from lowbit.runtime.base import Engine
from lowbit.runtime.sampling import Choice

MOST_TOP = 4096  # likeliest tokens beside each
_ROWS = 256  # at once: a row has a number for each token of the vocabulary


def score(engine: Engine, tokens: Sequence[int], top: int) -> Iterator[list[Choice]]:
    """Each token but the first as if it had been chosen after those before it, with the `top` likeliest in its place;
    some at a time. Nothing else may run on the engine's own cache meanwhile; what does makes it slower, not wrong.

    Raises InputError for a text that is empty or too long, or has unknown tokens.
    """
    tokens = list(tokens)
    if not tokens:
        raise InputError("the prompt is empty: give at least one token.")
    unknown = next((t for t in tokens if not 0 <= t < engine.vocab_size), None)
    if unknown is not None:
        raise InputError(f"the prompt has token {unknown}, but the model knows 0 to {engine.vocab_size - 1}.")
    if len(tokens) > engine.context_length:
        raise InputError(f"the prompt has {len(tokens)} tokens, the model's context {engine.context_length}.")
    if len(tokens) > 1:
        engine.reserve(len(tokens))
    for start in range(0, len(tokens) - 1, _ROWS):
        end = min(start + _ROWS, len(tokens) - 1)
        logits, _ = engine.next_logits(tokens[:end], end - start, True)
        assert logits is not None
        logs = logits.log_softmax(-1)
        came = torch.tensor(tokens[start + 1 : end + 1])
        likely = logs.topk(min(top, logs.shape[1]))
        rows = zip(
            came.tolist(),
            logs.gather(1, came[:, None])[:, 0].tolist(),
            likely.indices.tolist(),
            likely.values.tolist(),
            strict=True,
        )
        yield [Choice(token, log, tuple(zip(*pairs, strict=True))) for token, log, *pairs in rows]
