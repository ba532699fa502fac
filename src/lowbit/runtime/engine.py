"""Engine: a model ready to answer, and what it costs to ask it.

This engine is transformers' model class with lowbit's linears put in. `runtime` names what computes:

    auto        the kernels of runtime/linear.py, activations in bfloat16 where the CPU has it (else float32)
    bfloat16    the same model class, weights dequantized to bfloat16
    float32     weights dequantized exactly: the reference that differences are measured against
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowbit.errors import InputError
from lowbit.model.checkpoint import Checkpoint, open_checkpoint
from lowbit.model.load import (
    compute_dtype,
    load_tokenizer,
    materialize,
    open_source,
    skeleton,
)
from lowbit.model.walk import linears
from lowbit.numerics import fake_quantize_activation
from lowbit.runtime.linear import QuantizedLinear

Runtime = Literal["auto", "bfloat16", "float32"]


@dataclass
class Engine:
    checkpoint: Checkpoint
    model: Any
    runtime: str
    dtype: torch.dtype

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.checkpoint)

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def context_length(self) -> int:
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 2048))

    @torch.inference_mode()
    def logits(self, tokens: Tensor) -> Tensor:
        """Float32 logits (batch, tokens, vocabulary) of token ids (batch, tokens)."""
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits.float()

    @torch.inference_mode()
    def stream(self, prompts: Tensor, max_new_tokens: int) -> Iterator[Tensor]:
        """Greedy continuation of equally long prompts (batch, tokens): one (batch,) of token ids at a time.

        No early stop. The first item is there when the prompt has been read; each next one costs one step.
        Raises InputError if prompt and answer do not fit the context, the prompt is empty or has unknown tokens.
        """
        self._check(prompts, max_new_tokens)
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        step = prompts
        for _ in range(max_new_tokens):
            out = self.model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1)
            yield token
            step = token[:, None]

    def generate(self, prompt: str, max_new_tokens: int = 64) -> str:
        """The greedy continuation of a text, up to the end-of-text token."""
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        new: list[int] = []
        for token in self.stream(torch.tensor([ids], dtype=torch.long), max_new_tokens):
            if int(token) == self.tokenizer.eos_token_id:
                break
            new.append(int(token))
        return str(self.tokenizer.decode(new))

    def _check(self, prompts: Tensor, max_new_tokens: int) -> None:
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

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of all weights as they are held in memory."""
        return sum(_module_bytes(m) for m in self.model.modules()) - self._tied_bytes()

    @cached_property
    def weight_bytes_per_token(self) -> int:
        """Weight bytes that one decoding step reads: all but the embedding table, of which it reads one row."""
        embedding = self.model.get_input_embeddings().weight
        tied = self._tied_bytes() > 0
        return self.weight_bytes - (0 if tied else int(embedding.nbytes)) + int(embedding.nbytes) // len(embedding)

    def kv_bytes(self, context: int) -> int:
        """Bytes of keys and values that one step reads at a context of that many tokens, for one sequence."""
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * config.num_hidden_layers * heads * width * context * self.dtype.itemsize)

    def _tied_bytes(self) -> int:
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        tied = head is not None and getattr(head, "weight", None) is embedding.weight
        return int(embedding.weight.nbytes) if tied else 0

    @property
    def kernels(self) -> dict[str, int]:
        """How many quantized linears run on which kernel."""
        counts: dict[str, int] = {}
        for module in self.model.modules():
            if isinstance(module, QuantizedLinear):
                counts[module.kernel] = counts.get(module.kernel, 0) + 1
        return counts


def _module_bytes(module: nn.Module) -> int:
    if isinstance(module, QuantizedLinear):
        return module.bytes_read + (0 if module.bias is None else module.bias.nbytes)
    return sum(p.nbytes for p in module.parameters(recurse=False))


@torch.no_grad()
def load(model: str | Path | Checkpoint, runtime: Runtime = "auto") -> Engine:
    """Load a model directory, hub id, lowbit output or 'demo'. Raises InputError for everything wrong with it."""
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    dtype = {"auto": compute_dtype(), "bfloat16": torch.bfloat16, "float32": torch.float32}[runtime]
    net = skeleton(checkpoint)
    source = open_source(net, checkpoint)
    for name, module in linears(net).items():
        quantized = source.linear(name)
        if quantized is None:
            continue
        scheme = source.schemes[name]
        if runtime == "auto":
            bias = checkpoint.get(f"{name}.bias") if module.bias is not None else None
            net.set_submodule(name, QuantizedLinear(quantized, scheme, bias, dtype))
        elif scheme.activation is not None:
            grid = scheme.activation
            module.register_forward_pre_hook(lambda _m, args, g=grid: (fake_quantize_activation(args[0], g), *args[1:]))
    materialize(net, "", source, dtype)
    net.tie_weights()
    kernels = "+".join(sorted({m.kernel for m in net.modules() if isinstance(m, QuantizedLinear)}))
    name = f"transformers, {str(dtype).removeprefix('torch.')}" + (f", torch {kernels}" if kernels else "")
    return Engine(checkpoint, net, name, dtype)
