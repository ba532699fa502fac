"""The engine for speed: lowbit's own decoder and kernels (runtime/decoder.py, kernels/), one native call a step.

Activations of an a16 scheme are rounded to int8 in groups of 32 columns on their way into an integer product, and an
unquantized head of a quantized model to int8 weights, one scale a row: both are part of what `evaluate` measures. A
w8a8 scheme uses one scale per token, as it says. The embedding stays in its file; pages come when rows are read. Keys
and values are cached as halves, or as the model or its user asks; an int8 cache rounds the query of a single token to
15 bits, so there a token's logits depend (in the last digits) on whether it came alone.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.algorithms.rtn import rtn
from lowbit.errors import InputError
from lowbit.formats.kv_cache import KvCache
from lowbit.kernels import pack
from lowbit.kernels.pack import PackedWeight
from lowbit.model.load import Source
from lowbit.numerics import fixed_table
from lowbit.runtime.base import Engine
from lowbit.runtime.decoder import FAMILIES, Decoder
from lowbit.scheme import Scheme, TensorScheme

_CHUNK = 512  # prompt tokens a call
_CACHE_TOKENS = 2048  # the least the cache is made for
_MOST_CACHE_TOKENS = 2**31 - 32  # the core counts them in 32 bits
_BITS = (2, 3, 4, 8)
_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"
_ROW_INT8 = TensorScheme("int", 8, "channel")


def why_not(config: Any, schemes: Mapping[str, Scheme], *, rotated: bool = False) -> str | None:
    """None if the native decoder can run this model, else the reason it cannot."""
    if pack.native is None:
        return "lowbit was installed without its compiled kernels (no C++ compiler was found)"
    if config.model_type not in FAMILIES:
        return f"the native decoder does not know model_type {config.model_type!r}"
    if rotated:
        return "there is no native kernel for rotated weights"
    for name, scheme in schemes.items():
        weight = scheme.weight
        if name == _EMBEDDING and (weight != _ROW_INT8 or config.hidden_size % 4):
            return f"the native decoder reads embeddings in w8a16-channel, not {scheme}"
        table = weight is not None and weight.kind in ("nf", "learned", "midrise") and weight.bits == 4
        if weight is None or not (table or (weight.kind == "int" and weight.bits in _BITS)):
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

    def __init__(self, config: Any, source: Source, kv: KvCache | None = None) -> None:
        reason = why_not(config, source.schemes, rotated=source.rotated)
        if reason is not None:
            raise ValueError(reason)
        super().__init__()
        self.checkpoint, self.config, self._source, self._kv = source.checkpoint, config, source, kv
        self.batch_invariant = kv is None or kv.scheme.family != "int8"
        whole_token = any(s.activation is not None for s in source.schemes.values())
        self._act_group = 0 if whole_token else 32
        self._packed: dict[str, PackedWeight] = {}
        self._tensors: dict[str, Tensor] = {}
        self._cache_tokens = 0
        self._decoder = self._resize(min(_CACHE_TOKENS, self.context_length))
        activations = "int8 activations" if self._quantized else "bfloat16"
        head = ", int8 head" if self._rounds_head else ""
        cache = "" if kv is None else f", {kv.words}"
        self.runtime = f"lowbit, {pack.native.isa()}, {activations}{head}{cache}"
        self.kernels = {f"native {kind}": n for kind, n in self._quantized.items()}
        embedding = self._tensors[f"{_EMBEDDING}.weight"]
        rest = sum(t.nbytes for name, t in self._tensors.items() if name != f"{_EMBEDDING}.weight")
        self.weight_bytes_per_token = self._decoder.weight_bytes + rest + embedding.nbytes // len(embedding)
        self.weight_bytes = self._decoder.weight_bytes + rest + embedding.nbytes

    @property
    def _rounds_head(self) -> bool:
        """In a quantized model a head that was left alone would be a large part of what a token reads."""
        return bool(self._source.schemes) and _HEAD not in self._source.schemes

    def make_decoder(self, cache_tokens: int) -> Decoder:
        """A decoder over this engine's weights with a cache of its own, of so many tokens.

        Raises InputError if memory does not hold the cache.
        """
        scale = self._tensor(f"{_EMBEDDING}.weight_scale").flatten() if _EMBEDDING in self._source.schemes else None
        try:
            if cache_tokens > _MOST_CACHE_TOKENS:
                raise MemoryError
            return Decoder(
                self.config, self._weight, self._tensor, embedding_scale=scale, kv_tokens=cache_tokens,
                max_tokens=_CHUNK, max_position=min(cache_tokens, self.context_length), act_group=self._act_group,
                kv="fp16" if self._kv is None else self._kv.scheme.family,
                kv_scales=() if self._kv is None else self._kv.scales,
            )  # fmt: skip
        except (RuntimeError, MemoryError) as error:
            if "memory" not in str(error) and not isinstance(error, MemoryError):
                raise
            raise InputError(
                f"memory does not hold a key-value cache of {cache_tokens} tokens: ask for fewer tokens or sequences."
            ) from error

    def _resize(self, cache_tokens: int) -> Decoder:
        self._held, self._cache_tokens = [], cache_tokens
        return self.make_decoder(cache_tokens)

    @property
    def _quantized(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for weight in self._packed.values():
            if weight.kind != pack.BF16:
                kind = f"int{weight.bits}" if weight.kind == pack.INT else "table4"
                counts[kind] = counts.get(kind, 0) + 1
        return counts

    def _weight(self, name: str) -> PackedWeight:
        """A linear in the kernels' layout, packed once."""
        if name not in self._packed:
            checkpoint, quantized = self._source.checkpoint, self._source.linear(name)
            bias = checkpoint.get(f"{name}.bias") if f"{name}.bias" in checkpoint.tensors else None
            if quantized is None:
                self._packed[name] = self._pack_unquantized(name, bias)
                return self._packed[name]
            table = fixed_table(quantized.scheme) if quantized.table is None else quantized.table
            if table is not None:
                self._packed[name] = pack.pack_table(
                    quantized.codes, quantized.scale, table, bias=bias, act_group=self._act_group
                )
            else:
                scale, zero = quantized.scale, quantized.zero_point
                if quantized.scheme.granularity == "tensor":
                    rows = len(quantized.codes)
                    scale, zero = scale.expand(rows, 1), None if zero is None else zero.expand(rows, 1)
                self._packed[name] = pack.pack_int(
                    quantized.codes, scale, zero, bits=quantized.scheme.bits, bias=bias, act_group=self._act_group
                )
        return self._packed[name]

    def _pack_unquantized(self, name: str, bias: Tensor | None) -> PackedWeight:
        """A linear that is stored as it was: bf16, but the head of a quantized model becomes int8, row by row."""
        tied = f"{name}.weight" not in self._source.checkpoint.tensors  # only the head may share the embedding's weight
        weight = self._source.checkpoint.mapped(f"{_EMBEDDING if tied else name}.weight")
        if name != _HEAD or not self._rounds_head:
            return pack.pack_bf16(weight, bias=bias)
        parts = [rtn(rows.float(), _ROW_INT8, torch.float32) for rows in weight.split(2048)]
        codes, scale = torch.cat([p.codes for p in parts]), torch.cat([p.scale for p in parts])
        return pack.pack_int(codes, scale, bits=8, bias=bias, act_group=self._act_group)

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            checkpoint = self._source.checkpoint
            if name != f"{_EMBEDDING}.weight":
                self._tensors[name] = checkpoint.get(name)
            elif _EMBEDDING in self._source.schemes:  # 8-bit codes fill their words: the bytes are the rows
                self._tensors[name] = checkpoint.mapped(f"{_EMBEDDING}.weight_packed").view(torch.uint8)
            else:
                self._tensors[name] = checkpoint.mapped(name)
        return self._tensors[name]

    def _reserve(self, sequences: int, tokens: int) -> None:
        """Make room in the cache for so many sequences of so many tokens."""
        block = self._decoder.kv_block
        needed = sequences * -(-tokens // block) * block
        if needed > self._cache_tokens:
            self._decoder = self._resize(needed)

    def reserve(self, tokens: int) -> None:
        if tokens > self._cache_tokens:  # twice as much, so that a growing conversation is seldom computed anew
            self._reserve(1, min(max(tokens, 2 * self._cache_tokens), self.context_length))

    def _compute(self, tokens: list[int], start: int, rows: int, logits: bool) -> tuple[Tensor | None, list[int]]:
        table = self._decoder.linear_table(1)
        ids = torch.tensor(tokens[start:], dtype=torch.int32)
        head = len(ids) - rows if rows > 1 else (len(ids) - 1) // _CHUNK * _CHUNK  # read before the rows asked for
        if head:
            self._prefill(ids[:head], table, start)
        tail = [(len(ids) - head, start + head, len(ids) - head == 1)]
        out, best = self._decoder.forward(ids[head:], tail, table, every=rows > 1, logits=logits)
        return out, best.tolist()

    def logits(self, tokens: Tensor) -> Tensor:
        self._held = []
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
            self._held = []  # the cache is not what another call since may have left there
            _, tokens = decoder.forward(tokens, [(1, position, True)] * batch, tables, logits=False)
            yield tokens.long()

    def _prefill(self, prompt: Tensor, table: Tensor, position: int = 0) -> Tensor:
        """Read tokens that stand from `position` on, in chunks; the token (1,) that follows them."""
        token = prompt[:0]
        for start in range(0, len(prompt), _CHUNK):
            chunk = prompt[start : start + _CHUNK]
            _, token = self._decoder.forward(chunk, [(len(chunk), position + start, False)], table, logits=False)
        return token

    def kv_bytes(self, context: int) -> int:
        layers = int(self.config.num_hidden_layers)
        return int(self._decoder.kv_bytes) * layers * context // self._cache_tokens
