"""One streamed request to an OpenAI-compatible server, timed token by token.

`/v1/completions`, or `/v1/chat/completions` where the first does not exist.
"""

import itertools
import json
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from lowbit.client import EXCERPT, TIMEOUT_SECONDS, Post, get_text
from lowbit.errors import InputError


@dataclass(frozen=True)
class Endpoint:
    """Where to ask and for what: base URL without /v1, model name, path, seconds of silence to give up after."""

    base: str
    model: str
    path: str = "/v1/completions"
    timeout: float = TIMEOUT_SECONDS


@dataclass(frozen=True)
class Answer:
    """Seconds from sending to the first token, and between tokens; tokens by the server's own count if it gives one."""

    first_s: float
    gaps_s: tuple[float, ...]
    end_s: float
    tokens: int
    prompt_tokens: int | None

    @property
    def tpot_s(self) -> float | None:
        """(end - first token) / (tokens - 1); None for a single token."""
        return sum(self.gaps_s) / (self.tokens - 1) if self.tokens > 1 else None


def find_endpoint(url: str, model: str | None = None, timeout: float = TIMEOUT_SECONDS) -> Endpoint:
    """The server at `url` (with or without /v1), serving `model` or the first it lists. Raises InputError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"{url}: expected a URL such as http://localhost:8000.")
    base = url.rstrip("/").removesuffix("/v1")
    if model is None:
        status, body = get_text(f"{base}/v1/models", timeout)
        try:
            model = str(json.loads(body)["data"][0]["id"]) if status == 200 else None
        except (ValueError, LookupError, TypeError):
            model = None
        if model is None:
            raise InputError(
                f"{base}/v1/models: expected a list of models, got status {status}: {body[:EXCERPT]!r}. Is this an "
                "OpenAI-compatible server?"
            )
    return Endpoint(base, model, timeout=timeout)


def ask(endpoint: Endpoint, prompt: str, max_tokens: int) -> Answer:
    """Send one request and read its stream to the end. Raises InputError for anything but a stream of tokens."""
    body: dict[str, Any] = {
        "model": endpoint.model, "max_tokens": max_tokens, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    chat = endpoint.path.endswith("chat/completions")
    body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    start = time.perf_counter()
    with Post(endpoint.base + endpoint.path, body, endpoint.timeout) as post:
        return _read(post, start)


def _read(post: Post, start: float) -> Answer:
    times: list[float] = []
    usage: dict[str, Any] = {}
    for event in post.events():
        choices = event.get("choices")
        if not isinstance(choices, list):
            raise InputError(f"{post.url}: an event without 'choices': {json.dumps(event)[:EXCERPT]!r}.")
        if any(_text(c) for c in choices):
            times.append(time.perf_counter() - start)
        usage = event["usage"] if isinstance(event.get("usage"), dict) else usage
    if not times:
        raise InputError(f"{post.url}: the stream ended without a single token.")
    counted = usage.get("completion_tokens")
    tokens = counted if isinstance(counted, int) and counted > 0 else len(times)
    gaps = tuple(b - a for a, b in itertools.pairwise(times))
    return Answer(times[0], gaps, times[-1], tokens, usage.get("prompt_tokens"))


def _text(choice: Any) -> str:
    if not isinstance(choice, dict):
        return ""
    delta = choice.get("delta")
    found = choice.get("text") or (delta.get("content") if isinstance(delta, dict) else None)
    return found if isinstance(found, str) else ""
