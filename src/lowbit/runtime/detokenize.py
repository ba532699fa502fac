"""Tokens to text as they come, and text that ends before a stop string.

A token is not a piece of text: one character may take several tokens (bytes of UTF-8), and the space before a word may
show only beside its neighbour. So text is decoded together with the tokens before it, and

    piece = decode(context + new) - decode(context)

is handed on only up to where more tokens cannot change it: an unfinished character at the end (decoded as U+FFFD)
waits. The context moves on with every finished piece, which keeps the work per token constant. A stop string may also
be spread over pieces; whatever may be its beginning waits too. Joined, the pieces are the decoded whole, cut before
the stop string that is complete first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"
_CONTEXT = 5  # tokens of the prompt that the first piece is decoded beside


class Detokenizer:
    """Text of an answer, token by token.

    Args:
        tokenizer: of transformers; special tokens give no text.
        prompt: the tokens before the answer: whether its first word begins with a space depends on them.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-_CONTEXT:])
        self._finished = len(self._tokens)  # so many of them have given all their text
        self._sent = self._decode()  # the text of _tokens that is already out

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def push(self, token: int) -> str:
        """The text that this token finishes; empty while a character is unfinished."""
        self._tokens.append(token)
        text = self._decode()
        piece = text.rstrip(_UNFINISHED)[len(self._sent) :]
        self._sent += piece
        if piece and not text.endswith(_UNFINISHED):
            self._tokens = self._tokens[self._finished :]
            self._finished = len(self._tokens)
            self._sent = self._decode()
        return piece

    def flush(self) -> str:
        """What is left at the end: bytes that never became a character, as U+FFFD."""
        text = self._decode()
        piece, self._sent = text[len(self._sent) :], text
        return piece


class StopText:
    """Passes text through up to the stop string that is complete first, which it keeps to itself."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that no stop string can begin in any more. After a stop string: nothing."""
        if self.stopped:
            return ""
        self._held += text
        found = [(at + len(s), at) for s in self._stops if (at := self._held.find(s)) >= 0]
        if found:
            out = self._held[: min(found)[1]]
            self.stopped, self._held = True, ""
            return out
        return self._release(len(self._held) - self._possible_start())

    def flush(self) -> str:
        """The text held back, when no more will come."""
        return self._release(len(self._held))

    def _possible_start(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = max((len(s) for s in self._stops), default=1) - 1
        for n in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-n:]) for s in self._stops):
                return n
        return 0

    def _release(self, length: int) -> str:
        out, self._held = self._held[:length], self._held[length:]
        return out
