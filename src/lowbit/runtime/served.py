"""Engines of other projects, reached over HTTP: the same interface as the engines that compute in this process.

What differs from server to server is how token ids go in, how tokens come back one at a time, and how the
log-probabilities of a given text are asked for: a `Dialect`. lowbit's own tokenizer is used throughout, so that every
engine gets the same tokens.

A server reports only its `top` likeliest tokens. The others are -inf in `logits`, and accuracy/measure.py knows what
that means.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lowbit.client import Post, get_object
from lowbit.errors import InputError
from lowbit.model.checkpoint import Checkpoint
from lowbit.runtime.base import Engine
from lowbit.runtime.server import Server

MOST_TOP = 4096  # log-probabilities a token that are asked for: JSON of some 100 bytes each
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_KV_BYTES = 2  # both servers keep keys and values in 16 bits unless told otherwise


class Dialect(ABC):
    """How one kind of server is spoken to, at `address`."""

    name: str

    def __init__(self, address: str) -> None:
        self.address = address

    @abstractmethod
    def version(self) -> str:
        """What the server calls its version."""

    @abstractmethod
    def stream(self, tokens: list[int], count: int) -> Post:
        """A request for `count` greedy tokens, streamed, not ending early."""

    @abstractmethod
    def read(self, event: dict[str, Any], known: int) -> list[int]:
        """The tokens that an event brings; `known` came before. -1 where the server skips telling one."""

    @abstractmethod
    def log_probabilities(self, tokens: list[int], rows: int, top: int) -> Tensor:
        """Float32 (rows, top or more entries, 2): for each of the last `rows` tokens, pairs of (token, log-probability)
        of what may follow it. Raises InputError if the server cannot."""


class ServedEngine(Engine):
    """`checkpoint` describes the model that is served (its config and tokenizer); `server` is ended by `stop`."""

    batch_invariant = True  # nothing is kept here between calls

    def __init__(self, checkpoint: Checkpoint, dialect: Dialect, server: Server | None = None) -> None:
        super().__init__()
        self.checkpoint, self.dialect, self._server = checkpoint, dialect, server
        self.address = dialect.address
        self.config = SimpleNamespace(**checkpoint.text_config)
        self.top = min(self.vocab_size, MOST_TOP)
        self.runtime = f"{dialect.name} {dialect.version()}"
        if self.top < self.vocab_size:
            self.runtime += f" (its {self.top} likeliest tokens)"
        self.kernels = {}
        self.weight_bytes, self.weight_bytes_per_token = _weights(checkpoint)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Log-probabilities (batch, tokens, vocabulary), -inf for tokens that the server does not report."""
        rows = []
        for window in tokens.tolist():
            pairs = self.dialect.log_probabilities(window, len(window), self.top)
            rows.append(_spread(pairs, self.vocab_size))
        return torch.stack(rows)

    def _stream(self, prompts: Tensor, max_new_tokens: int) -> Iterator[Tensor]:
        with ExitStack() as stack:
            posts = [stack.enter_context(self.dialect.stream(p, max_new_tokens)) for p in prompts.tolist()]
            sequences = [self._tokens(post, max_new_tokens) for post in posts]
            for together in zip(*sequences, strict=True):
                yield torch.tensor(together)

    def _tokens(self, post: Post, count: int) -> Iterator[int]:
        """Exactly `count` tokens of one stream."""
        seen = 0
        for event in post.events():
            for token in self.dialect.read(event, seen)[: count - seen]:
                seen += 1
                yield token
            if seen == count:
                return  # the closing words need not be waited for
        raise InputError(f"{post.url}: {seen} tokens came of {count} that were asked for.")

    def reserve(self, tokens: int) -> None:
        """Nothing to do: the server was started with its context."""

    def _compute(self, tokens: list[int], _start: int, rows: int, logits: bool) -> tuple[Tensor | None, list[int]]:
        found = _spread(self.dialect.log_probabilities(tokens, rows, self.top if logits else 1), self.vocab_size)
        return found, found.argmax(-1).tolist()

    def kv_bytes(self, context: int) -> int:
        c = self.config
        heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
        width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        return int(2 * c.num_hidden_layers * heads * width * context * _KV_BYTES)

    def peak_memory(self) -> int:
        return 0 if self._server is None else self._server.peak_memory()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()


def _spread(pairs: Tensor, vocabulary: int) -> Tensor:
    """Pairs (rows, entries, 2) as rows over the vocabulary. Double precision holds a token's number exactly."""
    rows = torch.full((len(pairs), vocabulary), -torch.inf, dtype=torch.float32)
    return rows.scatter_(1, pairs[..., 0].long(), pairs[..., 1].float())


def _weights(checkpoint: Checkpoint) -> tuple[int, int]:
    """Bytes of all weights as stored, and of those that one token reads: of an untied embedding table, one row."""
    total = checkpoint.nbytes
    found = [t for name, t in checkpoint.tensors.items() if name.endswith(_EMBEDDINGS)]
    if not found or checkpoint.text_config.get("tie_word_embeddings"):
        return total, total
    row = found[0].nbytes // max(1, found[0].shape[0])
    return total, total - found[0].nbytes + row


class LlamaCpp(Dialect):
    """llama-server's own /completion."""

    name = "llama.cpp"

    def version(self) -> str:
        said = get_object(f"{self.address}/props") or {}
        return str(said.get("build_info", "unknown"))

    def stream(self, tokens: list[int], count: int) -> Post:
        words = {"n_predict": count, "stream": True, "ignore_eos": True, "return_tokens": True, "cache_prompt": False}
        return Post(f"{self.address}/completion", {"prompt": tokens, "temperature": 0} | words)

    def read(self, event: dict[str, Any], known: int) -> list[int]:
        """Tokens that end within a character come with the next whole one, uncounted but for the total."""
        tokens = [int(t) for t in event.get("tokens") or []]
        skipped = int(event.get("tokens_predicted", 0)) - known - len(tokens)
        return [-1] * skipped + tokens

    def log_probabilities(self, tokens: list[int], rows: int, top: int) -> Tensor:
        """One request a token, since llama-server does not say what it thinks of a prompt's own tokens; each finds the
        prompt before it in the cache."""
        found = []
        for end in range(len(tokens) - rows + 1, len(tokens) + 1):
            words = {"n_predict": 1, "n_probs": top, "temperature": 0, "cache_prompt": True}
            with Post(f"{self.address}/completion", {"prompt": tokens[:end]} | words) as post:
                reply = post.json()
            try:
                likely = reply["completion_probabilities"][0]["top_logprobs"]
                found.append([(entry["id"], entry["logprob"]) for entry in likely])
            except (LookupError, TypeError) as error:
                raise InputError(f"{post.url}: this llama-server gives no log-probabilities.") from error
        return torch.tensor(found, dtype=torch.float64)


class VLLM(Dialect):
    """vLLM's additions to /v1/completions."""

    name = "vLLM"

    def __init__(self, address: str, model: str) -> None:
        super().__init__(address)
        self.model = model

    def version(self) -> str:
        return str((get_object(f"{self.address}/version") or {}).get("version", "unknown"))

    def _post(self, tokens: list[int], words: dict[str, Any]) -> Post:
        body = {"model": self.model, "prompt": tokens, "temperature": 0, "add_special_tokens": False}
        return Post(f"{self.address}/v1/completions", body | words)

    def stream(self, tokens: list[int], count: int) -> Post:
        return self._post(tokens, {"max_tokens": count, "ignore_eos": True, "stream": True, "return_token_ids": True})

    def read(self, event: dict[str, Any], _known: int) -> list[int]:
        choices = event.get("choices") or [{}]
        return [int(t) for t in choices[0].get("token_ids") or []]

    def log_probabilities(self, tokens: list[int], rows: int, top: int) -> Tensor:
        """All at once: entry i + 1 of a prompt's log-probabilities is what was expected after token i. One token more
        is sent, so that the last has an entry too. The token that came is among them even if it was unlikely."""
        with self._post([*tokens, 0], {"max_tokens": 1, "prompt_logprobs": top}) as post:
            reply = post.json()
        try:
            entries = reply["choices"][0]["prompt_logprobs"][-rows:]
            found = [[(int(token), e["logprob"]) for token, e in entry.items()] for entry in entries]
        except (LookupError, TypeError, AttributeError) as error:
            raise InputError(
                f"{post.url}: this server does not give the log-probabilities of a prompt (prompt_logprobs), without "
                "which accuracy cannot be measured. lowbit's, vLLM and llama-server do."
            ) from error
        width = max(map(len, found))
        return torch.tensor([row + row[:1] * (width - len(row)) for row in found], dtype=torch.float64)


class Lowbit(VLLM):
    """`lowbit serve`, which takes vLLM's additions."""

    name = "lowbit"
