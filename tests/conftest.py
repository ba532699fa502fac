"""Small real things to test on: a random Llama in a directory, a tokenizer, text, a server. No network,
one thread."""

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Where there is no GPU, Triton's kernels run in its interpreter; decided before anything (transformers) imports Triton.
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

import uvicorn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from lowbit.console import set_verbosity
from lowbit.model.checkpoint import DEMO
from lowbit.serving.app import Service, make_app
from lowbit.serving.listen import listening

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # some tests fork
torch.set_num_threads(1)
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
set_verbosity(0)


def save_tiny_llama(path: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **config: Any) -> Path:
    """A random Llama (hidden 64, 2 blocks, 4096 tokens) as a checkpoint directory with the demo's tokenizer."""
    words = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,  # large enough that the logits are far apart
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**(words | config))).to(dtype).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / "model" / name, path / name)
    return path


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., Path]:
    return save_tiny_llama


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bfloat16 Llama. Read only; tests that damage a checkpoint copy it first."""
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_float32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-float32", torch.float32)


@pytest.fixture
def broken(tiny: Path, tmp_path: Path) -> Path:
    """A private copy of the tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "broken"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration text: the beginning of the demo's."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text((DEMO / "calibration.txt").read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    return path


@pytest.fixture
def edit_json() -> Callable[..., None]:
    """edit_json(file, key=value, ...): put words into a JSON object on disk."""

    def edit(file: Path, **words: Any) -> None:
        file.write_text(json.dumps(json.loads(file.read_text()) | words))

    return edit


@contextlib.contextmanager
def _serving(service: Service) -> Iterator[str]:
    """The address of a real server on a free port, in this process, that runs within."""
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
def serve() -> Callable[[Service], contextlib.AbstractContextManager[str]]:
    return _serving
