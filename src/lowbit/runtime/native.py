"""The engine for speed: lowbit's own decoder and kernels (runtime/decoder.py, kernels/), one native call a step.

Activations of an a16 scheme are rounded to int8 in groups of 32 columns on their way into an integer product; that is
part of what `evaluate` measures. A w8a8 scheme uses one scale per token, as it says.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.kernels import pack
from lowbit.kernels.pack import PackedWeight
from lowbit.model.load import Source
from lowbit.runtime.base import Engine
from lowbit.runtime.decoder import FAMILIES, Decoder
from lowbit.scheme import Scheme

_CHUNK = 512  # prompt tokens a call
_CACHE_TOKENS = 2048  # the least the cache is made for
_BITS = (2, 3, 4, 8)


def why_not(config: Any, schemes: Mapping[str, Scheme]) -> str | None:
    """None if the native decoder can run this model, else the reason it cannot."""
    if pack.native is None:
        return "lowbit was installed without its compiled kernels (no C++ compiler was found)"
    if config.model_type not in FAMILIES:
        return f"the native decoder does not know model_type {config.model_type!r}"
    for scheme in schemes.values():
        weight = scheme.weight
        if weight is None or weight.kind != "int" or weight.bits not in _BITS:
            return f"there is no native kernel for {scheme}"
        if weight.granularity == "group" and weight.group_size % 32:
            return f"there is no native kernel for groups of {weight.group_size} (multiples of 32 only)"
        if scheme.activation is not None and (scheme.static or scheme.activation.kind != "int"):
            return f"there is no native kernel for the activations of {scheme}"
    if len({s.activation for s in schemes.values()}) > 1:
        return "the native decoder takes one kind of activations for the whole model"
    return None


class NativeEngine(Engine):
    """Raises ValueError where `why_not` gives a reason."""

    def __init__(self, config: Any, source: Source) -> None:
        reason = why_not(config, source.schemes)
        if reason is not None:
            raise ValueError(reason)
        self.checkpoint, self.config, self._source = source.checkpoint, config, source
        whole_token = any(s.activation is not None for s in source.schemes.values())
        self._act_group = 0 if whole_token else 32
        self._packed: dict[str, PackedWeight] = {}
        self._tensors: dict[str, Tensor] = {}
        self._cache_tokens = 0
        self._decoder = self._make(min(_CACHE_TOKENS, self.context_length))
        activations = "int8 activations" if self._quantized else "bfloat16"
        self.runtime = f"lowbit, {pack.native.isa()}, {activations}"
        self.kernels = {f"native int{bits}": n for bits, n in self._quantized.items()}
        embedding = self._tensors["model.embed_tokens.weight"]
        rest = sum(t.nbytes for name, t in self._tensors.items() if name != "model.embed_tokens.weight")
        self.weight_bytes_per_token = self._decoder.weight_bytes + rest + embedding.nbytes // len(embedding)
        self.weight_bytes = self._decoder.weight_bytes + rest + embedding.nbytes

    def _make(self, cache_tokens: int) -> Decoder:
        self._cache_tokens = cache_tokens
        return Decoder(
            self.config, self._weight, self._tensor, kv_tokens=cache_tokens, max_tokens=_CHUNK,
            max_position=min(cache_tokens, self.context_length), act_group=self._act_group,
        )  # fmt: skip

    @property
    def _quantized(self) -> dict[int, int]:
        counts: dict[int, int] = {}
        for weight in self._packed.values():
            if weight.kind == pack.INT:
                counts[weight.bits] = counts.get(weight.bits, 0) + 1
        return counts

    def _weight(self, name: str) -> PackedWeight:
        """A linear in the kernels' layout, packed once."""
        if name not in self._packed:
            stored = self._source.checkpoint.tensors
            bias = self._source.checkpoint.get(f"{name}.bias") if f"{name}.bias" in stored else None
            quantized = self._source.linear(name)
            if quantized is not None:
                scale, zero = quantized.scale, quantized.zero_point
                if quantized.scheme.granularity == "tensor":
                    rows = len(quantized.codes)
                    scale, zero = scale.expand(rows, 1), None if zero is None else zero.expand(rows, 1)
                self._packed[name] = pack.pack_int(
                    quantized.codes, scale, zero, bits=quantized.scheme.bits, bias=bias, act_group=self._act_group
                )
            else:
                tied = f"{name}.weight" not in stored  # only the head may share the embedding's weight
                weight = self._source.checkpoint.get("model.embed_tokens.weight" if tied else f"{name}.weight")
                self._packed[name] = pack.pack_bf16(weight, bias=bias)
        return self._packed[name]

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            self._tensors[name] = self._source.checkpoint.get(name)
        return self._tensors[name]

    def _reserve(self, sequences: int, tokens: int) -> None:
        """Make room in the cache for so many sequences of so many tokens."""
        block = self._decoder.kv_block
        needed = sequences * -(-tokens // block) * block
        if needed > self._cache_tokens:
            self._decoder = self._make(needed)

    def logits(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        self._reserve(1, length)
        rows = []
        for sequence in tokens:
            parts = []
            for start in range(0, length, _CHUNK):
                chunk = sequence[start : start + _CHUNK]
                out, _ = self._decoder.forward(
                    chunk, [(len(chunk), start, False)], self._decoder.linear_table(1), every=True
                )
                assert out is not None
                parts.append(out)
            rows.append(torch.cat(parts))
        return torch.stack(rows)

    def _stream(self, prompts: Tensor, max_new_tokens: int) -> Iterator[Tensor]:
        batch, length = prompts.shape
        self._reserve(batch, length + max_new_tokens)
        decoder, tables = self._decoder, self._decoder.linear_table(batch)
        tokens = torch.cat([self._prefill(prompt, tables[i : i + 1]) for i, prompt in enumerate(prompts)])
        yield tokens.long()
        for position in range(length, length + max_new_tokens - 1):
            _, tokens = decoder.forward(tokens, [(1, position, True)] * batch, tables, logits=False)
            yield tokens.long()

    def _prefill(self, prompt: Tensor, table: Tensor) -> Tensor:
        """Read one prompt in chunks; the token (1,) that follows it."""
        token = prompt[:0]
        for start in range(0, len(prompt), _CHUNK):
            chunk = prompt[start : start + _CHUNK]
            _, token = self._decoder.forward(chunk, [(len(chunk), start, False)], table, logits=False)
        return token

    def kv_bytes(self, context: int) -> int:
        layers = int(self.config.num_hidden_layers)
        return int(self._decoder.kv_bytes) * layers * context // self._cache_tokens
