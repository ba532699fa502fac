"""What every engine is: a model ready to answer, and what it costs to ask it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.model.checkpoint import Checkpoint
from lowbit.model.load import load_tokenizer


class Engine(ABC):
    """A loaded model. `runtime` names what computes; `config` is the text model's configuration."""

    checkpoint: Checkpoint
    config: Any
    runtime: str
    weight_bytes: int  # all weights as they are held in memory
    weight_bytes_per_token: int  # weights that one decoding step reads: of the embedding table, one row
    kernels: dict[str, int]  # how many quantized linears run on which kernel

    @abstractmethod
    def logits(self, tokens: Tensor) -> Tensor:
        """Float32 logits (batch, tokens, vocabulary) of token ids (batch, tokens)."""

    @abstractmethod
    def kv_bytes(self, context: int) -> int:
        """Bytes of keys and values that one step reads at a context of that many tokens, for one sequence."""

    @abstractmethod
    def _stream(self, prompts: Tensor, max_new_tokens: int) -> Iterator[Tensor]: ...

    def stream(self, prompts: Tensor, max_new_tokens: int) -> Iterator[Tensor]:
        """Greedy continuation of equally long prompts (batch, tokens): one (batch,) of token ids at a time.

        No early stop. The first item is there when the prompt has been read; each next one costs one step.
        Raises InputError if prompt and answer do not fit the context, the prompt is empty or has unknown tokens.
        """
        if prompts.numel() == 0:
            raise InputError("the prompt is empty: give at least one token.")
        if int(prompts.max()) >= self.vocab_size or int(prompts.min()) < 0:
            raise InputError(
                f"the prompt has token {int(prompts.max())}, but the model knows 0 to {self.vocab_size - 1}."
            )
        if prompts.shape[1] + max_new_tokens > self.context_length:
            raise InputError(
                f"{prompts.shape[1]} prompt tokens and {max_new_tokens} new ones exceed the model's context of "
                f"{self.context_length}: shorten the prompt or ask for fewer."
            )
        return self._stream(prompts, max_new_tokens)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.checkpoint)

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)

    @property
    def context_length(self) -> int:
        return int(getattr(self.config, "max_position_embeddings", 2048))

    def generate(self, prompt: str, max_new_tokens: int = 64) -> str:
        """The greedy continuation of a text, up to the end-of-text token."""
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        new: list[int] = []
        for token in self.stream(torch.tensor([ids], dtype=torch.long), max_new_tokens):
            if int(token) == self.tokenizer.eos_token_id:
                break
            new.append(int(token))
        return str(self.tokenizer.decode(new))
