"""The engine for everything: transformers' own model class with lowbit's linears put in."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from lowbit.formats.kv_cache import KvCache
from lowbit.model.load import Source, materialize
from lowbit.model.walk import linears
from lowbit.runtime.base import Engine
from lowbit.runtime.kv_cache import make_cache
from lowbit.runtime.linear import QuantizedLinear
from lowbit.runtime.rotated import RotatedLinear, carries

_LowBit = QuantizedLinear | RotatedLinear


class GeneralEngine(Engine):
    """`net` is the architecture without weights. With `kernels`, quantized linears compute from their stored bits;
    without, they are dequantized to `dtype` and only the activations are rounded as the scheme says. With `kv`, keys
    and values go through a quantized cache, also where logits of a whole text are asked for."""

    def __init__(
        self, net: Any, source: Source, dtype: torch.dtype, *, kernels: bool, kv: KvCache | None = None
    ) -> None:
        super().__init__()
        self._cache: Cache | None = None
        self._kv = kv
        self.checkpoint, self.net, self.dtype = source.checkpoint, net, dtype
        self.config = net.config.get_text_config()
        for name, module in linears(net).items():
            quantized = source.linear(name)
            if quantized is None:
                continue
            grid = source.input_grid(name)
            if kernels:
                bias = source.checkpoint.get(f"{name}.bias") if module.bias is not None else None
                net.set_submodule(
                    name,
                    RotatedLinear(quantized, bias, dtype)
                    if carries(quantized, source.schemes[name])
                    else QuantizedLinear(quantized, source.schemes[name], bias, dtype, grid),
                )
            elif grid is not None:
                module.register_forward_pre_hook(lambda _m, args, g=grid: (g.round(args[0]), *args[1:]))
        materialize(net, "", source, dtype)
        net.tie_weights()
        self.kernels = {}
        for module in net.modules():
            if isinstance(module, _LowBit):
                self.kernels[module.kernel] = self.kernels.get(module.kernel, 0) + 1
        self.runtime = ", ".join(["transformers", str(dtype).removeprefix("torch."), *_kernel_names(self.kernels)])
        if kv is not None:
            self._new_cache()  # refuse now
            self.runtime += f", {kv.words}"
        embedding, head = net.get_input_embeddings().weight, net.get_output_embeddings()
        tied = head is not None and getattr(head, "weight", None) is embedding
        self.weight_bytes = sum(_module_bytes(m) for m in net.modules()) - (embedding.nbytes if tied else 0)
        row = embedding.nbytes // len(embedding)
        self.weight_bytes_per_token = self.weight_bytes - (0 if tied else embedding.nbytes) + row

    def _new_cache(self) -> Cache:
        return DynamicCache(config=self.net.config) if self._kv is None else make_cache(self.net.config, self._kv)

    @torch.inference_mode()
    def logits(self, tokens: Tensor) -> Tensor:
        cache = {} if self._kv is None else {"past_key_values": self._new_cache()}
        logits: Tensor = self.net(input_ids=tokens, use_cache=bool(cache), **cache).logits
        return logits.float()

    @torch.inference_mode()
    def _stream(self, prompts: Tensor, max_new_tokens: int) -> Iterator[Tensor]:
        cache = self._new_cache()
        step = prompts
        for _ in range(max_new_tokens):
            out = self.net(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1)
            yield token
            step = token[:, None]

    def reserve(self, tokens: int) -> None:
        """Nothing to do: transformers' cache grows as it is used."""

    @torch.inference_mode()
    def _compute(self, tokens: list[int], start: int, rows: int, logits: bool) -> tuple[Tensor | None, list[int]]:
        cache = self._rewound(start)
        ids = torch.tensor([tokens[start if cache is self._cache else 0 :]])
        out = self.net(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=rows).logits[0].float()
        self._cache = cache
        return out if logits else None, out.argmax(-1).tolist()

    def _rewound(self, length: int) -> Cache:
        """The cache cut to its first `length` tokens, or a new one where it cannot be cut (sliding windows)."""
        cache = self._cache
        surplus = 0 if cache is None else cache.get_seq_length() - length
        if cache is None or length == 0 or surplus < 0 or (surplus and any(cache.is_sliding)):
            return self._new_cache()
        if surplus:
            cache.crop(-surplus)
        return cache

    def kv_bytes(self, context: int) -> int:
        c = self.config
        heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
        width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        bits = 8 * self.dtype.itemsize if self._kv is None else self._kv.scheme.bits_per_value(width)
        return int(2 * c.num_hidden_layers * heads * width * context * bits / 8)


def _kernel_names(kernels: Iterable[str]) -> list[str]:
    """int4, int8, native e8p2 -> "torch int4+int8", "native e8p2"."""
    own = sorted(k for k in kernels if k.startswith("native "))
    others = "+".join(sorted(k for k in kernels if k not in own))
    return [f"torch {others}", *own] if others else own


def _module_bytes(module: nn.Module) -> int:
    if isinstance(module, _LowBit):
        return module.bytes_read + (0 if module.bias is None else module.bias.nbytes)
    return sum(p.nbytes for p in module.parameters(recurse=False))
