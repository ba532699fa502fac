"""Answers in OpenAI's words: documents, and the events of a stream."""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowbit.runtime.answer import Output
from lowbit.runtime.sampling import Choice
from lowbit.serving.requests import ChatRequest, Request, TextRequest


@dataclass
class Answering:
    """The answer to one prompt of a request, whole or in pieces."""

    asked: Request
    model: str
    prompt: Sequence[int]
    tokenizer: Any
    end: Sequence[int]
    index: int = 0

    def __post_init__(self) -> None:
        self.chat = isinstance(self.asked, ChatRequest)
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._text = ""
        self._tokens: list[int] = []
        self._cached = 0
        self._finish: str | None = None
        self._logprobs: list[dict[str, Any]] = []  # of the answer's tokens
        self._new: list[dict[str, Any]] = []  # of those, the latest token's
        self._scores: list[Choice] = []

    def expected(self, scores: list[Choice]) -> None:
        """What the model thought of the prompt's tokens after the first."""
        self._scores = scores

    def add(self, output: Output, cached: int) -> None:
        self._text += output.text
        self._tokens.append(output.token)
        self._cached = cached
        self._finish = output.finish
        ends = output.finish == "stop" and output.token in self.end
        self._new = [] if output.logprob is None or ends else [self._logprob(output, None)]
        self._logprobs += self._new

    def _logprob(self, output: Output | Choice, most: int | None) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self.tokenizer.decode([token])
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        assert output.logprob is not None
        return entry(output.token, output.logprob) | {"top_logprobs": [entry(*top) for top in output.top[:most]]}

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": len(self.prompt),
            "completion_tokens": len(self._tokens),
            "total_tokens": len(self.prompt) + len(self._tokens),
            "prompt_tokens_details": {"cached_tokens": self._cached},
        }

    def choice(self) -> dict[str, Any]:
        """All of it."""
        content: dict[str, Any] = {"text": self._text}
        logprobs, more = self._logprobs, {}
        if isinstance(self.asked, TextRequest):
            if self.asked.echo:
                content["text"] = self.tokenizer.decode(self.prompt, skip_special_tokens=True) + self._text
                logprobs = self._echoed(self.asked.logprobs) + logprobs
            if self.asked.prompt_logprobs is not None:
                scores = (_by_token(s, self.asked.prompt_logprobs) for s in self._scores)
                more["prompt_logprobs"] = [None, *scores]
        else:
            content = {"message": {"role": "assistant", "content": self._text}}
        return self._choice(content, self._said(logprobs), self._tokens) | more

    def _echoed(self, top: int | None) -> list[dict[str, Any]]:
        """The prompt's own log-probabilities; before its first token nothing was expected."""
        if top is None:
            return []
        first = {"token": self.tokenizer.decode(self.prompt[:1]), "logprob": None, "top_logprobs": None}
        return [first, *(self._logprob(score, top) for score in self._scores)]

    def document(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._document("", choices)

    def first_piece(self) -> dict[str, Any] | None:
        """What a chat begins with."""
        choice = self._choice({"delta": {"role": "assistant", "content": ""}}, None, [])
        return self._document(".chunk", [choice]) if self.chat else None

    def piece(self, output: Output) -> dict[str, Any] | None:
        """What is new with an output, if anything."""
        if not output.text and not output.finish and output.logprob is None and not self.asked.return_token_ids:
            return None
        content: dict[str, Any] = {"text": output.text}
        if self.chat:
            content = {"delta": {"content": output.text} if output.text else {}}
        return self._document(".chunk", [self._choice(content, self._said(self._new), [output.token])])

    def usage_piece(self) -> dict[str, Any]:
        return self._document(".chunk", []) | {"usage": self.usage()}

    def _said(self, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
        if not entries:
            return None
        if self.chat:
            return {"content": entries}
        return {
            "tokens": [e["token"] for e in entries],
            "token_logprobs": [e["logprob"] for e in entries],
            "top_logprobs": [_by_text(e["top_logprobs"]) for e in entries],
        }

    def _choice(
        self, content: dict[str, Any], logprobs: dict[str, Any] | None, tokens: Sequence[int]
    ) -> dict[str, Any]:
        numbers = {"token_ids": list(tokens)} if self.asked.return_token_ids else {}
        return {"index": self.index, **content, "logprobs": logprobs, "finish_reason": self._finish, **numbers}

    def _document(self, piece: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = f"chat.completion{piece}" if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def _by_text(entries: list[dict[str, Any]] | None) -> dict[str, float] | None:
    """The likeliest token of those that are the same text, as parts of a character are."""
    return None if entries is None else {e["token"]: e["logprob"] for e in reversed(entries)}


def _by_token(score: Choice, top: int) -> dict[str, dict[str, float]]:
    """vLLM's form: by token id, the token that came among them."""
    pairs = dict(score.top[:top])
    assert score.logprob is not None
    pairs.setdefault(score.token, score.logprob)
    return {str(token): {"logprob": logprob} for token, logprob in pairs.items()}


def total(usages: list[dict[str, Any]]) -> dict[str, Any]:
    """The usage of several answers in one request."""
    added = {name: sum(u[name] for u in usages) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    cached = sum(u["prompt_tokens_details"]["cached_tokens"] for u in usages)
    return added | {"prompt_tokens_details": {"cached_tokens": cached}}


def event(document: dict[str, Any] | str) -> bytes:
    """One server-sent event."""
    text = document if isinstance(document, str) else json.dumps(document, allow_nan=False)
    return f"data: {text}\n\n".encode()
