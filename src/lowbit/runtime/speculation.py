"""Guess the next tokens from the text itself, check them in one call: fewer calls, the same answer.

Decoding reads all weights for one token; reading them for k tokens at once costs little more. Answers often repeat
stretches of the prompt (code, quotations, summaries), so what followed the last few tokens when they stood there
before is a cheap guess (Saxena 2023, "Prompt Lookup Decoding"; Yang et al. 2023, "Inference with Reference"). The guess
d1 .. dk is run together with the last token, which gives the logits after each; then tokens are chosen one by one
exactly as without a guess, and the rest of the guess is thrown away at the first token that differs:

    accepted = longest prefix with chosen_i = d_i,    tokens per call = accepted + 1

Nothing is approximate: each token is chosen from the logits after the tokens before it, with the same random numbers.
That holds bit for bit where logits do not depend on how many tokens a call brings: the native decoder with a float
cache. (An int8 cache decodes single tokens by another path, with another rounding; transformers' kernels round
differently for different shapes. There a near-tie between two tokens may fall the other way.)
"""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST, _SHORTEST = 4, 2  # tokens that must have occurred before


class PromptLookup:
    """Where each n-gram of the tokens so far occurred last."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> position of the token that followed it
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        end = len(self._tokens)
        for n in range(_SHORTEST, _LONGEST + 1):
            if end >= n:
                self._after[tuple(self._tokens[end - n :])] = end
        self._tokens.append(token)

    def propose(self, k: int) -> list[int]:
        """At most k tokens that followed the longest known n-gram at the end; none if there is none."""
        if k < 1:
            return []
        for n in range(min(_LONGEST, len(self._tokens)), _SHORTEST - 1, -1):
            at = self._after.get(tuple(self._tokens[-n:]))
            if at is not None:
                return self._continue(at, k)
        return []

    def _continue(self, at: int, k: int) -> list[int]:
        """k tokens from position `at` on; past the end, the guess goes on from its own beginning."""
        found = self._tokens[at : at + k]
        while len(found) < k:
            found += found[: k - len(found)]
        return found
