"""A forward pass that never holds more than one block: from a checkpoint on disk to logits."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.model.checkpoint import Checkpoint
from lowbit.model.load import Source, compute_buffers, materialize, open_source, release, skeleton
from lowbit.model.lockstep import Lockstep
from lowbit.model.outside import Outside
from lowbit.model.walk import Blocks, Entry, capture_entries, find_blocks

FINGERPRINT_TOKENS = 64
FINGERPRINT_TOP = 8


@torch.no_grad()
def stream_logits(checkpoint: Checkpoint, tokens: Tensor) -> Tensor:
    """Float32 logits (batch, tokens, vocabulary), weights dequantized, activations rounded where the scheme says."""
    model = skeleton(checkpoint)
    source = open_source(model, checkpoint)
    blocks = find_blocks(model)
    outside = Outside(model, blocks, source, torch.float32)
    materialize(model, blocks.names[0], source, torch.float32)
    (entry,) = capture_entries(model, blocks, [tokens])
    outside.let_go()
    for i, name in enumerate(blocks.names):
        block = materialize(model, name, source, torch.float32)
        inside = [n for n in source.schemes if n.startswith(name + ".")]
        grids = {n.removeprefix(name + "."): source.input_grid(n) for n in inside}
        (entry.hidden,) = Lockstep(block, i, [entry], (), {n: g for n, g in grids.items() if g is not None}).finish()
        release(block)
    logits = replay_tail(model, blocks.name, entry, tokens)
    outside.close()
    return logits


@torch.no_grad()
def probe(model: Any, source: Source, blocks: Blocks) -> None:
    """Run a few tokens through the part before the blocks, the first block, and the part after them.

    Raises InputError if that is not possible: a config can fit the weights' shapes and still describe nothing that
    computes, and this is cheaper to learn now than after the last block.
    """
    checkpoint = source.checkpoint
    tokens = torch.arange(min(4, int(checkpoint.text_config.get("vocab_size") or 4)))[None]
    outside = Outside(model, blocks, source, torch.float32)
    block = materialize(model, blocks.names[0], source, torch.float32)
    try:
        (entry,) = capture_entries(model, blocks, [tokens])
        outside.let_go()
        entry.hidden = entry.run(block, 0)
        release(block)
        replay_tail(model, blocks.name, entry, tokens)
    except Exception as error:  # the model class's own code, on whatever the config says
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{checkpoint.path}: the model that config.json describes cannot run ({type(error).__name__}: {reason})."
        ) from error
    finally:
        outside.close()
        release(model)
        compute_buffers(model)


def replay_tail(model: Any, blocks: str, entry: Entry, tokens: Tensor) -> Tensor:
    """What the model does after its blocks (final norm, head), given the entry that has passed them."""
    holder = model.get_submodule(blocks)
    originals = list(holder)

    class Give(torch.nn.Module):
        def forward(self, *_args: Any, **_kwargs: Any) -> Any:
            return (entry.hidden,) if entry.returns_tuple else entry.hidden

    try:
        for i in range(len(originals)):
            holder[i] = Give()
        logits = outputs_of(model(input_ids=tokens, use_cache=False))
    finally:
        for i, block in enumerate(originals):
            holder[i] = block
    return logits.float()


def last_logits(checkpoint: Checkpoint, prompt: list[int]) -> Tensor:
    """(vocabulary,) logits after a prompt; of a classifier, its classes' logits."""
    return stream_logits(checkpoint, torch.tensor([prompt])).flatten(0, -2)[-1]


def outputs_of(result: Any) -> Tensor:
    """What a model is for: its logits, or the last hidden states of a model without a head."""
    outputs: Tensor = result.logits if getattr(result, "logits", None) is not None else result[0]
    return outputs


def fingerprint(checkpoint: Checkpoint) -> dict[str, Any]:
    """The largest logits after a fixed pseudo-random prompt: what `verify` computes again."""
    vocabulary = int(checkpoint.text_config.get("vocab_size") or 256)
    length = min(FINGERPRINT_TOKENS, checkpoint.context_length or FINGERPRINT_TOKENS)
    tokens = np.random.default_rng(0).integers(0, vocabulary, length)
    logits = last_logits(checkpoint, tokens.tolist())
    if not bool(torch.isfinite(logits).all()):
        raise InputError(
            f"{checkpoint.path}: the logits are not finite: the model overflows in float32. Check the original with "
            "transformers first."
        )
    top = logits.topk(min(FINGERPRINT_TOP, len(logits)))
    return {"prompt": tokens.tolist(), "tokens": top.indices.tolist(), "logits": top.values.tolist()}
