"""Rotating a model: a checkpoint whose tensors come out rotated, after proof that the function is the same.

    R1   embedding E Q;  norms' gains moved into their readers;  readers (W · gain) Q;  writers Qᵀ W;  head likewise
    R2   per head of d values: rows of v by Q_dᵀ, columns of o by Q_d (query heads of a group share theirs)

Which linears read and write is discovered as for channel scales (model/fold.py). Before anything is quantized the
first block, the part before the blocks and the part behind them are computed both ways in float32 on random inputs;
a model that does not commute with the rotation (LayerNorm, norms on a block's outputs, fused experts) is refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.algorithms.hadamard import ChannelRotation, HadamardSettings, random_rotation
from lowbit.console import note
from lowbit.errors import InputError
from lowbit.model.checkpoint import Checkpoint
from lowbit.model.fold import Fold, find_folds, float32_entry, unchanged
from lowbit.model.load import materialize, materialize_outside, open_source, skeleton
from lowbit.model.stream import replay_tail
from lowbit.model.walk import Blocks, Entry, capture_entries, find_blocks, head_width, linears
from lowbit.shards import Later

_TOLERANCE = 1e-4  # of the largest value, in float32
_PROBE = torch.arange(1, 17)[None]  # token ids

Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rotated(Checkpoint):
    """A checkpoint that hands out rotated tensors; in float32 if `exact`, else in the dtype they are stored in."""

    edits: Mapping[str, tuple[Edit, ...]] = field(default_factory=dict)
    exact: bool = False

    def get(self, name: str) -> Tensor:
        stored = super().get(name)
        if name not in self.edits:
            return stored
        tensor = stored.float()
        for edit in self.edits[name]:
            tensor = edit(tensor)
        return (tensor if self.exact else tensor.to(stored.dtype)).contiguous()

    def later(self, name: str) -> Later:
        plain = super().later(name)
        if name not in self.edits:
            return plain
        return replace(plain, read=lambda: self.get(name).T if name in self.transposed else self.get(name))


@torch.no_grad()
def rotate(checkpoint: Checkpoint, settings: HadamardSettings, seed: int) -> Rotated:
    """The rotated view of a checkpoint. Raises InputError, saying why, for a model that cannot be rotated."""
    net = skeleton(checkpoint)
    blocks = find_blocks(net)
    entry, block = _load(net, blocks, checkpoint)
    dim = head_width(net.config.get_text_config())
    probe = float32_entry(entry, torch.randn(entry.hidden.shape, generator=torch.Generator().manual_seed(0)))
    folds, _ = find_folds(block, probe, 0, dim)
    edits: dict[str, list[Edit]] = {}
    rotation = None
    if settings.r2 and dim:
        _rotate_values(blocks, block, probe, folds, dim, edits, seed)
    if settings.r2 and not edits:
        note("hadamard: no pair of v and o could be proved to take a rotation, so only the residual stream has one.")
    if settings.r1:
        _refuse_tied(net)
        rotation = random_rotation(entry.hidden.shape[-1], seed)
        _rotate_stream(net, blocks, checkpoint, folds, edits, rotation)
    own = {f.name: getattr(checkpoint, f.name) for f in fields(Checkpoint)}
    rotated = Rotated(**own, edits={name: tuple(e) for name, e in edits.items()})
    _prove(net, blocks, checkpoint, rotated, rotation)
    return rotated


def _load(net: PreTrainedModel, blocks: Blocks, checkpoint: Checkpoint) -> tuple[Entry, nn.Module]:
    """What enters the blocks for a short prompt, and the first block; all in float32."""
    source = open_source(net, checkpoint)
    materialize_outside(net, blocks, source, torch.float32)
    block = materialize(net, blocks.names[0], source, torch.float32)
    vocabulary = net.get_input_embeddings().weight.shape[0]
    return capture_entries(net, blocks, [_PROBE % vocabulary])[0], block


def _refuse_tied(net: PreTrainedModel) -> None:
    if net.all_tied_weights_keys:
        raise InputError(
            "hadamard: the output head shares the embedding's weights, and the final norm's gain can move into one of "
            "them only. Store the model untied (tie_word_embeddings: false), or rotate values alone: --set r1=false."
        )


def _rotate_values(
    blocks: Blocks, block: nn.Module, entry: Entry, folds: list[Fold], dim: int, edits: dict[str, list[Edit]], seed: int
) -> None:
    """R2 for every pair of linears with nothing but whole heads between, which is proved on the first block."""
    one = random_rotation(dim, seed + 1)
    for fold in folds:
        consumer, width = fold.consumers[0], linears(block)[fold.consumers[0]].in_features
        made = width // fold.repeat
        if fold.norm or made % dim:
            continue
        rows = ChannelRotation(one.signs.repeat(made // dim), dim)
        columns = ChannelRotation(one.signs.repeat(width // dim), dim)
        part = slice(fold.start, fold.start + made)

        def turn_rows(t: Tensor, part: slice = part, rows: ChannelRotation = rows) -> Tensor:
            t = t.clone()
            t[part] = rows.apply_rows(t[part])
            return t

        own: dict[str, Edit] = {f"{fold.producer}.weight": turn_rows, f"{consumer}.weight": columns.apply}
        if fold.has_bias:
            own[f"{fold.producer}.bias"] = turn_rows
        turned = {local: edit(block.get_parameter(local).data) for local, edit in own.items()}
        if not unchanged(block, entry, 0, turned, fold.producer):
            continue  # up and down: the gate's product is by channel
        for name in blocks.names:
            for local, edit in own.items():
                edits.setdefault(f"{name}.{local}", []).append(edit)


def _rotate_stream(
    net: PreTrainedModel,
    blocks: Blocks,
    checkpoint: Checkpoint,
    folds: list[Fold],
    edits: dict[str, list[Edit]],
    rotation: ChannelRotation,
) -> None:
    """R1. Reads gains from the checkpoint when a tensor is asked for, so nothing large is held."""
    readers = {n: f for f in folds if f.norm for n in f.consumers}
    width = len(rotation.signs)
    modules = linears(net.get_submodule(blocks.names[0]))
    writers = [n for n, m in modules.items() if n not in readers and m.out_features == width]

    def fold_gain(norm: str, offset: int) -> Edit:
        return lambda weight: rotation.apply(weight * (checkpoint.get(norm).float() + offset))

    def neutral(offset: int) -> Edit:
        return lambda weight: torch.full_like(weight, 1.0 - offset)

    for name in blocks.names:
        for reader, fold in readers.items():
            gain = f"{name}.{fold.producer}.weight"
            edits.setdefault(f"{name}.{reader}.weight", []).append(fold_gain(gain, fold.offset))
            edits[gain] = [neutral(fold.offset)]
        for writer in writers:
            edits.setdefault(f"{name}.{writer}.weight", []).append(rotation.apply_rows)
            if modules[writer].bias is not None:
                edits.setdefault(f"{name}.{writer}.bias", []).append(rotation.apply_rows)
    by_module = {id(m): n for n, m in net.named_modules()}
    edits[by_module[id(net.get_input_embeddings())] + ".weight"] = [rotation.apply]
    head = by_module[id(net.get_output_embeddings())]
    norm, offset = _final_norm(net, blocks, head, width)
    edits[f"{head}.weight"] = [fold_gain(f"{norm}.weight", offset)]
    edits[f"{norm}.weight"] = [neutral(offset)]


def _final_norm(net: PreTrainedModel, blocks: Blocks, head: str, width: int) -> tuple[str, int]:
    """The name of the module with a gain whose output the head reads, and what is added to its stored weight."""
    outputs: dict[str, tuple[Tensor, Tensor]] = {}
    received: list[Tensor] = []
    handles = [net.get_submodule(head).register_forward_pre_hook(lambda _m, args: received.append(args[0]))]
    for name, module in net.named_modules():
        weight = getattr(module, "weight", None)
        if not name.startswith(blocks.name) and isinstance(weight, nn.Parameter) and weight.shape == (width,):
            handles.append(
                module.register_forward_hook(lambda _m, args, out, n=name: outputs.update({n: (args[0], out)}))
            )
    hidden = torch.randn(1, _PROBE.shape[1], width, generator=torch.Generator().manual_seed(0))
    try:
        replay_tail(net, blocks.name, Entry(hidden, []), _PROBE)
    finally:
        for handle in handles:
            handle.remove()
    for name, (x, y) in outputs.items():
        if torch.equal(y, received[0]):
            weight = net.get_submodule(name).get_parameter("weight").float()
            plain = x * torch.rsqrt(x.square().mean(-1, keepdim=True))
            errors = [float((plain * (weight + offset) - y).abs().max()) for offset in (0, 1)]
            return name, errors.index(min(errors))
    raise InputError("hadamard: no norm was found between the blocks and the output head.")


def _prove(
    net: PreTrainedModel, blocks: Blocks, checkpoint: Checkpoint, rotated: Rotated, rotation: ChannelRotation | None
) -> None:
    """Compute the parts before, in and behind the blocks both ways. Raises InputError where they differ."""

    def turn(x: Tensor) -> Tensor:
        return x if rotation is None else rotation.apply(x)

    generator = torch.Generator().manual_seed(1)
    results = []
    for view, turned in ((checkpoint, False), (replace(rotated, exact=True), True)):
        entry, block = _load(net, blocks, view)
        generator.manual_seed(1)
        hidden = torch.randn(entry.hidden.shape, generator=generator)
        given = turn(hidden) if turned else hidden
        out = float32_entry(entry, given).run(block, 0)
        logits = replay_tail(net, blocks.name, replace(entry, hidden=given), _PROBE)
        entered = entry.hidden.float()
        results.append((entered, out, logits) if turned else (turn(entered), turn(out), logits))
    where = (
        "what comes before the blocks (positions or norms on the embeddings)",
        f"{blocks.names[0]} (LayerNorm, a norm on its outputs, or linears that read the stream unseen)",
        "what comes after the blocks",
    )
    for a, b, part in zip(*results, where, strict=True):
        if not float((a - b).abs().max()) <= _TOLERANCE * float(a.abs().max()):
            raise InputError(f"hadamard: this model does not commute with a rotation: {part} computes something else.")
