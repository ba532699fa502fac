"""A client of HTTP servers that answer with JSON or stream server-sent events.

A stream is one JSON object a `data:` line, ended by `data: [DONE]` or by the server's closing word. Whatever is not
what was expected is an InputError that says what came instead.
"""

import contextlib
import http.client
import json
import os
import socket
import ssl
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from lowbit.errors import InputError

TIMEOUT_SECONDS = 120.0
EXCERPT = 160  # characters of what came instead


def is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


class Post:
    """One request, sent when it is made; `json` or `events` wait for the answer.

    Several can be under way at once. A context manager that closes the connection. `timeout` is in seconds of silence.
    """

    def __init__(self, url: str, body: dict[str, Any], timeout: float = TIMEOUT_SECONDS) -> None:
        self.url, self._timeout = url, timeout
        self._connection = _connect(url, timeout)
        with self._blaming_the_server():
            self._connection.request("POST", urlsplit(url).path, json.dumps(body), _headers())

    def json(self) -> dict[str, Any]:
        """The answer's JSON object."""
        response = self._response()
        with self._blaming_the_server():
            data = response.read()
        return self._object(data, "an answer")

    def events(self) -> Iterator[dict[str, Any]]:
        """The JSON objects of the stream, up to [DONE]."""
        response = self._response()
        while True:
            with self._blaming_the_server():
                line = response.readline(2**20)
            if not line:
                raise InputError(f"{self.url}: the stream broke off before [DONE].")
            text = line.decode("utf-8", "replace").strip()
            if not text or text.startswith((":", "event:", "id:", "retry:")):
                continue
            if not text.startswith("data:"):
                raise InputError(f"{self.url}: expected server-sent events (data: ...), got {text[:EXCERPT]!r}.")
            data = text[5:].strip()
            if data == "[DONE]":
                return
            event = self._object(data, "an event")
            if isinstance(event.get("error"), dict | str):
                raise InputError(f"{self.url}: the server reports {str(event['error'])[:EXCERPT]!r}.")
            yield event

    def _object(self, data: str | bytes, what: str) -> dict[str, Any]:
        try:
            found = json.loads(data)
        except ValueError as error:
            raise InputError(f"{self.url}: {what} that is not JSON: {data[:EXCERPT]!r}.") from error
        if not isinstance(found, dict):
            raise InputError(f"{self.url}: {what} that is no object: {data[:EXCERPT]!r}.")
        return found

    def _response(self) -> http.client.HTTPResponse:
        with self._blaming_the_server():
            response = self._connection.getresponse()
            if response.status == 200:
                return response
            text = response.read(EXCERPT).decode("utf-8", "replace")
        raise InputError(f"{self.url}: status {response.status}: {text!r}.")

    @contextlib.contextmanager
    def _blaming_the_server(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            raise InputError(f"{self.url}: no token for {self._timeout:g} s.") from error
        except (OSError, http.client.HTTPException) as error:
            raise InputError(f"{self.url}: {_reason(error)}.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type | None, _value: BaseException | None, _trace: TracebackType | None) -> None:
        self._connection.close()


def get_text(url: str, timeout: float = TIMEOUT_SECONDS) -> tuple[int, str]:
    """Status and text of a GET. Raises InputError if the server cannot be reached."""
    connection = _connect(url, timeout)
    try:
        connection.request("GET", urlsplit(url).path, headers=_headers())
        response = connection.getresponse()
        return response.status, response.read(2**20).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        raise InputError(f"{url}: {_reason(error)}.") from error
    finally:
        connection.close()


def get_object(url: str, timeout: float = TIMEOUT_SECONDS) -> dict[str, Any] | None:
    """The JSON object at `url`, or None if there is none. Raises InputError if the server cannot be reached."""
    status, text = get_text(url, timeout)
    try:
        found = json.loads(text) if status == 200 else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


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


def _reason(error: Exception) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens there (connection refused). Start the server, or correct the port"
    if isinstance(error, socket.gaierror):
        return "no such host"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, http.client.HTTPException):
        return f"not an HTTP server ({type(error).__name__}: {str(error)[:EXCERPT]})"
    return f"cannot be reached ({error})"
