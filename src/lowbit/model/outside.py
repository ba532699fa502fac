"""What is outside the blocks, in memory while it is at work.

The embeddings and the output head of a large vocabulary are each larger than a block, one is called before the blocks
and one after them, and calibration never gets to the head. So a large weight out there is loaded when its module is
called, and let go when another one is first called (if it is wanted again after that, both stay). A plain lookup
changes no value: its table stays in the dtype it is stored in, and the rows that were looked up are converted.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.model.load import Source, materialize_outside
from lowbit.model.walk import Blocks

LARGE = 1 << 22  # weights: smaller parts are loaded at once


class Outside:
    """Until `close`, everything outside the blocks can be called, in `dtype`; what is tied is the same."""

    def __init__(self, model: PreTrainedModel, blocks: Blocks, source: Source, dtype: torch.dtype) -> None:
        self._source, self._dtype = source, dtype
        self._tied = {str(k): str(v) for k, v in model.all_tied_weights_keys.items()}
        self._present: set[nn.Module] = set()
        self._called: set[nn.Module] = set()  # since the last time that everything was let go
        self._handles = []
        large = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Embedding)
            and module.weight.numel() >= LARGE
            and not name.startswith(blocks.name + ".")
            and self._place(name) is not None
        }
        materialize_outside(model, blocks, source, dtype, skip={f"{name}.weight" for name in large})
        for name, module in large.items():
            self._handles.append(module.register_forward_pre_hook(self._enter(name)))
            if type(module) is nn.Embedding:
                self._handles.append(module.register_forward_hook(lambda _m, _args, rows: rows.to(dtype)))

    def let_go(self) -> None:
        """Of all large weights."""
        self._release()
        self._called.clear()

    def close(self) -> None:
        self.let_go()
        for handle in self._handles:
            handle.remove()

    def _release(self) -> None:
        for module in self._present:
            _set(module, module.get_parameter("weight").to("meta"))
        self._present.clear()

    def _enter(self, name: str) -> Any:
        def hook(module: nn.Module, _args: tuple[Any, ...]) -> None:
            if module in self._present:
                return
            if module not in self._called:
                self._release()
            _set(module, self._weight(name, module))
            self._present.add(module)
            self._called.add(module)

        return hook

    def _weight(self, name: str, module: nn.Module) -> Tensor:
        place = self._place(name)
        assert place is not None
        quantized = self._source.linear(place)
        if quantized is not None:
            return quantized.dequantize(self._dtype)
        stored = self._source.checkpoint.get(f"{place}.weight")
        return stored if type(module) is nn.Embedding else stored.to(self._dtype)

    def _place(self, name: str) -> str | None:
        """The module whose stored weight this one's is: its own, or the one it is tied to, whichever there is."""
        key = f"{name}.weight"
        others = [target for target, source in self._tied.items() if source == key]
        for candidate in (self._tied.get(key), key, *others):
            if candidate is not None:
                place = candidate.removesuffix(".weight")
                if candidate in self._source.checkpoint.tensors or place in self._source.schemes:
                    return place
        return None


def _set(module: nn.Module, weight: Tensor) -> None:
    module.weight = nn.Parameter(weight, requires_grad=False)
