"""One streamed request to an OpenAI-compatible server, timed token by token.

`/v1/completions`, or `/v1/chat/completions` where the first does not exist; server-sent events, one JSON object a
`data:` line, ended by `data: [DONE]`. Whatever is not that is an InputError that says what came instead.
"""

import http.client
import itertools
import json
import os
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from lowbit.errors import InputError

TIMEOUT_SECONDS = 120.0
_EXCERPT = 160  # characters of what came instead


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


def is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def find_endpoint(url: str, model: str | None = None, timeout: float = TIMEOUT_SECONDS) -> Endpoint:
    """The server at `url` (with or without /v1), serving `model` or the first it lists. Raises InputError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"{url}: expected a URL such as http://localhost:8000.")
    base = url.rstrip("/").removesuffix("/v1")
    if model is None:
        status, body = _get(f"{base}/v1/models", timeout)
        try:
            model = str(json.loads(body)["data"][0]["id"]) if status == 200 else None
        except (ValueError, LookupError, TypeError):
            model = None
        if model is None:
            raise InputError(
                f"{base}/v1/models: expected a list of models, got status {status}: {body[:_EXCERPT]!r}. Is this an "
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
    where = endpoint.base + endpoint.path
    connection = _connect(where, endpoint.timeout)
    start = time.perf_counter()
    try:
        connection.request("POST", urlsplit(where).path, json.dumps(body), _headers())
        response = connection.getresponse()
        if response.status != 200:
            text = response.read(_EXCERPT).decode("utf-8", "replace")
            raise InputError(f"{where}: status {response.status}: {text!r}.")
        return _read(where, response, start)
    except TimeoutError as error:
        raise InputError(f"{where}: no token for {endpoint.timeout:g} s.") from error
    except (OSError, http.client.HTTPException) as error:
        raise InputError(f"{where}: {_reason(error)}.") from error
    finally:
        connection.close()


def _read(where: str, response: http.client.HTTPResponse, start: float) -> Answer:
    times: list[float] = []
    usage: dict[str, Any] = {}
    for event in _events(where, response):
        choices = event.get("choices")
        if isinstance(event.get("error"), dict | str):
            raise InputError(f"{where}: the server reports {str(event['error'])[:_EXCERPT]!r}.")
        if not isinstance(choices, list):
            raise InputError(f"{where}: an event without 'choices': {json.dumps(event)[:_EXCERPT]!r}.")
        if any(_text(c) for c in choices):
            times.append(time.perf_counter() - start)
        usage = event["usage"] if isinstance(event.get("usage"), dict) else usage
    if not times:
        raise InputError(f"{where}: the stream ended without a single token.")
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


def _events(where: str, response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON objects of the stream, up to [DONE]."""
    while line := response.readline(2**20):
        text = line.decode("utf-8", "replace").strip()
        if not text or text.startswith((":", "event:", "id:", "retry:")):
            continue
        if not text.startswith("data:"):
            raise InputError(f"{where}: expected server-sent events (data: ...), got {text[:_EXCERPT]!r}.")
        data = text[5:].strip()
        if data == "[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError as error:
            raise InputError(f"{where}: an event that is not JSON: {data[:_EXCERPT]!r}.") from error
        if not isinstance(event, dict):
            raise InputError(f"{where}: an event that is no object: {data[:_EXCERPT]!r}.")
        yield event
    raise InputError(f"{where}: the stream broke off before [DONE].")


def _headers() -> dict[str, str]:
    key = os.environ.get("OPENAI_API_KEY")
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


def _connect(url: str, timeout: float) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    assert parts.hostname is not None
    if parts.scheme == "https":
        return http.client.HTTPSConnection(
            parts.hostname, parts.port, timeout=timeout, context=ssl.create_default_context()
        )
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)


def _get(url: str, timeout: float) -> tuple[int, str]:
    connection = _connect(url, timeout)
    try:
        connection.request("GET", urlsplit(url).path, headers=_headers())
        response = connection.getresponse()
        return response.status, response.read(2**20).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        raise InputError(f"{url}: {_reason(error)}.") from error
    finally:
        connection.close()


def _reason(error: Exception) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens there (connection refused). Start the server, or correct the port"
    if isinstance(error, socket.gaierror):
        return "no such host"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, http.client.HTTPException):
        return f"not an HTTP server ({type(error).__name__}: {str(error)[:_EXCERPT]})"
    return f"cannot be reached ({error})"
