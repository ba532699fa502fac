"""Stored scales of a quantized key-value cache, found by calibration.

Keys and values are watched where the cache will stand: after the rotation of positions and after norms of heads, on the
batches that calibrate the weights, with the block's weights already quantized. A cache whose scales nobody computed
runs with 1.0, saturates or loses its small values, and says nothing (vllm#23813, llm-compressor#937): here a layer that
calibration never reached is an alarm.

    8 bits   scale = max|x| / qmax. On the demo model a smaller scale that clips a few keys costs more than it saves.
    4 bits   among fractions f of the maximum the one with the least Σ (x - Q(x; f max|x| / 7))²
"""

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lowbit.console import note
from lowbit.errors import InputError
from lowbit.formats.kv_cache import pack
from lowbit.kv_scheme import KvScheme
from lowbit.model.checkpoint import read_header
from lowbit.model.walk import Entry, attentions, linears
from lowbit.numerics import round_to_grid
from lowbit.scheme import TensorScheme
from lowbit.shards import read_tensor
from lowbit.tensor import InputGrid

_CACHE = ("past_key_values", "layer_past", "past_key_value")  # what blocks call it
_ENOUGH_TOKENS = 16384
_SAMPLE_STRIDE = 4  # one token in so many is kept for the search
_NORM = 2.0
_FRACTIONS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3)


@dataclass
class Seen:
    """What was seen of one layer's keys or of its values."""

    tokens: int = 0
    absmax: Tensor | None = None  # (heads, dim)
    sample: list[Tensor] = field(default_factory=list)  # (tokens, heads, dim) each

    def add(self, x: Tensor) -> None:
        """x (batch, heads, tokens, dim)."""
        rows = x.detach().float().transpose(1, 2).flatten(0, 1)
        top = rows.abs().amax(0)
        self.absmax = top if self.absmax is None else torch.maximum(self.absmax, top)
        self.tokens += len(rows)
        self.sample.append(rows[::_SAMPLE_STRIDE].clone())


class Watching(DynamicCache):  # type: ignore[misc]
    """A cache that keeps nothing and notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = Seen(), Seen()

    def update(self, k: Tensor, v: Tensor, *_args: Any, **_words: Any) -> tuple[Tensor, Tensor]:
        self.keys.add(k)
        self.values.add(v)
        return k, v


def watch(block: nn.Module, index: int, entries: Sequence[Entry], grids: Mapping[str, InputGrid]) -> tuple[Seen, Seen]:
    """Keys and values of a block, the index-th, on its first batches; `grids` round the inputs of its linears."""
    cache, mine = Watching(), threading.get_ident()

    def rounding(grid: InputGrid) -> Any:
        return lambda _m, args: (grid.round(args[0]), *args[1:]) if threading.get_ident() == mine else None

    modules = linears(block)
    handles = [modules[n].register_forward_pre_hook(rounding(g)) for n, g in grids.items()]
    try:
        for entry in entries:
            if entry.held_out or cache.keys.tokens >= _ENOUGH_TOKENS:
                continue
            arguments = [*entry.arguments[:index], _with_cache(block, entry, index, cache)]
            Entry(entry.hidden, arguments, keyword=entry.keyword, returns_tuple=entry.returns_tuple).run(block, index)
    finally:
        for handle in handles:
            handle.remove()
    return cache.keys, cache.values


def _with_cache(block: nn.Module, entry: Entry, index: int, cache: Watching) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The block's arguments with `cache` among them, by place or by name as it takes them."""
    args, words = entry.arguments[index]
    parameters = inspect.signature(block.forward).parameters
    word = next((w for w in _CACHE if w in parameters), _CACHE[0])
    if word in parameters:
        place = list(parameters).index(word) - (entry.keyword is None)  # hidden states go before `args`
        if place < len(args):
            return (*args[:place], cache, *args[place + 1 :]), words
    elif not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise InputError(f"{type(block).__name__} takes no cache of keys and values: leave --kv out.")
    return args, words | {word: cache}


def block_scales(
    block: nn.Module, name: str, index: int, entries: Sequence[Entry], grids: Mapping[str, InputGrid], scheme: KvScheme,
    stored_module: Callable[[str], str],
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors to store for block `name`, the index-th, whose weights are quantized by now; none for a scheme that
    finds its scales at run time. Raises InputError for attention that cannot be watched."""
    if not scheme.static:
        return {}
    found = [n for n in attentions(block) if n]
    if len(found) != 1:
        raise InputError(f"{name}: --kv {scheme} needs one attention module, found {len(found)}: leave --kv out.")
    keys, values = watch(block, index, entries, grids)
    if not keys.tokens:
        raise InputError(f"{name}: its attention keeps no keys and values that lowbit can see: leave --kv out.")
    return pack(stored_module(f"{name}.{found[0]}"), scale_of(keys, scheme), scale_of(values, scheme))


def scale_of(seen: Seen, scheme: KvScheme) -> Tensor:
    """float32, [1] or (heads, 1, 1). It is 1 where calibration saw nothing but zeros, or no finite number:
    `kv_report` finds that."""
    assert seen.absmax is not None
    top = seen.absmax.amax(1)  # of each head
    top = torch.where(torch.isfinite(top) & (top > 0), top, torch.zeros_like(top))
    if scheme.granularity == "tensor":
        top = top.amax().reshape(1)
    if scheme.bits == 4:
        top = top * _fraction(torch.cat(seen.sample), top, scheme)
    scale = torch.where(top > 0, top / scheme.qmax, torch.ones_like(top))
    return scale if scheme.granularity == "tensor" else scale.view(-1, 1, 1)


def _fraction(sample: Tensor, top: Tensor, scheme: KvScheme) -> Tensor:
    """Which fraction of `top` (heads or 1,) rounds the sample (tokens, heads, dim) with the least error."""
    grid = TensorScheme("int", scheme.bits, "tensor")
    errors = []
    for fraction in _FRACTIONS:
        scale = (top.clamp(min=1e-30) * fraction / scheme.qmax)[None, :, None]
        error = (sample - round_to_grid(sample, scale, None, grid) * scale).abs().pow(_NORM).sum((0, 2))
        errors.append(error if len(top) > 1 else error.sum(0, keepdim=True))
    return torch.tensor(_FRACTIONS)[torch.stack(errors).argmin(0)]


def kv_report(scheme: KvScheme, path: Path) -> dict[str, Any]:
    """What was stored, for the manifest: {scheme, layers[{name, k_scale, v_scale}], alarms[]}, scales as [least, most]
    over the heads."""
    layers, alarms = [], []
    for file in sorted(path.glob("model-*.safetensors")):
        infos = read_header(file)
        for name in sorted(n.removesuffix(".k_scale") for n in infos if n.endswith(".k_scale")):
            row: dict[str, Any] = {"name": name}
            for tail in ("k_scale", "v_scale"):
                info = infos[f"{name}.{tail}"]
                scale = read_tensor(file, info.start, info.dtype, info.shape)
                row[tail] = [float(scale.min()), float(scale.max())]
                if bool((scale == 1).any()):
                    alarms.append(f"{name}.{tail}: calibration saw nothing but zeros there, so a scale is 1.0")
            layers.append(row)
    if scheme.static and not layers:
        alarms.append("no scale is stored: calibration reached no attention")
    for alarm in alarms:
        note(f"alarm: {alarm}")
    return {"scheme": str(scheme), "layers": layers, "alarms": alarms}
