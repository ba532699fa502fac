"""Where a channel scale can go: the module that makes a linear's input, if the function survives.

    norm -> q, k, v      norm.weight (and bias) / s                 the group reads the norm's output itself
    v -> o               rows of v / s, one scale for each channel of a key/value head, shared by the query heads that
                         read it (grouped-query attention)
    up -> down           rows of up / s: the product with the gate is linear in `up`

Nothing here knows architectures. A norm is found because its output *is* the tensor that the group receives, a
producing linear because its sizes fit; each proposal is applied to a float32 copy of the block with random scales, and
taken only if every other linear's output and the block's stay what they were. So q and k are refused as producers for
o (softmax), gate for down (SiLU), and fused projections, norms stored as 1 + w, or ReLU networks come out right
without being listed. What cannot be proved is left alone.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.model.walk import Entry, linears

_TOLERANCE = 1e-4  # of the largest output; float32 gives about 1e-6, a wrong fold 1e-2 and more
Get = Callable[[str], Tensor]


@dataclass(frozen=True)
class Fold:
    """`consumers` (linears of one input) can be scaled if `producer` is scaled back. Names are within the block.

    offset       0, or 1 for a norm that multiplies by 1 + weight
    start        the first row of a producing linear that is concerned (fused projections: not 0)
    repeat, dim  the input is each run of `dim` produced channels `repeat` times over (1 unless heads are shared)
    """

    producer: str
    consumers: tuple[str, ...]
    norm: bool
    has_bias: bool
    offset: int = 0
    start: int = 0
    repeat: int = 1
    dim: int = 1

    def reduce(self, x: Tensor) -> Tensor:
        """(in,) -> (produced channels,): the largest of the channels that share one scale."""
        return x.reshape(-1, self.repeat, self.dim).amax(1).reshape(-1)

    def spread(self, x: Tensor) -> Tensor:
        """(produced channels,) -> (in,)."""
        return x.reshape(-1, 1, self.dim).expand(-1, self.repeat, -1).reshape(-1)


@dataclass(frozen=True)
class Folded:
    """New values by name within the block, and the scale (in,) that the consumers' inputs were really divided by."""

    tensors: dict[str, Tensor]
    scale: Tensor


def apply_fold(fold: Fold, scale: Tensor, get: Get, norm_dtype: torch.dtype) -> Folded:
    """Divide the producer by `scale` (in,), multiply the consumers' columns: float32 values by name.

    A norm is rounded to `norm_dtype` at once and the consumers take up the scale that this really is, so the function
    is kept to float32 rounding whatever the storage dtype.
    """
    small = fold.reduce(scale)
    tensors: dict[str, Tensor] = {}
    weight = get(f"{fold.producer}.weight").float()
    if fold.norm:
        gain = weight + fold.offset
        stored = (gain / small - fold.offset).to(norm_dtype).float()
        exact = gain / (stored + fold.offset)
        small = torch.where(torch.isfinite(exact) & (exact > 0), exact, small)
        tensors[f"{fold.producer}.weight"] = stored
    else:
        rows = slice(fold.start, fold.start + len(small))
        weight = weight.clone()
        weight[rows] /= small[:, None]
        tensors[f"{fold.producer}.weight"] = weight
    if fold.has_bias:
        bias = get(f"{fold.producer}.bias").float().clone()
        bias[fold.start : fold.start + len(small)] /= small
        tensors[f"{fold.producer}.bias"] = bias.to(norm_dtype).float()
    scale = fold.spread(small)
    for name in fold.consumers:
        tensors[f"{name}.weight"] = get(f"{name}.weight").float() * scale
    return Folded(tensors, scale)


def float32_copy(block: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the block in float32 with parameters (by name in the block) as given."""
    twin = copy.deepcopy(block).float()
    for name, value in tensors.items():
        twin.get_parameter(name).data = value.float()
    return twin


def float32_entry(entry: Entry, hidden: Tensor | None = None) -> Entry:
    """The entry with everything that floats in float32; with other hidden states where given."""
    arguments = [(_float32(args), _float32(kwargs)) for args, kwargs in entry.arguments]
    return Entry((entry.hidden if hidden is None else hidden).float(), arguments)


def _float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: _float32(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_float32(v) for v in value)
    return value


def find_folds(twin: nn.Module, probe: Entry, index: int, head_dim: int | None) -> tuple[list[Fold], list[str]]:
    """All proved folds of a float32 block, in the order the data flows, and the linears whose input has none.

    `probe` is a short float32 entry; its hidden states are replaced by random ones. At most one fold an input.
    """
    generator = torch.Generator().manual_seed(index)
    probe = float32_entry(probe, torch.randn(probe.hidden.shape, generator=generator))
    trace = _Trace.of(twin, probe, index)
    unreached = [n for n in linears(twin) if n not in trace.outputs]
    folds: list[Fold] = []
    left = list(unreached)
    for names, x in trace.inputs:
        proposals = _norms(twin, trace, names, x) if not unreached else []
        proposals += list(_linears(twin, trace, names, head_dim))
        proved = next((f for f in proposals if _holds(twin, probe, index, trace, f, generator)), None)
        if proved is None:
            left += names
        else:
            folds.append(proved)
    return folds, left


@dataclass
class _Trace:
    """One pass through a block: who received and who returned which tensor."""

    inputs: list[tuple[list[str], Tensor]]  # linears by the tensor they receive, in the order of the calls
    outputs: dict[str, Tensor]  # of linears
    norms: dict[str, Tensor]  # outputs of other modules that have a vector of weights
    result: Tensor

    @staticmethod
    def of(block: nn.Module, entry: Entry, index: int) -> "_Trace":
        trace = _Trace([], {}, {}, torch.empty(0))

        def linear(name: str) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                trace.outputs[name] = output
                same = next((names for names, x in trace.inputs if x is args[0]), None)
                if same is None:
                    trace.inputs.append(([name], args[0]))
                elif name not in same:
                    same.append(name)

            return hook

        def norm(name: str) -> Any:
            def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
                if isinstance(output, Tensor):
                    trace.norms[name] = output

            return hook

        handles = []
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                handles.append(module.register_forward_hook(linear(name)))
            elif isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.dim() == 1:
                handles.append(module.register_forward_hook(norm(name)))
        try:
            trace.result = entry.run(block, index)
        finally:
            for handle in handles:
                handle.remove()
        return trace


def _norms(block: nn.Module, trace: _Trace, names: list[str], x: Tensor) -> list[Fold]:
    """The norm whose output is x, read as w and as 1 + w."""
    for name, output in trace.norms.items():
        module = block.get_submodule(name)
        if output is x and module.get_parameter("weight").shape[0] == x.shape[-1]:
            bias = getattr(module, "bias", None) is not None
            return [Fold(name, tuple(names), True, bias, offset) for offset in (0, 1)]
    return []


def _linears(block: nn.Module, trace: _Trace, names: list[str], head_dim: int | None) -> Iterator[Fold]:
    """Earlier linears whose outputs, or whose last rows, have the input's width, or a whole fraction of it in heads."""
    modules = linears(block)
    width = modules[names[0]].in_features
    calls = list(trace.outputs)
    for name in reversed(calls[: calls.index(names[0])]):
        rows, bias = modules[name].out_features, modules[name].bias is not None
        if rows >= width:
            yield Fold(name, tuple(names), False, bias, start=rows - width)
        if head_dim and width % head_dim == 0:
            for heads in range(width // head_dim - 1, 0, -1):
                made = heads * head_dim
                # alone, or the last part of fused q, k, v
                if width % made == 0 and rows in (made, width + 2 * made):
                    yield Fold(name, tuple(names), False, bias, 0, rows - made, width // made, head_dim)


def _holds(twin: nn.Module, probe: Entry, index: int, trace: _Trace, fold: Fold, generator: torch.Generator) -> bool:
    """Whether random scales leave the block's result and every linear's output but the producer's unchanged."""
    width = linears(twin)[fold.consumers[0]].in_features
    scale = fold.spread(torch.exp2(torch.rand(width // fold.repeat, generator=generator) * 4 - 2))
    folded = apply_fold(fold, scale, twin.get_parameter, torch.float32)
    return _unchanged(twin, probe, index, trace, folded.tensors, fold.producer)


def unchanged(twin: nn.Module, probe: Entry, index: int, tensors: Mapping[str, Tensor], producer: str) -> bool:
    """Whether a float32 block with other parameter values (by name) computes the same: its result, and the outputs of
    all linears but `producer`. `probe` is a float32 entry."""
    return _unchanged(twin, probe, index, _Trace.of(twin, probe, index), tensors, producer)


def _unchanged(
    twin: nn.Module, probe: Entry, index: int, trace: _Trace, tensors: Mapping[str, Tensor], producer: str
) -> bool:
    before = {name: twin.get_parameter(name).data for name in tensors}
    try:
        for name, value in tensors.items():
            twin.get_parameter(name).data = value
        after = _Trace.of(twin, probe, index)
    finally:
        for name, value in before.items():
            twin.get_parameter(name).data = value
    pairs = [(trace.outputs[n], after.outputs[n]) for n in trace.outputs if n != producer]
    return all(_same(a, b) for a, b in [*pairs, (trace.result, after.result)])


def _same(a: Tensor, b: Tensor) -> bool:
    difference = (a - b).abs().max()
    return bool(difference <= _TOLERANCE * a.abs().max())
