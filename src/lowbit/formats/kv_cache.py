"""How a directory says that its keys and values are cached in few bits.

compressed-tensors carries stored scales: `kv_cache_scheme` in quantization_config and, beside each layer's projections,

    k_scale, v_scale    float32, [1] or one for each key-value head (heads, 1, 1)

Scales found at run time, and any cache under another quant_method, are said by one word of config.json that other
engines do not read (they then keep 16 bits): `"lowbit_kv_cache": "int4"`. The tensors are the same. Another such word,
`"lowbit_attention_products": "int8"`, says that attention multiplies in int8.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.console import note
from lowbit.errors import InputError
from lowbit.kv_scheme import GROUP, KvScheme

OWN_WORD = "lowbit_kv_cache"
PRODUCTS_WORD = "lowbit_attention_products"
_STRATEGIES = {"tensor": "tensor", "head": "attn_head"}


@dataclass(frozen=True)
class KvCache:
    """A scheme, and for each layer in order what keys and values are divided by (nothing where that is found later)."""

    scheme: KvScheme
    scales: tuple[tuple[Tensor, Tensor], ...] = ()

    @property
    def words(self) -> str:
        """For the line that says what computes."""
        where = {"tensor": "layer", "head": "head", "token": "token and head", "group": f"{GROUP} channels of a token"}
        kind = "stored scale" if self.scheme.static else "scale"
        return f"{self.scheme.family} KV cache (a {kind} per {where[self.scheme.granularity]})"


def write_config(config: Mapping[str, Any], scheme: KvScheme | None, *, products: bool = False) -> Mapping[str, Any]:
    """config.json's words with the cache's scheme and attention's products in them."""
    if products:
        config = {**config, PRODUCTS_WORD: "int8"}
    if scheme is None:
        return config
    quantization = config.get("quantization_config") or {}
    if scheme.static and quantization.get("quant_method") == "compressed-tensors":
        return {**config, "quantization_config": {**quantization, "kv_cache_scheme": _arguments(scheme)}}
    return {**config, OWN_WORD: str(scheme)}


def _arguments(scheme: KvScheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": scheme.kind,
        "symmetric": True,
        "strategy": _STRATEGIES[scheme.granularity],
        "group_size": None,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def scheme_of(config: Mapping[str, Any]) -> KvScheme | None:
    """What config.json says, or None for a cache of 16 bits. Raises InputError for what lowbit cannot read."""
    if OWN_WORD in config:
        return KvScheme.parse(str(config[OWN_WORD]))
    said = (config.get("quantization_config") or {}).get("kv_cache_scheme")
    if not said:
        return None
    granularity = {v: k for k, v in _STRATEGIES.items()}.get(said.get("strategy"))
    known = (said.get("type"), said.get("num_bits")) in (("float", 8), ("int", 8), ("int", 4))
    if granularity is None or not known or said.get("dynamic") or not said.get("symmetric", True):
        raise InputError(
            f"cannot read a kv_cache_scheme of {said.get('num_bits')}-bit {said.get('type')} with strategy "
            f"{said.get('strategy')!r}, dynamic={said.get('dynamic')}. `--kv none` leaves the cache in 16 bits."
        )
    return KvScheme(said["type"], said["num_bits"], granularity)  # type: ignore[arg-type]


def pack(attention: str, k_scale: Tensor, v_scale: Tensor) -> dict[str, Tensor]:
    """The tensors of one layer, whose attention module's tensors begin with `attention`."""
    return {f"{attention}.k_scale": k_scale.clone(), f"{attention}.v_scale": v_scale.clone()}


def unpack(
    scheme: KvScheme, attentions: Sequence[str], heads: int, get: Callable[[str], Tensor], source: str
) -> KvCache:
    """The stored scales of every layer, whose attention has so many query `heads`.

    Raises InputError for scales that are missing or are none; says aloud where all of them are 1, which is what tools
    write that did not calibrate.
    """
    if not scheme.static:
        return KvCache(scheme)
    scales = []
    for name in attentions:
        pair = []
        for tail in ("k_scale", "v_scale"):
            try:
                scale = get(f"{name}.{tail}").float().flatten()
            except KeyError as error:
                raise InputError(
                    f"{source}: the config promises stored scales of the key-value cache, and {name}.{tail} is in no "
                    "shard. Quantize again with --kv, or leave the cache in 16 bits with --kv none."
                ) from error
            shared = scale.numel() > 0 and heads % scale.numel() == 0
            if not shared or not bool((torch.isfinite(scale) & (scale > 0)).all()):
                raise InputError(
                    f"{source}: {name}.{tail} is {scale.tolist()[:8]}: expected a positive number, or one for each "
                    f"key-value head ({heads} query heads share them)."
                )
            pair.append(scale)
        scales.append((pair[0], pair[1]))
    if scales and all(bool((s == 1).all()) for pair in scales for s in pair):
        note(f"warning: {source}: every scale of the key-value cache is 1.0: it was most likely never calibrated.")
    return KvCache(scheme, tuple(scales))
