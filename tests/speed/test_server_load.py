"""bench against a server: a small real HTTP server that streams at known times, and servers that misbehave."""

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from lowbit.errors import InputError, LowbitError
from lowbit.speed import Load, bench
from lowbit.speed.load import load_test, send_all
from lowbit.speed.stream import Answer, Endpoint, ask, find_endpoint

FIRST, GAP = 0.05, 0.02  # seconds: far above what this machine needs for a request


@contextlib.contextmanager
def server(answer: Callable[[Any, dict[str, Any]], None], models: Any = None) -> Iterator[str]:
    """A server whose POST is `answer(handler, body)`; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_args: Any) -> None:
            pass

        def reply(self, status: int, body: bytes, kind: str = "application/json") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.reply(200, json.dumps({"data": [{"id": "tiny"}]} if models is None else models).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                answer(self, body)

        def stream(self, lines: Iterator[str]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for line in lines:
                data = line.encode()
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        http.server_close()


def event(value: Any) -> str:
    return f"data: {json.dumps(value)}\n\n"


def good(handler: Any, body: dict[str, Any]) -> None:
    """FIRST seconds to the first token, GAP to each other one."""

    def lines() -> Iterator[str]:
        yield ": hello\n\n"
        for i in range(body["max_tokens"]):
            time.sleep(GAP if i else FIRST)
            yield event({"choices": [{"text": f" t{i}"}]})
        yield event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": body["max_tokens"]}})
        yield "data: [DONE]\n\n"

    handler.stream(lines())


def test_times_are_those_of_the_server() -> None:
    with server(good) as url:
        answer = ask(find_endpoint(url + "/v1"), "hello", 6)
    assert answer.tokens == 6
    assert answer.prompt_tokens == 7
    assert answer.first_s == pytest.approx(FIRST, abs=0.2)
    assert len(answer.gaps_s) == 5
    assert answer.tpot_s == pytest.approx(sum(answer.gaps_s) / 5)
    assert answer.end_s == pytest.approx(answer.first_s + sum(answer.gaps_s))
    assert answer.end_s >= FIRST + 5 * GAP


def test_bench_takes_a_url_and_counts_what_kept_the_limits() -> None:
    with server(good) as url:
        shape: dict[str, Any] = {"prompt_lengths": [8], "output_lengths": [4], "batch_sizes": [2]}
        strict = bench([url], **shape, load=Load(requests=6, max_tpot=GAP / 2))
        loose = bench([url], **shape, load=Load(requests=6, max_ttft=60))
    (row,) = loose["results"]
    assert row["scenario"] == {"prompt_length": 8, "output_length": 4, "batch_size": 2}
    assert row["load"]["kind"] == "closed"
    assert row["load"]["within_limits"] == 1
    assert row["load"]["goodput_requests_per_s"] == pytest.approx(row["load"]["requests_per_s"])
    assert strict["results"][0]["load"]["goodput_requests_per_s"] == 0
    assert row["ttft_s"]["median"] >= FIRST
    assert row["throughput_tokens_per_s"] <= 2 * 4 / (FIRST + 3 * GAP)  # two at a time


def test_open_loop_sends_when_due_and_closed_loop_when_free() -> None:
    """A server of 50 ms at 40 requests a second: an open loop keeps its rate, a closed one waits for answers."""

    def one(_prompt: str) -> Answer:
        time.sleep(0.05)
        return Answer(0.05, (), 0.05, 1, None)

    due = np.arange(1, 21) / 40
    sent = send_all(one, ["x"] * 20, due, clients=20)
    assert np.median([s.sent_s - d for s, d in zip(sent, due, strict=True)]) < 0.04
    closed = send_all(one, ["x"] * 6, np.zeros(6), clients=1)
    assert all(b.sent_s >= a.done_s - 1e-3 for a, b in itertools.pairwise(closed))
    few = send_all(one, ["x"] * 10, np.full(10, 0.01), clients=1)  # ten at once, but one client: its queue shows
    assert few[-1].sent_s - few[-1].due_s > 0.4


def test_poisson_arrivals_have_the_rate_that_was_asked_for() -> None:
    with server(good) as url:
        row = load_test(url, 4, 2, Load(requests=24, rate=60.0))
    assert row["load"]["kind"] == "open"
    assert row["load"]["requests"] == 24
    assert row["load"]["requests_per_s"] < 60


def not_found_then_chat(handler: Any, body: dict[str, Any]) -> None:
    if handler.path == "/v1/completions":
        return handler.reply(404, b"{}")
    assert body["messages"][0]["role"] == "user"
    lines = [event({"choices": [{"delta": {"content": "x"}}]}) for _ in range(body["max_tokens"])]
    return handler.stream(iter([*lines, "data: [DONE]\n\n"]))


def test_a_server_that_only_chats_is_asked_that_way() -> None:
    with server(not_found_then_chat) as url:
        assert load_test(url, 4, 3, Load(requests=2))["load"]["output_tokens"] == 3


def streaming(*lines: str) -> Callable[[Any, dict[str, Any]], None]:
    return lambda handler, _body: handler.stream(iter(lines))


ONE = event({"choices": [{"text": "x"}]})


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (streaming("<html>hello</html>\n"), r"expected server-sent events .*<html>"),
        (streaming("data: {oops\n\n"), "an event that is not JSON: '{oops'"),
        (streaming("data: [1, 2]\n\n"), "an event that is no object"),
        (streaming(event({"object": "thing"})), "an event without 'choices'"),
        (streaming(event({"error": {"message": "no memory"}})), "the server reports .*no memory"),
        (streaming(ONE), r"broke off before \[DONE\]"),
        (streaming("data: [DONE]\n\n"), "without a single token"),
        (lambda h, _b: h.reply(500, b"kaboom", "text/plain"), "status 500: 'kaboom'"),
        (lambda h, _b: h.reply(401, b'{"error": "key"}'), "status 401"),
        (lambda h, _b: h.wfile.write(b"\x00\x01 garbage\r\n\r\n"), "not an HTTP server"),
    ],
)
def test_garbage_is_said_to_be_garbage(answer: Any, says: str) -> None:
    with server(answer) as url, pytest.raises(InputError, match=says):
        load_test(url, 4, 2, Load(requests=1))


def test_what_cannot_be_reached_is_said_before_anything_is_measured() -> None:
    with server(good) as url:
        port = url.rsplit(":", 1)[1]
    with pytest.raises(InputError, match="nothing listens there"):
        bench([f"http://127.0.0.1:{port}"])
    with pytest.raises(InputError, match="expected a URL such as"):
        find_endpoint("http://")
    with (
        server(good, models={"oops": 1}) as url,
        pytest.raises(InputError, match="Is this an OpenAI-compatible server"),
    ):
        find_endpoint(url)
    with pytest.raises(InputError, match="give only URLs, or only models"):
        bench(["http://127.0.0.1:1", "demo"])
    for load in (Load(requests=0), Load(rate=0.0)):
        with pytest.raises(InputError, match="must be"):
            load_test("http://127.0.0.1:1", 4, 2, load)


def test_a_server_that_says_nothing_is_given_up_on() -> None:
    with server(lambda _h, _b: time.sleep(1.5)) as url, pytest.raises(InputError, match=r"no token for 0\.3 s"):
        ask(Endpoint(url, "tiny", timeout=0.3), "x", 2)


def test_failures_under_load_are_counted_and_the_rest_is_measured() -> None:
    asked = iter(range(100))

    def sometimes(handler: Any, body: dict[str, Any]) -> None:
        if next(asked) % 2:
            return handler.reply(503, b"busy")
        return good(handler, body)

    with server(sometimes) as url:
        row = load_test(url, 4, 2, Load(requests=6))
    assert sum(row["load"]["failures"].values()) == 3
    assert row["load"]["within_limits"] == 0.5

    once = iter([True])

    def only_warm_up(handler: Any, body: dict[str, Any]) -> None:
        return good(handler, body) if next(once, False) else handler.reply(503, b"busy")

    with server(only_warm_up) as url, pytest.raises(LowbitError, match=r"all 3 requests failed, the first with: .*503"):
        load_test(url, 4, 2, Load(requests=3))
