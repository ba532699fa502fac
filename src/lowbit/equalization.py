"""Equalizing one block: before any of its linears is rounded, channel scales move between them and their producers.

1. find where scales can go, each place proved numerically            model/fold.py
2. let some calibration batches walk through the block: what enters each place
3. in the order the data flows: search the scale (algorithms/), fold it into float32 values
4. hand the new values over: norms and biases in their storage dtype, weights to be quantized in float32

Rounding then proceeds as if the checkpoint had been like that. The scales are remembered, because reports give losses
in the units of the original model.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.algorithms.awq import awq, relative_magnitude
from lowbit.algorithms.compose import parse_method, settings_of
from lowbit.algorithms.equalize import ChannelScale, Loss, channel_max, output_error, round_equalized, round_input
from lowbit.algorithms.smoothquant import smoothquant
from lowbit.model.fold import Fold, apply_fold, find_folds, float32_copy, float32_entry
from lowbit.model.lockstep import Walk
from lowbit.model.walk import Blocks, Entry, InputGroup, capture_entries, head_width, linears
from lowbit.recipe import Recipe
from lowbit.scheme import Scheme
from lowbit.stats import InputSummary

PROBE_TOKENS = 16  # length of the random input that folds are proved on
WINDOWS = 32  # calibration windows that the scales are chosen on
UNPROVED = "no module that makes its input could be proved to take a scale"
SAMPLE_ROWS = 1024  # tokens on which a linear's own output error is computed


@dataclass(frozen=True)
class Equalized:
    """A block after equalization. All names are full ones.

    tensors   what replaces the checkpoint's: float32 for weights to be quantized, the storage dtype for the rest
    columns   linear -> (in,) what its input was divided by;  rows: linear -> (out,) what its output was divided by
    report    linear -> what the manifest says about its input's scale, or why it has none
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    report: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Equalizer:
    """What is the same for all blocks; `probe` is a short entry to prove folds with."""

    method: str
    settings: Any
    probe: Entry
    head_dim: int | None
    threads: int
    storage: torch.dtype

    def equalize(
        self,
        block: nn.Module,
        name: str,
        index: int,
        entries: list[Entry],
        schemes: Mapping[str, Scheme],
        stored: Callable[[str], Tensor],
    ) -> Equalized:
        """Choose all scales of the block called `name` and fold them, into the block too. `schemes` are by local name,
        `stored` gives a parameter by its full one as the checkpoint has it."""
        result = Equalized()  # by local names until the end
        twin = float32_copy(block, {local: stored(f"{name}.{local}") for local, _ in block.named_parameters()})
        folds, left = find_folds(twin, float32_entry(self.probe), index, self.head_dim)
        result.report.update({local: {"producer": None, "reason": UNPROVED} for local in left})
        folds = [f for f in folds if any(n in schemes for n in f.consumers) and _rows_scale_freely(f, schemes)]
        train = [e for e in entries if not e.held_out]
        per_entry = max(len(train[0].hidden), 1)
        some = train[:: max(len(train) * per_entry // WINDOWS, 1)]
        summaries = self._summaries(block, index, some, folds)
        for fold, summary in zip(folds, summaries, strict=True):
            if summary.rows == 0:
                continue  # the rounding reports it
            weights = {n: twin.get_parameter(f"{n}.weight").data for n in fold.consumers}
            own = {n: schemes.get(n, Scheme(None)) for n in fold.consumers}
            loss = self._loss(twin, index, some, fold, summary.sample, weights, own)
            choice = self._choose(fold, summary, weights, own, loss)
            for n in fold.consumers:
                result.report[n] = {
                    "producer": fold.producer, "scale": choice.label, "error": choice.loss,
                    "error_identity": choice.loss_identity,
                }  # fmt: skip
            if choice.scale is not None:
                self._fold(twin, fold, fold.spread(fold.reduce(choice.scale)), result)
        quantized = {f"{n}.weight" for n in schemes}
        for local, value in result.tensors.items():
            if local not in quantized:
                result.tensors[local] = value.to(self.storage)
            parameter = block.get_parameter(local)
            parameter.data = result.tensors[local].to(parameter.dtype)
        parts: tuple[dict[str, Any], ...] = (result.tensors, result.columns, result.rows, result.report)
        return Equalized(*({f"{name}.{local}": value for local, value in part.items()} for part in parts))

    def _summaries(self, block: nn.Module, index: int, some: list[Entry], folds: list[Fold]) -> list[InputSummary]:
        """What enters each fold's consumers, over some batches."""
        rows = sum(e.hidden[..., 0].numel() for e in some)
        walk = Walk(block, index, some, [InputGroup(f.consumers) for f in folds], {}, self.threads)
        summaries = []
        for k, fold in enumerate(folds):
            width = linears(block)[fold.consumers[0]].in_features
            total = InputSummary(width)

            def gather(inputs: Iterator[tuple[Entry, Tensor]], width: int = width) -> InputSummary:
                share = InputSummary(width, max(rows // SAMPLE_ROWS, 1))
                for _, x in inputs:
                    share.update(x)
                return share

            for share in walk.collect(k, gather):
                total.merge(share)
            summaries.append(total)
        walk.finish()
        return summaries

    def _choose(
        self, fold: Fold, summary: InputSummary, weights: Mapping[str, Tensor], own: Mapping[str, Scheme], loss: Loss
    ) -> ChannelScale:
        """The method's search, on statistics in which channels that must share a scale are equal."""
        if self.method == "smoothquant":
            x_max, w_max = (fold.spread(fold.reduce(t)) for t in (summary.absmax, channel_max(weights.values())))
            return smoothquant(x_max, w_max, loss, self.settings)
        sizes = [s.weight.group_size for s in own.values() if s.weight is not None and s.weight.granularity == "group"]
        w_mean = relative_magnitude(list(weights.values()), sizes[0] if sizes else 0)
        x_mean, w_mean = (fold.spread(fold.reduce(t)) for t in (summary.mean_abs, w_mean))
        return awq(x_mean, w_mean, loss, self.settings)

    def _loss(
        self,
        twin: nn.Module,
        index: int,
        some: list[Entry],
        fold: Fold,
        sample: Tensor,
        weights: Mapping[str, Tensor],
        own: Mapping[str, Scheme],
    ) -> Loss:
        """AWQ looks at the output of the module that its consumers work for, SmoothQuant at their own."""
        if self.method == "awq" and len(fold.consumers) > 1:
            return parent_error(twin, index, some[len(some) // 2], fold, own, self.storage)
        return output_error(sample, {n: w for n, w in weights.items() if own[n].weight is not None}, own, self.storage)

    def _fold(self, twin: nn.Module, fold: Fold, scale: Tensor, result: Equalized) -> None:
        folded = apply_fold(fold, scale, twin.get_parameter, self.storage)
        for name, value in folded.tensors.items():
            twin.get_parameter(name).data = value
            result.tensors[name] = value
        for name in fold.consumers:
            result.columns[name] = folded.scale
        if not fold.norm:
            rows = torch.ones(linears(twin)[fold.producer].out_features)
            small = fold.reduce(folded.scale)
            rows[fold.start : fold.start + len(small)] = small
            result.rows[fold.producer] = rows


def make_equalizer(
    net: PreTrainedModel, blocks: Blocks, tokens: Tensor, recipe: Recipe, storage: torch.dtype, threads: int
) -> Equalizer | None:
    """For a recipe whose method equalizes, else None. What is outside the blocks, and the first one, must be loaded."""
    method = parse_method(recipe.method)
    if method.equalization is None:
        return None
    settings = settings_of(method, dict(recipe.set))[method.equalization]
    (probe,) = capture_entries(net, blocks, [tokens[:1, :PROBE_TOKENS]])
    return Equalizer(method.equalization, settings, probe, head_width(net.config.get_text_config()), threads, storage)


def _rows_scale_freely(fold: Fold, schemes: Mapping[str, Scheme]) -> bool:
    """Whether the producer's rows have scales of their own, so that scaling a row costs the producer nothing."""
    scheme = None if fold.norm or fold.producer not in schemes else schemes[fold.producer].weight
    return scheme is None or scheme.granularity in ("channel", "group")


def parent_error(
    twin: nn.Module, index: int, entry: Entry, fold: Fold, schemes: Mapping[str, Scheme], storage: torch.dtype
) -> Loss:
    """Loss: the squared error of the consumers' nearest common ancestor's output, relative to the output's size.

    The consumers' weights are rounded as the scale would have it and scaled back, so nothing else has to change.
    """
    parts = [name.split(".") for name in fold.consumers]
    depth = 0
    while len({tuple(p[: depth + 1]) for p in parts}) == 1:
        depth += 1
    parent = twin.get_submodule(".".join(parts[0][:depth]))
    called: list[tuple[Any, Any]] = []
    handle = parent.register_forward_pre_hook(lambda _m, args, kwargs: called.append((args, kwargs)), with_kwargs=True)
    try:
        float32_entry(entry).run(twin, index)
    finally:
        handle.remove()
    args, kwargs = called[0]
    reference = _first(parent(*args, **kwargs))
    power = reference.square().mean().clamp(min=torch.finfo(torch.float32).tiny)
    modules = {n: twin.get_submodule(n) for n in fold.consumers if schemes[n].weight is not None}
    originals = {n: m.get_parameter("weight").data for n, m in modules.items()}

    def loss(scale: Tensor) -> float:
        handles = []
        try:
            for n, module in modules.items():
                module.get_parameter("weight").data = round_equalized(originals[n], scale, schemes[n], storage)
                handles.append(
                    module.register_forward_pre_hook(
                        lambda _m, a, scheme=schemes[n]: (round_input(a[0], scale, scheme), *a[1:])
                    )
                )
            return float((_first(parent(*args, **kwargs)) - reference).square().mean() / power)
        finally:
            for n, module in modules.items():
                module.get_parameter("weight").data = originals[n]
            for h in handles:
                h.remove()

    return loss


def _first(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor
