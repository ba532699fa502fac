"""A real server on a free port, in this process, and the real openai client in front of it."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
import uvicorn

from lowbit.runtime.base import Engine
from lowbit.runtime.engine import load
from lowbit.serving.app import Service, make_app
from lowbit.serving.listen import listening
from lowbit.serving.worker import Worker

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[me] {% endif %}"
)


@contextlib.contextmanager
def serving(service: Service) -> Iterator[str]:
    """The address of a server that runs within."""
    with listening("127.0.0.1", 0) as socket:
        server = uvicorn.Server(uvicorn.Config(make_app(service), log_level="warning", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{socket.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


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
def address(service: Service) -> Iterator[str]:
    with serving(service) as url:
        yield url


@pytest.fixture(scope="session")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


@pytest.fixture
def serve() -> Callable[[Service], contextlib.AbstractContextManager[str]]:
    return serving
