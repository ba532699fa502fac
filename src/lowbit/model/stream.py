"""A forward pass that never holds more than one block: from a checkpoint on disk to logits."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.model.checkpoint import Checkpoint
from lowbit.model.load import materialize, materialize_outside, open_source, release, skeleton
from lowbit.model.lockstep import Lockstep
from lowbit.model.walk import capture_entries, find_blocks

FINGERPRINT_TOKENS = 64
FINGERPRINT_TOP = 8


@torch.no_grad()
def stream_logits(checkpoint: Checkpoint, tokens: Tensor) -> Tensor:
    """Float32 logits (batch, tokens, vocabulary), weights dequantized, activations rounded where the scheme says."""
    model = skeleton(checkpoint)
    source = open_source(model, checkpoint)
    blocks = find_blocks(model)
    materialize_outside(model, blocks, source, torch.float32)
    materialize(model, blocks.names[0], source, torch.float32)
    (entry,) = capture_entries(model, blocks, [tokens])
    for i, name in enumerate(blocks.names):
        block = materialize(model, name, source, torch.float32)
        inside = [n for n in source.schemes if n.startswith(name + ".")]
        grids = {n.removeprefix(name + "."): source.input_grid(n) for n in inside}
        (entry.hidden,) = Lockstep(block, i, [entry], (), {n: g for n, g in grids.items() if g is not None}).finish()
        release(block)
    return replay_tail(model, blocks.name, entry.hidden, tokens)


def replay_tail(model: Any, blocks: str, hidden: Tensor, tokens: Tensor) -> Tensor:
    """What the model does after its blocks (final norm, head), given the hidden states they end with."""
    holder = model.get_submodule(blocks)
    originals = list(holder)

    class Give(torch.nn.Module):
        def forward(self, *_args: Any, **_kwargs: Any) -> Tensor:
            return hidden

    try:
        for i in range(len(originals)):
            holder[i] = Give()
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    finally:
        for i, block in enumerate(originals):
            holder[i] = block
    return logits.float()


def fingerprint(checkpoint: Checkpoint) -> dict[str, Any]:
    """The largest logits after a fixed pseudo-random prompt: what `verify` computes again."""
    vocabulary = int(checkpoint.config.get("vocab_size") or 256)
    tokens = np.random.default_rng(0).integers(0, vocabulary, FINGERPRINT_TOKENS)
    logits = stream_logits(checkpoint, torch.from_numpy(tokens)[None])[0, -1]
    top = logits.topk(min(FINGERPRINT_TOP, len(logits)))
    return {"prompt": tokens.tolist(), "tokens": top.indices.tolist(), "logits": top.values.tolist()}
