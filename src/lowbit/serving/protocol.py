"""Requests and answers in OpenAI's words (platform.openai.com/docs/api-reference, 2026): chat and text completions.

What is asked for and not there is refused, not ignored; fields that nobody knows are ignored, as clients send many.
"""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from lowbit.errors import InputError
from lowbit.runtime import conversation
from lowbit.runtime.answer import Output
from lowbit.runtime.sampling import Choice, SamplingParams, fresh_seed
from lowbit.runtime.scoring import MOST_TOP

MOST_PROMPTS = 256  # a request


class ApiError(Exception):
    """An answer that is an error: HTTP status, and OpenAI's `error` object."""

    def __init__(self, status: int, message: str, *, kind: str = "invalid_request_error", param: str | None = None,
                 code: str | None = None) -> None:  # fmt: skip
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class StreamOptions(BaseModel):
    include_usage: bool = False


class Request(BaseModel):
    """What both kinds of request may say."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool = False
    return_token_ids: bool = False  # vLLM's word
    max_tokens: int | None = Field(default=None, ge=1)
    logit_bias: dict[str, float] | None = None

    def asked_for(self) -> tuple[int | None, int | None]:
        """(the most tokens, log-probabilities of so many tokens)."""
        raise NotImplementedError

    def params(self) -> SamplingParams | None:
        """None to generate nothing. Raises InputError for values out of range. The temperature is 1 where none is
        given, as OpenAI has it."""
        names = ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        most, logprobs = self.asked_for()
        if most == 0:
            return None
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            seed=fresh_seed() if self.seed is None else self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            ignore_eos=self.ignore_eos,
            max_new_tokens=most,
            logprobs=logprobs,
            **given,
        )


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    role: str
    content: str | list[TextPart]


class ChatRequest(Request):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None

    def asked_for(self) -> tuple[int | None, int | None]:
        most = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return most, (self.top_logprobs or 0) if self.logprobs else None

    def texts(self) -> list[dict[str, str]]:
        return [
            {"role": m.role, "content": m.content if isinstance(m.content, str) else "".join(p.text for p in m.content)}
            for m in self.messages
        ]


class TextRequest(Request):
    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = Field(default=None, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool = False
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MOST_TOP)  # vLLM's word
    suffix: str | None = None
    best_of: int | None = None

    def asked_for(self) -> tuple[int | None, int | None]:
        return 16 if self.max_tokens is None else self.max_tokens, self.logprobs

    @property
    def top(self) -> int | None:
        """How many likely tokens are wanted beside each of the prompt's; None for none of it."""
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((top for top in wanted if top is not None), default=None)


def parse(kind: type[Request], body: bytes) -> Any:
    """A request of the kind. Raises ApiError that names the field at fault."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        where = str(found[0]["loc"][0]) if found[0]["loc"] else None
        wrong = dict.fromkeys(
            e["msg"] for e in found if e["loc"][:1] == found[0]["loc"][:1]
        )  # one for each kind it may be
        raise ApiError(400, f"{where or 'the body'}: {'; or '.join(wrong)}", param=where) from error
    for name in ("tools", "functions", "logit_bias", "suffix"):
        if getattr(request, name, None):
            raise ApiError(400, f"{name}: not supported by this server; leave it out.", param=name, code="unsupported")
    if getattr(request, "response_format", None) not in (None, {"type": "text"}):
        raise ApiError(400, "response_format: only text is supported.", param="response_format", code="unsupported")
    for name in ("n", "best_of"):
        if getattr(request, name, None) not in (None, 1):
            raise ApiError(400, f"{name}: one answer a request; ask again for another.", param=name, code="unsupported")
    if isinstance(request, TextRequest):
        if request.max_tokens == 0 and request.top is None and not request.echo:
            raise ApiError(400, "max_tokens: 0 is for a prompt's own log-probabilities, with echo.", param="max_tokens")
        for name in ("echo", "prompt_logprobs"):
            if request.stream and getattr(request, name):
                raise ApiError(400, f"{name}: not in a stream.", param=name, code="unsupported")
        if request.stream and len(prompts_of(request)) > 1:
            raise ApiError(400, "prompt: one in a stream; send the others on their own.", param="prompt")
        if len(prompts_of(request)) > MOST_PROMPTS:
            raise ApiError(400, f"prompt: at most {MOST_PROMPTS} a request.", param="prompt")
    return request


def prompts_of(request: TextRequest) -> list[Any]:
    """Each of the request's prompts, text or tokens."""
    prompt: Any = request.prompt
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    return prompt if several else [prompt]


def tokens_of(request: ChatRequest | TextRequest, tokenizer: Any) -> list[list[int]]:
    """The request's prompts as tokens. Raises InputError."""
    if isinstance(request, ChatRequest):
        return [conversation.chat_tokens(tokenizer, request.texts())]
    prompts = prompts_of(request)
    return [conversation.encode(tokenizer, p) if isinstance(p, str) else [int(t) for t in p] for p in prompts]


@dataclass
class Answering:
    """One request's answer in OpenAI's words, whole or in pieces."""

    chat: bool
    model: str
    prompt: Sequence[int]
    tokenizer: Any
    end: Sequence[int]
    index: int = 0
    echo: bool = False
    prompt_logprobs: int | None = None
    token_ids: bool = False

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._text = ""
        self._tokens: list[int] = []
        self._cached = 0
        self._finish: str | None = None
        self._logprobs: list[dict[str, Any]] = []
        self._scores: list[Choice] | None = None

    def expected(self, scores: list[Choice]) -> None:
        """What the model thought of the prompt's tokens after the first."""
        self._scores = scores

    def add(self, output: Output, cached: int) -> None:
        self._text += output.text
        self._tokens.append(output.token)
        self._cached = cached
        self._finish = output.finish
        if output.logprob is not None and not (output.finish == "stop" and output.token in self.end):
            self._logprobs.append(self._logprob(output))

    def _logprob(self, output: Output | Choice) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self.tokenizer.decode([token])
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        assert output.logprob is not None
        return entry(output.token, output.logprob) | {"top_logprobs": [entry(*top) for top in output.top]}

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": len(self.prompt),
            "completion_tokens": len(self._tokens),
            "total_tokens": len(self.prompt) + len(self._tokens),
            "prompt_tokens_details": {"cached_tokens": self._cached},
        }

    def choice(self) -> dict[str, Any]:
        """All of it."""
        if self.chat:
            words = {"role": "assistant", "content": self._text}
            return self._choice({"message": words}, self._said(self._logprobs), self._tokens)
        text, logprobs = self._text, self._logprobs
        if self.echo:
            text = self.tokenizer.decode(self.prompt, skip_special_tokens=True) + text
            if self._scores is not None:
                first = {"token": self.tokenizer.decode(self.prompt[:1]), "logprob": None, "top_logprobs": None}
                logprobs = [first, *map(self._logprob, self._scores), *logprobs]
        choice = self._choice({"text": text}, self._said(logprobs), self._tokens)
        if self.prompt_logprobs is not None and self._scores is not None:
            choice["prompt_logprobs"] = [None, *(_by_token(s, self.prompt_logprobs) for s in self._scores)]
        return choice

    def document(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._document("", choices)

    def first_piece(self) -> dict[str, Any] | None:
        """What a chat begins with."""
        choice = self._choice({"delta": {"role": "assistant", "content": ""}}, None, [])
        return self._document(".chunk", [choice]) if self.chat else None

    def piece(self, output: Output) -> dict[str, Any] | None:
        """What is new with an output, if anything."""
        if not output.text and not output.finish and output.logprob is None and not self.token_ids:
            return None
        new = self._logprobs[-1:] if output.logprob is not None else []
        content: dict[str, Any] = {"text": output.text}
        if self.chat:
            content = {"delta": {"content": output.text} if output.text else {}}
        return self._document(".chunk", [self._choice(content, self._said(new), [output.token])])

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
        numbers = {"token_ids": list(tokens)} if self.token_ids else {}
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


def checked(request: ChatRequest | TextRequest, tokenizer: Any) -> tuple[list[list[int]], SamplingParams | None]:
    """Tokens of each prompt and how they are answered. Raises ApiError."""
    try:
        return tokens_of(request, tokenizer), request.params()
    except InputError as error:
        raise ApiError(400, str(error)) from error
