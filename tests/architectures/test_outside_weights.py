"""Large weights outside the blocks are in memory one at a time, and nothing computed changes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lowbit.model import outside
from lowbit.model.checkpoint import open_checkpoint
from lowbit.model.load import open_source, skeleton
from lowbit.model.outside import Outside
from lowbit.model.stream import stream_logits
from lowbit.model.walk import find_blocks

Architecture = Callable[[str], Path]
TOKENS = torch.arange(3, 15)[None]
# two tables, tied ones, a scaled lookup, positions with an offset, a projection, a stored head, a masked-word head
NAMES = ["gpt2", "gemma3", "opt", "llama", "gpt_neox", "falcon", "cohere", "mixtral", "bert", "roberta", "distilbert"]


@pytest.mark.parametrize("name", NAMES)
def test_logits_do_not_change(architecture: Architecture, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(architecture(name))
    at_once = stream_logits(checkpoint, TOKENS)
    monkeypatch.setattr(outside, "LARGE", 1)
    assert torch.equal(stream_logits(checkpoint, TOKENS), at_once)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_one_large_weight_at_a_time(architecture: Architecture, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "LARGE", 64 * 64)
    model = skeleton(open_checkpoint(architecture(name)))
    source, blocks = open_source(model, open_checkpoint(architecture(name))), find_blocks(model)
    parts = Outside(model, blocks, source, torch.float32)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    large = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.Linear) and m in (embedding, head)]

    def present() -> list[bool]:
        return [not m.weight.is_meta for m in large]

    assert present() == [False, False]
    rows = embedding(TOKENS)
    assert present() == [True, False]
    logits = head(rows)
    assert present() == [False, True]
    embedding(TOKENS)  # they take turns after all
    assert present() == [True, True]
    parts.let_go()
    assert present() == [False, False]
    head(embedding(TOKENS))
    assert present() == [False, True]
    parts.close()
    assert present() == [False, False]
    stored = source.checkpoint
    table = stored.get(next(n for n in stored.tensors if n.endswith(("wte.weight", "embed_tokens.weight")))).float()
    last = table if "lm_head.weight" not in stored.tensors else stored.get("lm_head.weight").float()
    assert torch.equal(rows, table[TOKENS])
    assert torch.allclose(logits, table[TOKENS] @ last.T, atol=1e-4)
