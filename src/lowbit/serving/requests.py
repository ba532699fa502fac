"""Requests in OpenAI's words (platform.openai.com/docs/api-reference, 2026): chat and text completions.

What is asked for and not there is refused, not ignored; fields that nobody knows are ignored, as clients send many.
"""

from abc import ABC, abstractmethod
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from lowbit.errors import InputError
from lowbit.runtime import conversation
from lowbit.runtime.sampling import SamplingParams, fresh_seed
from lowbit.runtime.scoring import MOST_TOP

MOST_PROMPTS = 256  # a request


class ApiError(Exception):
    """An answer that is an error: HTTP status, and OpenAI's `error` object."""

    def __init__(self, status: int, message: str, *, kind: str = "invalid_request_error", param: str | None = None,
                 code: str | None = None) -> None:  # fmt: skip
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def unsupported(name: str, why: str) -> ApiError:
    """What a field is answered with that is understood and not followed."""
    return ApiError(400, f"{name}: {why}", param=name, code="unsupported")


class StreamOptions(BaseModel):
    include_usage: bool = False


class Request(BaseModel, ABC):
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

    @abstractmethod
    def asked_for(self) -> tuple[int | None, int | None]:
        """(the most tokens, log-probabilities of so many tokens)."""

    @abstractmethod
    def prompts(self, tokenizer: Any) -> list[list[int]]:
        """As tokens. Raises InputError."""

    @property
    def top(self) -> int | None:
        """How many likely tokens are wanted beside each of the prompt's own; None for none of it."""
        return None

    def check(self) -> None:
        """Raises ApiError for what this server does not do."""
        for name in ("logit_bias", "tools", "functions", "suffix"):
            if getattr(self, name, None):
                raise unsupported(name, "not supported by this server; leave it out.")
        for name in ("n", "best_of"):
            if getattr(self, name, None) not in (None, 1):
                raise unsupported(name, "one answer a request; ask again for another.")

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

    def prompts(self, tokenizer: Any) -> list[list[int]]:
        said = [
            {"role": m.role, "content": m.content if isinstance(m.content, str) else "".join(p.text for p in m.content)}
            for m in self.messages
        ]
        return [conversation.chat_tokens(tokenizer, said)]

    def check(self) -> None:
        super().check()
        if self.response_format not in (None, {"type": "text"}):
            raise unsupported("response_format", "only text is supported.")


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
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((top for top in wanted if top is not None), default=None)

    def prompts(self, tokenizer: Any) -> list[list[int]]:
        return [conversation.encode(tokenizer, p) if isinstance(p, str) else list(p) for p in self._each()]

    def check(self) -> None:
        super().check()
        count = len(self._each())
        if count > MOST_PROMPTS:
            raise ApiError(400, f"prompt: at most {MOST_PROMPTS} a request.", param="prompt")
        if self.max_tokens == 0 and self.top is None and not self.echo:
            raise ApiError(400, "max_tokens: 0 is for a prompt's own log-probabilities, with echo.", param="max_tokens")
        if not self.stream:
            return
        if count > 1:
            raise ApiError(400, "prompt: one in a stream; send the others on their own.", param="prompt")
        for name in ("echo", "prompt_logprobs"):
            if getattr(self, name):
                raise unsupported(name, "not in a stream.")

    def _each(self) -> list[Any]:
        """Each prompt, text or tokens."""
        prompt: Any = self.prompt
        several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
        return prompt if several else [prompt]


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
    request.check()
    return request


def checked(request: Request, tokenizer: Any) -> tuple[list[list[int]], SamplingParams | None]:
    """Tokens of each prompt and how they are answered. Raises ApiError."""
    try:
        return request.prompts(tokenizer), request.params()
    except InputError as error:
        raise ApiError(400, str(error)) from error
