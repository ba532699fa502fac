"""Load on an OpenAI-compatible server, and what its users would feel.

closed loop   `concurrency` clients, each sends its next request when its last one is answered: the server sets the
              pace, so this shows capacity, and hides queueing
open loop     requests arrive as a Poisson process of a given rate, answered or not, as from many independent users:
              this shows what happens near and beyond capacity (Schroeder et al., "Open versus closed", NSDI 2006)

TTFT and end to end count from sending. Beside them stands the client's own queue time (from when a request was due
until it was sent): where that is not near 0, the load generator was the bottleneck, and the figures say so. Goodput is
the rate of requests that kept all limits (Zhong et al., DistServe, OSDI 2024).
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit.errors import InputError, LowbitError
from lowbit.speed.stream import Answer, Endpoint, ask, find_endpoint

_WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")
MOST_CLIENTS = 256


@dataclass(frozen=True)
class Load:
    """How much to ask for: closed loop with `concurrency`, or open loop with `rate` requests a second."""

    requests: int = 32
    concurrency: int = 1
    rate: float | None = None
    max_ttft: float | None = None
    max_tpot: float | None = None


@dataclass(frozen=True)
class Sent:
    """One request: seconds from the start of the run when it was due and sent, and its answer or why there is none."""

    due_s: float
    sent_s: float
    done_s: float
    answer: Answer | None
    error: str | None


def load_test(url: str, prompt_length: int, output_length: int, load: Load, seed: int = 0) -> dict[str, Any]:
    """One row as of the `bench` document, with `load`: what was asked, goodput, queue time, gaps and failures.

    Raises InputError if the server cannot be reached or does not stream, LowbitError if every counted request failed.
    """
    _check(load)
    endpoint = _ready(find_endpoint(url), prompt_length, output_length, seed)
    rng = np.random.default_rng(seed)
    prompts = [_prompt(rng, prompt_length) for _ in range(load.requests)]
    if load.rate is None:
        due = np.zeros(load.requests)
        clients = load.concurrency
    else:
        due = np.cumsum(rng.exponential(1 / load.rate, load.requests))
        clients = min(load.requests, MOST_CLIENTS)
    sent = send_all(lambda prompt: ask(endpoint, prompt, output_length), prompts, due, clients)
    answered = [s for s in sent if s.answer is not None]
    if not answered:
        raise LowbitError(f"{url}: all {len(sent)} requests failed, the first with: {sent[0].error}")
    return summarize(url, prompt_length, output_length, load, sent)


def _check(load: Load) -> None:
    for name, value, least in (("requests", load.requests, 1), ("concurrency", load.concurrency, 1)):
        if value < least:
            raise InputError(f"{name} must be at least {least}, got {value}.")
    if load.rate is not None and not 0 < load.rate < 1e6:
        raise InputError(f"the rate must be above 0 requests a second, got {load.rate:g}.")


def _ready(endpoint: Endpoint, prompt_length: int, output_length: int, seed: int) -> Endpoint:
    """One request that is not counted; falls back to the chat endpoint where completions are unknown."""
    prompt = _prompt(np.random.default_rng(seed + 1), prompt_length)
    try:
        ask(endpoint, prompt, output_length)
        return endpoint
    except InputError as error:
        if "status 404" not in str(error) and "status 405" not in str(error):
            raise
    chat = Endpoint(endpoint.base, endpoint.model, "/v1/chat/completions", endpoint.timeout)
    ask(chat, prompt, output_length)
    return chat


def _prompt(rng: np.random.Generator, tokens: int) -> str:
    """About so many tokens of short common words; different each time, so that no prefix is cached."""
    return " ".join(_WORDS[i] for i in rng.integers(0, len(_WORDS), tokens))


def send_all(one: Callable[[str], Answer], prompts: Sequence[str], due: np.ndarray, clients: int) -> list[Sent]:
    """Send every prompt not before it is due, by at most `clients` at once."""
    start = time.perf_counter()

    def send(item: tuple[str, float]) -> Sent:
        prompt, when = item
        time.sleep(max(0.0, when - (time.perf_counter() - start)))
        sent = time.perf_counter() - start
        answer, error = None, None
        try:
            answer = one(prompt)
        except InputError as failure:
            error = str(failure)
        # in a closed loop a request is due when its client is free, which is when it is sent
        return Sent(when if when > 0 else sent, sent, time.perf_counter() - start, answer, error)

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(send, zip(prompts, due.tolist(), strict=True)))


def summarize(url: str, prompt_length: int, output_length: int, load: Load, sent: Sequence[Sent]) -> dict[str, Any]:
    """The row of `load_test` from what was sent."""
    done = [s for s in sent if s.answer is not None]
    answers = [s.answer for s in done if s.answer is not None]
    wall = max(s.done_s for s in sent) - min(s.sent_s for s in sent)
    tpots = [a.tpot_s for a in answers if a.tpot_s is not None]
    good = [a for a in answers if _keeps(a, load)]
    prompt_tokens = [a.prompt_tokens for a in answers if a.prompt_tokens is not None]
    queue = [s.sent_s - s.due_s for s in sent]
    return {
        "model": url,
        "runtime": "server",
        "scenario": {"prompt_length": prompt_length, "output_length": output_length, "batch_size": load.concurrency},
        "ttft_s": _summary([a.first_s for a in answers]),
        "tpot_s": _summary(tpots or [float("nan")]),
        "e2e_s": _summary([a.end_s for a in answers]),
        "throughput_tokens_per_s": sum(a.tokens for a in answers) / wall,
        "mbu": None,
        "weight_bytes": None,
        "peak_memory_bytes": None,
        "energy": {
            "joules_per_token": None,
            "watts": None,
            "counters": {},
            "unavailable": "the server is not this process",
        },
        "load": {
            "kind": "closed" if load.rate is None else "open",
            "requests": len(sent),
            "rate": load.rate,
            "requests_per_s": len(done) / wall,
            "gap_s": _summary([g for a in answers for g in a.gaps_s] or [float("nan")]),
            "queue_s": _summary(queue),
            "client_bound": float(np.percentile(queue, 90)) > 0.1 * float(np.median([a.end_s for a in answers])),
            "limits": {"ttft_s": load.max_ttft, "tpot_s": load.max_tpot},
            "goodput_requests_per_s": len(good) / wall,
            "within_limits": len(good) / len(sent),
            "prompt_tokens": float(np.mean(prompt_tokens)) if prompt_tokens else None,
            "output_tokens": float(np.mean([a.tokens for a in answers])),
            "failures": dict(Counter(s.error for s in sent if s.error is not None)),
        },
    }


def _keeps(answer: Answer, load: Load) -> bool:
    slow_start = load.max_ttft is not None and answer.first_s > load.max_ttft
    slow_on = load.max_tpot is not None and (answer.tpot_s or 0.0) > load.max_tpot
    return not (slow_start or slow_on)


def _summary(values: Sequence[float]) -> dict[str, float | None]:
    p99 = float(np.percentile(values, 99)) if len(values) >= 100 else None
    return {"median": float(np.median(values)), "p90": float(np.percentile(values, 90)), "p99": p99}
