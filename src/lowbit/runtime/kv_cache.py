"""transformers' cache with few bits in it: what is stored are codes, what attention gets are their values.

Each layer rounds the keys and values that come in and keeps nothing else of them; all that are asked for are
dequantized, the newest too, so a token attends to its own rounded key just as later tokens will. Layers that see only a
window keep all tokens, as the native cache does; the mask hides the rest.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer, get_layer_types_and_kwargs

from lowbit.errors import InputError
from lowbit.formats.kv_cache import KvCache
from lowbit.kernels.reference import dequantize_groups, dequantize_rows, quantize_groups, quantize_rows
from lowbit.kv_scheme import GROUP, KvScheme
from lowbit.numerics import round_to_grid
from lowbit.scheme import TensorScheme

_PLAIN = {"full_attention", "sliding_attention", "chunked_attention"}


def make_cache(config: Any, kv: KvCache) -> Cache:
    """An empty cache for a model of this config. Raises InputError where a layer keeps other things than keys and
    values of every token."""
    kinds, _ = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    other = sorted(set(kinds) - _PLAIN)
    if other:
        raise InputError(
            f"a {kv.scheme} key-value cache is for layers that keep a key and a value of every token, and this model "
            f"has {', '.join(other)}: leave its cache in 16 bits (--kv none)."
        )
    scales = kv.scales or [(None, None)] * len(kinds)
    return Cache(layers=[QuantizedLayer(kv.scheme, k, v) for k, v in scales])


class QuantizedLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values. Scales [1] or (heads,), None where they are found for each token."""

    def __init__(self, scheme: KvScheme, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
        super().__init__()
        self.scheme, self.scales = scheme, (k_scale, v_scale)
        self.stored: list[tuple[Tensor, ...]] = []  # of keys, of values: (batch, heads, tokens, ...) each

    def update(self, k: Tensor, v: Tensor, *_args: Any, **_words: Any) -> tuple[Tensor, Tensor]:
        self.is_initialized = True
        new = [encode(x, self.scheme, scale) for x, scale in zip((k, v), self.scales, strict=True)]
        if self.stored:
            new = [
                tuple(torch.cat(both, 2) for both in zip(*pair, strict=True))
                for pair in zip(self.stored, new, strict=True)
            ]
        self.stored = new
        keys, values = (
            decode(parts, self.scheme, scale, x.shape[-1]).to(x.dtype)
            for parts, scale, x in zip(new, self.scales, (k, v), strict=True)
        )
        return keys, values

    def get_seq_length(self) -> int:
        return self.stored[0][0].shape[2] if self.stored else 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove and self.stored:
            self.stored = [tuple(t[:, :, : -abs(tokens_to_remove)] for t in parts) for parts in self.stored]

    def reset(self) -> None:
        self.stored, self.is_initialized = [], False

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for parts in self.stored for t in parts)


def encode(x: Tensor, scheme: KvScheme, scale: Tensor | None) -> tuple[Tensor, ...]:
    """What is stored of x (batch, heads, tokens, dim): codes (4-bit ones two a byte), and the scales found here."""
    lead, width = x.shape[:-1], x.shape[-1]
    if scheme.granularity == "token":
        codes, found = quantize_rows(x.reshape(-1, width), 0)
        return codes.view(x.shape), found.view(*lead, 1)
    if scheme.granularity == "group":
        codes, found, low = quantize_groups(x.reshape(-1, width), GROUP)
        return _pair(codes.view(x.shape)), found.view(*lead, -1), low.view(*lead, -1)
    assert scale is not None
    grid = TensorScheme(scheme.kind, scheme.bits, "tensor")
    values = round_to_grid(x.float(), scale.view(-1, 1, 1), None, grid)
    if scheme.kind == "float":
        return (values.to(torch.float8_e4m3fn),)
    return (_pair((values + 8).to(torch.uint8)),) if scheme.bits == 4 else (values.to(torch.int8),)


def decode(parts: tuple[Tensor, ...], scheme: KvScheme, scale: Tensor | None, width: int) -> Tensor:
    """The float32 values (batch, heads, tokens, width) that were stored."""
    codes, *found = parts
    lead = codes.shape[:-1]
    if scheme.granularity == "token":
        return dequantize_rows(codes.view(-1, width), found[0].view(-1, 1), 0).view(*lead, width)
    if scheme.granularity == "group":
        flat = [_unpair(codes, width).view(-1, width), *(f.reshape(-1, f.shape[-1]) for f in found)]
        return dequantize_groups(flat[0], flat[1], flat[2], GROUP).view(*lead, width)
    assert scale is not None
    values = _unpair(codes, width).float() - 8 if scheme.bits == 4 else codes.float()
    return values * scale.view(-1, 1, 1)


def _pair(codes: Tensor) -> Tensor:
    """uint8 codes 0 to 15 (..., n) -> (..., ceil(n / 2)), the first in the low nibble."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., 0::2] | codes[..., 1::2] << 4


def _unpair(packed: Tensor, width: int) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)[..., :width].contiguous()
