"""A model behind a real server, and the real openai client in front of it."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from lowbit.runtime.base import Engine
from lowbit.runtime.engine import load
from lowbit.serving.app import Service
from lowbit.serving.worker import Worker

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[me] {% endif %}"
)


@pytest.fixture(scope="session")
def engine(tiny: Path) -> Engine:
    """The tiny model on the native decoder, with a chat template."""
    made = load(str(tiny), "auto")
    made.tokenizer.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="session")
def service(engine: Engine) -> Iterator[Service]:
    worker = Worker(engine)
    yield Service(worker, "tiny", hosts=("127.0.0.1", "localhost"))
    worker.stop()


@pytest.fixture(scope="session")
def address(service: Service, serve: Callable[[Service], contextlib.AbstractContextManager[str]]) -> Iterator[str]:
    with serve(service) as url:
        yield url


@pytest.fixture(scope="session")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
