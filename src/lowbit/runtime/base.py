"""What every engine is: a model ready to answer, and what it costs to ask it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from lowbit.environment import peak_memory
from lowbit.errors import InputError
from lowbit.model.checkpoint import Checkpoint
from lowbit.model.load import load_tokenizer
from lowbit.runtime import conversation
from lowbit.runtime.answer import Output
from lowbit.runtime.generate import check_tokens, generate
from lowbit.runtime.sampling import SamplingParams, sampling_params

Message = Mapping[str, str]


class Engine(ABC):
    """A loaded model. `runtime` names what computes; `config` is the text model's configuration."""

    checkpoint: Checkpoint
    config: Any
    runtime: str
    weight_bytes: int  # all weights as they are held in memory
    weight_bytes_per_token: int  # weights that one decoding step reads: of the embedding table, one row
    kernels: dict[str, int]  # how many quantized linears run on which kernel
    batch_invariant = False  # whether a token's logits are the same bits whatever else a call computes
    address: str | None = None  # the URL of the server that computes; None: this process does

    def __init__(self) -> None:
        self._held: list[int] = []  # the tokens whose keys and values `_compute` finds in the cache

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
        Nothing else may run on the engine until the stream is used up or dropped.
        Raises InputError if prompt and answer do not fit the context, the prompt is empty or has unknown tokens.
        """
        self._held = []
        check_tokens(prompts.flatten().tolist(), self.vocab_size)
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

    def peak_memory(self) -> int:
        """Peak resident set in bytes of what computes: this process, or a server (0 if it was not started here)."""
        return peak_memory()

    def stop(self) -> None:  # noqa: B027 (most engines have nothing to end)
        """End what was started for this engine. Harmless where nothing was."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type | None, _value: BaseException | None, _trace: TracebackType | None) -> None:
        self.stop()

    @abstractmethod
    def reserve(self, tokens: int) -> None:
        """Get ready for a sequence of so many tokens. Raises InputError if memory does not hold its cache."""

    @abstractmethod
    def _compute(self, tokens: list[int], start: int, rows: int, logits: bool) -> tuple[Tensor | None, list[int]]:
        """What `next_logits` says, where the keys and values of the first `start` tokens are in the cache."""

    def next_logits(self, tokens: list[int], rows: int, logits: bool) -> tuple[Tensor | None, list[int]]:
        """Float32 logits (rows, vocabulary) after each of the last `rows` tokens, and their argmax.

        Only tokens that differ from those of the last call are computed. Without `logits` the first may be None.
        """
        start = min(_common(self._held, tokens), len(tokens) - rows)
        self._held = []  # should the computation fail, nothing is held
        result = self._compute(tokens, start, rows, logits)
        self._held = list(tokens)
        return result

    def outputs(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        prompt_lookup: int = 0,
        **options: Any,
    ) -> Iterator[Output]:
        """The answer to a text or to tokens, one `Output` (token, text, log-probabilities) at a time.

        Args:
            params, options: see sampling.SamplingParams; options go by its names and take precedence.
            prompt_lookup: guess up to so many tokens ahead from the text itself (speculation.py).

        Raises InputError for a prompt that is empty or too long, unknown tokens, and options out of range.
        """
        tokens = conversation.encode(self.tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
        if not self.batch_invariant:
            self._held = []
        chosen = sampling_params(params, options)
        end = conversation.end_tokens(self.checkpoint, self.tokenizer)
        return generate(self, tokens, chosen, end=end, tokenizer=self.tokenizer, prompt_lookup=prompt_lookup)

    def stream_text(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, **options: Any
    ) -> Iterator[str]:
        """The same as pieces of text, as they become final."""
        return (output.text for output in self.outputs(prompt, params, **options) if output.text)

    def generate(self, prompt: str | Sequence[int], params: SamplingParams | None = None, **options: Any) -> str:
        """The text that continues `prompt`; greedy unless the options say otherwise, 64 tokens at most."""
        return "".join(self.stream_text(prompt, params, **options))

    def chat_tokens(self, messages: Sequence[Message]) -> list[int]:
        """A conversation ({"role", "content"} each) as tokens, by the model's own chat template.

        Raises InputError if the model has none, or if the template refuses the messages.
        """
        return conversation.chat_tokens(self.tokenizer, messages)

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None, **options: Any) -> str:
        """The model's next message in a conversation."""
        return self.generate(self.chat_tokens(messages), params, **options)


def _common(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])
