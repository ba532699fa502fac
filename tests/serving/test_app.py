"""OpenAI's own client gets from the server what the engine says; every bad request gets a clear error."""

import base64
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.accuracy import evaluate
from lowbit.runtime.base import Engine
from lowbit.serving.app import MOST_BODY, Service
from lowbit.serving.worker import Worker

PROMPT = "def add(a, b):"
WORDS: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 20}
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "What?"}]}]


def settled(service: Service) -> bool:
    """Whether nobody is being answered any more, within five seconds."""
    end = time.monotonic() + 5
    while service.worker.count and time.monotonic() < end:
        time.sleep(0.02)
    return service.worker.count == 0


def test_text_is_what_the_engine_generates(client: openai.OpenAI, engine: Engine) -> None:
    answer = client.completions.create(**WORDS)
    assert answer.choices[0].text == engine.generate(PROMPT, max_new_tokens=20)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(engine.tokenizer(PROMPT)["input_ids"])
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (20, answer.usage.prompt_tokens + 20)
    tokens = engine.tokenizer(PROMPT)["input_ids"]
    assert client.completions.create(**(WORDS | {"prompt": tokens})).choices[0].text == answer.choices[0].text
    assert client.completions.create(**(WORDS | {"prompt": [PROMPT]})).choices[0].text == answer.choices[0].text


def test_a_stream_says_the_same_in_pieces(client: openai.OpenAI) -> None:
    whole = client.completions.create(**WORDS).choices[0].text
    pieces = list(client.completions.create(**WORDS, stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].text for p in pieces if p.choices) == whole
    assert [p.choices[0].finish_reason for p in pieces if p.choices][-1] == "length"
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == 20


def test_tokens_as_numbers(client: openai.OpenAI, engine: Engine) -> None:
    words: dict[str, Any] = WORDS | {"extra_body": {"return_token_ids": True}}
    tokens = [o.token for o in engine.outputs(PROMPT, max_new_tokens=20)]
    assert client.completions.create(**words).choices[0].model_extra["token_ids"] == tokens  # type: ignore[index]
    pieces = [p.choices[0].model_extra or {} for p in client.completions.create(**words, stream=True)]
    assert [t for p in pieces for t in p["token_ids"]] == tokens


def test_chats_go_through_the_models_template(client: openai.OpenAI, engine: Engine) -> None:
    words: dict[str, Any] = {"model": "tiny", "messages": CHAT, "temperature": 0, "max_completion_tokens": 12}
    answer = client.chat.completions.create(**words)
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]
    assert answer.choices[0].message.content == engine.chat(plain, max_new_tokens=12)
    assert answer.choices[0].message.role == "assistant"
    pieces = list(client.chat.completions.create(**words, stream=True))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == answer.choices[0].message.content


def test_log_probabilities(client: openai.OpenAI, engine: Engine) -> None:
    outputs = list(engine.outputs(PROMPT, max_new_tokens=5, logprobs=3))
    said = client.completions.create(**(WORDS | {"max_tokens": 5}), logprobs=3).choices[0].logprobs
    assert said is not None
    assert said.token_logprobs == pytest.approx([o.logprob for o in outputs])
    words: dict[str, Any] = {"messages": CHAT, "max_tokens": 4, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    chat = client.chat.completions.create(model="tiny", **words)
    assert chat.choices[0].logprobs is not None
    entries = chat.choices[0].logprobs.content
    assert entries is not None
    assert [len(e.top_logprobs) for e in entries] == [2] * 4
    pieces = client.chat.completions.create(model="tiny", stream=True, **words)
    streamed = [e for p in pieces if (lp := p.choices[0].logprobs) and lp.content for e in lp.content]
    assert [e.logprob for e in streamed] == pytest.approx([e.logprob for e in entries])


def test_several_prompts_are_answered_as_one_by_one(client: openai.OpenAI) -> None:
    prompts = [PROMPT, "import os", "x = 1\ny ="]
    alone = [client.completions.create(**(WORDS | {"prompt": p})) for p in prompts]
    together = client.completions.create(**(WORDS | {"prompt": prompts}))
    assert [c.text for c in together.choices] == [a.choices[0].text for a in alone]
    assert [c.index for c in together.choices] == [0, 1, 2]
    assert together.usage is not None
    assert together.usage.total_tokens == sum(a.usage.total_tokens for a in alone if a.usage)


@pytest.mark.parametrize("most", [0, 1, 7])
def test_a_prompts_own_log_probabilities(client: openai.OpenAI, engine: Engine, most: int) -> None:
    """As lm-eval asks for them (echo) and as vLLM has them (prompt_logprobs), against the engine's logits."""
    prompts = [engine.tokenizer(text)["input_ids"] for text in (PROMPT * 12, "import os")]
    words: dict[str, Any] = {"model": "tiny", "prompt": prompts, "temperature": 0, "max_tokens": most, "logprobs": 2}
    answer = client.completions.create(**words, echo=True, extra_body={"prompt_logprobs": 3})
    for tokens, choice in zip(prompts, answer.choices, strict=True):
        logs = engine.logits(torch.tensor([tokens]))[0].log_softmax(-1)
        expected = [float(logs[i, t]) for i, t in enumerate(tokens[1:])]
        said = choice.logprobs
        assert said is not None
        assert said.token_logprobs is not None
        assert said.top_logprobs is not None
        assert said.token_logprobs[0] is None
        assert said.token_logprobs[1 : len(tokens)] == pytest.approx(expected, abs=1e-4)
        assert len(said.token_logprobs) == len(said.tokens or []) == len(tokens) + most
        best = [max(top.values()) for top in said.top_logprobs[1 : len(tokens)]]
        assert best == pytest.approx(logs[:-1].max(1).values.tolist(), abs=1e-4)
        assert choice.text.startswith(engine.tokenizer.decode(tokens, skip_special_tokens=True))
        by_token = choice.model_extra["prompt_logprobs"]  # type: ignore[index]
        assert by_token[0] is None
        assert [e[str(t)]["logprob"] for e, t in zip(by_token[1:], tokens[1:], strict=True)] == pytest.approx(
            expected, abs=1e-4
        )
        assert {len(e) for e in by_token[1:]} <= {3, 4}
    echoed = client.completions.create(model="tiny", prompt=PROMPT, echo=True, max_tokens=0).choices[0]
    assert (echoed.text, echoed.logprobs) == (PROMPT, None)


def test_accuracy_measured_through_the_server(address: str, tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("def f(x):\n    return x\n" * 40)
    words: dict[str, Any] = {"text": text, "against": tiny, "seq_len": 48}
    direct, served = (evaluate([model], **words)["results"][0] for model in (str(tiny), f"{address}/v1"))
    assert served["runtime"].startswith("lowbit ")
    assert served["perplexity"] == pytest.approx(direct["perplexity"], rel=1e-4)
    assert served["kl"]["mean"] == pytest.approx(direct["kl"]["mean"], rel=0.01)


def test_who_leaves_while_a_prompt_is_scored(client: openai.OpenAI, service: Service) -> None:
    words: dict[str, Any] = {"model": "tiny", "prompt": [[5] * 200] * 50, "max_tokens": 0, "logprobs": 1}
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.01).completions.create(**words, echo=True)
    assert settled(service)


def test_stop_strings_and_seeds(client: openai.OpenAI) -> None:
    free = client.completions.create(**WORDS).choices[0].text
    stopped = client.completions.create(**WORDS, stop=free[5:8]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (free[: free.index(free[5:8])], "stop")
    drawn = [client.completions.create(**(WORDS | {"temperature": 2, "seed": s})).choices[0].text for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert client.completions.create(**(WORDS | {"temperature": None})).choices[0].text != free  # OpenAI's default is 1


def test_many_at_once_are_answered_as_alone(client: openai.OpenAI, service: Service) -> None:
    prompts = [f"{PROMPT} # {i}" * (1 + i % 3) for i in range(12)]

    def ask(prompt: str) -> str:
        return client.completions.create(**(WORDS | {"prompt": prompt})).choices[0].text

    alone = [ask(p) for p in prompts]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, prompts)) == alone
    assert settled(service)


def test_models_and_health(client: openai.OpenAI, address: str) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == ("tiny", "lowbit")
    assert httpx2.get(f"{address}/health").json() == {"status": "ok"}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_who_leaves_is_not_answered_any_further(client: openai.OpenAI, service: Service, stream: bool) -> None:
    words = WORDS | {"max_tokens": 200, "extra_body": {"ignore_eos": True}}
    before = service.worker.steps.stats.generated_tokens  # type: ignore[attr-defined]
    if stream:
        pieces = client.completions.create(**words, stream=True)
        next(iter(pieces))
        pieces.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.01).completions.create(**words)
    assert settled(service)
    assert service.worker.steps.stats.generated_tokens - before < 200  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "says"),
    [
        ("completions", "{", 400, None, "JSON"),
        ("completions", "[]", 400, None, "object"),
        ("completions", {}, 400, "prompt", "required"),
        ("completions", {"prompt": 7}, 400, "prompt", "valid string"),
        ("completions", {"prompt": ""}, 400, None, "empty"),
        ("completions", {"prompt": []}, 400, None, "empty"),
        ("completions", {"prompt": ["a", "b"], "stream": True}, 400, "prompt", "one in a stream"),
        ("completions", {"prompt": ["a"] * 300}, 400, "prompt", "at most 256"),
        ("completions", {"prompt": ["a", ""]}, 400, None, "empty"),
        ("completions", {"prompt": [999999]}, 400, None, "999999"),
        ("completions", {"prompt": "a " * 5000}, 400, None, "leaves no room"),
        ("completions", {"prompt": "a", "max_tokens": 10**6}, 400, None, "ask for at most"),
        ("completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens", "with echo"),
        ("completions", {"prompt": "a", "max_tokens": -1}, 400, "max_tokens", "greater"),
        ("completions", {"prompt": "a", "prompt_logprobs": 9999}, 400, "prompt_logprobs", "less"),
        ("completions", {"prompt": [5] * 300, "prompt_logprobs": 1, "max_tokens": 0}, 400, None, "context"),
        ("completions", {"prompt": [-1, 5], "prompt_logprobs": 1, "max_tokens": 0}, 400, None, "token -1"),
        ("completions", {"prompt": "a", "temperature": -1}, 400, None, "temperature"),
        ("completions", {"prompt": "a", "top_p": 3}, 400, None, "top_p"),
        ("completions", {"prompt": "a", "n": 2}, 400, "n", "one answer"),
        ("completions", {"prompt": "a", "echo": True, "stream": True}, 400, "echo", "not in a stream"),
        ("completions", {"prompt": "a", "model": "gpt-5"}, 404, "model", "'gpt-5' is not here"),
        ("chat/completions", {"messages": []}, 400, "messages", "at least 1"),
        ("chat/completions", {"messages": [{"role": "user"}]}, 400, "messages", "required"),
        ("chat/completions", {"messages": CHAT, "tools": [{}]}, 400, "tools", "not supported"),
        ("chat/completions", {"messages": CHAT, "response_format": {"type": "x"}}, 400, "response_format", "only text"),
    ],
)  # fmt: skip
def test_bad_requests_say_what_is_wrong(
    address: str, path: str, body: Any, status: int, param: str | None, says: str
) -> None:
    text = body if isinstance(body, str) else json.dumps(body)
    answer = httpx2.post(f"{address}/v1/{path}", content=text, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert says in error["message"]


def test_requests_that_are_none(address: str) -> None:
    url = f"{address}/v1/completions"
    assert httpx2.post(url, content='{"prompt": "a"}').status_code == 415  # as a form on another page sends it
    large = httpx2.post(url, content=b" " * (MOST_BODY + 1), headers={"Content-Type": "application/json"})
    assert large.status_code == 413
    assert httpx2.get(url).status_code == 405
    assert httpx2.get(f"{address}/").json()["error"]["message"] == "GET /: not here."
    rebound = httpx2.get(f"{address}/v1/models", headers={"Host": "evil.example"})
    assert (rebound.status_code, rebound.json()["error"]["message"]) == (421, "this server is not 'evil.example'.")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = (
    "prompt", "messages", "stream", "n", "temperature", "top_p", "top_k", "stop", "seed", "logprobs", "max_tokens",
    "stream_options", "echo", "prompt_logprobs", "presence_penalty", "repetition_penalty", "logit_bias", "model",
    "top_logprobs", "return_token_ids",
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    path=st.sampled_from(["completions", "chat/completions"]),
    fields=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4),
    sound=st.booleans(),
)
def test_any_json_is_answered_or_refused(address: str, path: str, fields: dict[str, Any], sound: bool) -> None:
    body = ({"prompt": "a", "messages": CHAT, "max_tokens": 2} if sound else {}) | fields
    text = json.dumps(body)  # with Infinity, which is no JSON and which parsers take
    answer = httpx2.post(f"{address}/v1/{path}", content=text, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400, 404)
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]


def test_the_key_opens_everything_but_health(service: Service, serve: Callable[..., Any]) -> None:
    with serve(replace(service, key="s3cret")) as url:
        assert httpx2.get(f"{url}/health").status_code == 200
        for header in ("", "Bearer", "Bearer wrong", "Basic s3cret", "Basic !", "Digest s3cret"):
            assert httpx2.get(f"{url}/v1/models", headers={"Authorization": header}).status_code == 401
        password = base64.b64encode(b"anyone:s3cret").decode()
        for header in ("Bearer s3cret", f"Basic {password}"):
            assert httpx2.get(f"{url}/v1/models", headers={"Authorization": header}).status_code == 200


def test_too_many_at_once_are_told_to_come_back(engine: Engine, serve: Callable[..., Any]) -> None:
    worker = Worker(engine, most=1)
    try:
        with serve(Service(worker, "tiny")) as url:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            first = client.completions.create(**(WORDS | {"max_tokens": 200}), stream=True)
            worker._most = 0
            refused = httpx2.post(f"{url}/v1/completions", json=WORDS)
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
            first.close()
    finally:
        worker.stop()


def test_a_model_that_fails_is_out_of_service(engine: Engine, serve: Callable[..., Any]) -> None:
    worker = Worker(engine)

    def fail() -> Any:
        raise ZeroDivisionError("the kernel is on fire")

    worker.steps.step = fail  # type: ignore[method-assign]
    with serve(Service(worker, "tiny")) as url:
        answer = httpx2.post(f"{url}/v1/completions", json=WORDS)
        assert answer.status_code == 500
        assert "the kernel is on fire" in answer.json()["error"]["message"]
        assert httpx2.post(f"{url}/v1/completions", json=WORDS).status_code == 503
        assert httpx2.get(f"{url}/health").status_code == 503
    worker.stop()
