"""Every matrix product of a model as an nn.Linear of its own, so that one rule quantizes all of them.

Two layouts hide their products:

* GPT-2's `Conv1D` stores the transpose, (in, out). It becomes a Linear (out, in); the checkpoint transposes.
* A mixture's experts are stored one by one on disk (`experts.3.w1.weight`), but transformers 5 stacks them into one
  parameter (experts, out, in). Here the stack is undone again: each expert gets its Linears back, under the names
  they have on disk. The experts class keeps running its own code, with its stacked parameter replaced by a stand-in
  that takes `stack[e]` and `linear(x, stack[e])` and calls the Linears instead. What the stack was made of is read
  from transformers' own conversion mapping.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.pytorch_utils import Conv1D

_EACH = "experts.*."


class TransposedLinear(nn.Linear):
    """A Linear whose weight lies in the files as (in, out)."""


def linearize(model: PreTrainedModel, stored: Iterable[str], converters: Iterable[WeightConverter]) -> None:
    """Put Linears in place, on the meta device. `stored`: the checkpoint's tensor names, renamed to the model's."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, Conv1D):
            linear = TransposedLinear(module.nx, module.nf, device="meta", dtype=module.weight.dtype)
            model.set_submodule(name, linear.requires_grad_(False))
    one_by_one = {n[: n.index(".experts.") + 8] for n in stored if _is_of_one_expert(n)}
    stacks = [stack for c in converters for stack in _stacks(c)]
    for name in sorted(one_by_one & modules.keys()):
        _unstack(modules[name], name, stacks)


def _is_of_one_expert(name: str) -> bool:
    _, found, rest = name.partition(".experts.")
    return bool(found) and rest.partition(".")[0].isdigit()


@dataclass(frozen=True)
class _Stack:
    """One stacked parameter: where it is, and the linears whose weights are its rows, in order."""

    path: str  # ends with experts.<parameter>
    parts: tuple[str, ...]


def _stacks(converter: WeightConverter) -> list[_Stack]:
    """The stack that a converter makes, or nothing if it does anything but stacking and joining rows."""
    plain = [type(op) for op in converter.operations] in ([MergeModulelist], [MergeModulelist, Concatenate])
    sources = [s for s in converter.source_patterns if _EACH in s and s.endswith(".weight")]
    if not plain or len(sources) != len(converter.source_patterns) or any(_dim(op) for op in converter.operations):
        return []
    parts = tuple(s.partition(_EACH)[2].removesuffix(".weight") for s in sources)
    return [_Stack(target.lstrip("^."), parts) for target in converter.target_patterns]


def _dim(operation: Any) -> bool:
    """Whether an operation works along another dimension than stacking (0) and joining rows (1) do."""
    return bool(operation.dim != (0 if isinstance(operation, MergeModulelist) else 1))


def _unstack(experts: nn.Module, name: str, stacks: Iterable[_Stack]) -> None:
    for parameter, stack in list(experts.named_parameters(recurse=False)):
        parts = next((s.parts for s in stacks if f"{name}.{parameter}".endswith(s.path)), None)
        if parts is None or stack.dim() != 3:
            continue
        count, rows, columns = stack.shape
        for e in range(count):
            if str(e) not in experts._modules:
                experts.add_module(str(e), nn.Module())
            for part in parts:
                linear = nn.Linear(columns, rows // len(parts), bias=False, device="meta", dtype=stack.dtype)
                experts._modules[str(e)].add_module(part, linear.requires_grad_(False))  # type: ignore[union-attr]
        delattr(experts, parameter)
        setattr(experts, parameter, _StandIn(experts, parts))
        experts.config._experts_implementation = "eager"  # type: ignore[union-attr]


class _StandIn:
    """Takes the place of a stacked parameter: `stand_in[e]` is a weight that `linear` accepts."""

    def __init__(self, experts: nn.Module, parts: tuple[str, ...]) -> None:
        self.experts, self.parts = [experts], parts  # in a list: a reference, not a submodule

    def __getitem__(self, index: Any) -> "_ExpertWeight":
        expert = self.experts[0].get_submodule(str(int(index)))
        return _ExpertWeight([expert.get_submodule(part) for part in self.parts])


class _ExpertWeight:
    """linear(x, this) is the outputs of the Linears, side by side."""

    def __init__(self, linears: list[nn.Module]) -> None:
        self.linears = linears

    @classmethod
    def __torch_function__(
        cls, function: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        if function is not F.linear or len(args) != 2 or kwargs:
            raise NotImplementedError(f"an expert's weight in {function}: only linear(x, weight) is known")
        x, weight = args
        outputs = [linear(x) for linear in weight.linears]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
