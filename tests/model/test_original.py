"""Rounding towards the original's outputs: the regression, and the streams that it may repair."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GemmaConfig, GemmaForCausalLM

from lowbit.model.lockstep import Walk
from lowbit.model.original import Original, find_streams
from lowbit.model.walk import Entry, capture_entries, find_blocks, input_groups, linears

TOKENS = torch.randint(3, 4096, (12, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def enter(path: Path) -> tuple[nn.Module, list[Entry]]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    blocks = find_blocks(model)
    return model.get_submodule(blocks.names[0]), capture_entries(model, blocks, TOKENS.split(4))


@torch.no_grad()
def test_streams_are_found_by_their_sums(tiny: Path) -> None:
    block, entries = enter(tiny)
    streams = find_streams(block, entries[0], 0)
    assert set(streams) == {"self_attn.o_proj", "mlp.down_proj"}
    assert streams["mlp.down_proj"] == "post_attention_layernorm"


@torch.no_grad()
def test_a_stream_that_is_scaled_on_the_way_is_not_claimed() -> None:
    """Only an exact sum counts: here attention's output passes a norm of its own first, as in Gemma 2."""
    config = GemmaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, vocab_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GemmaForCausalLM(config).eval()

    class Scaled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Tensor, **kwargs: Tensor) -> tuple[Tensor, Tensor]:
            out, weights = self.inner(*args, **kwargs)
            return 1.5 * out, weights

    block = model.model.layers[0]
    block.self_attn = Scaled(block.self_attn)
    entries = capture_entries(model, find_blocks(model), [torch.randint(0, 64, (2, 8))])
    assert "mlp.down_proj" in find_streams(block, entries[0], 0)
    assert "self_attn.inner.o_proj" not in find_streams(block, entries[0], 0)


def error_of(goal: Tensor, x_hat: Tensor, y: Tensor) -> float:
    return float((x_hat @ goal.T - y).square().mean())


@torch.no_grad()
def test_the_goal_repairs_what_the_prefix_lost(tiny: Path) -> None:
    """Perturb q, k, v; o_proj's goal must bring the stream nearer to the original's than o_proj itself does."""
    block, entries = enter(tiny)
    groups = input_groups(block, entries[0], 0)
    original = Original(entries, 1)
    original.enter(block, 0, groups)
    modules = linears(block)
    kept: dict[str, list[Tensor]] = {"x": [], "y": []}
    weight = modules["self_attn.o_proj"].weight.clone()
    handle = modules["self_attn.o_proj"].register_forward_hook(lambda _m, _a, out: kept["y"].append(out))
    for entry in entries:
        entry.run(block, 0)
    handle.remove()
    g = torch.Generator().manual_seed(1)
    for name in ("q_proj", "k_proj", "v_proj"):
        w = modules[f"self_attn.{name}"].weight
        w.data += 0.3 * w.std() * torch.randn(w.shape, generator=g)
    for entry in entries:
        entry.hidden = entry.hidden + 0.1 * torch.randn(entry.hidden.shape, generator=g)
    streams = [(a.hidden, b.hidden) for a, b in zip(original.entries, entries, strict=True)]
    walk = Walk(block, 0, entries, groups, {}, 1, original.watched)
    k = next(i for i, group in enumerate(groups) if "self_attn.o_proj" in group.names)
    x_hat = torch.cat([x.flatten(0, 1) for share in walk.collect(k, list) for _, x in share])
    H = x_hat.T @ x_hat / len(x_hat)
    correction = original.correction(walk, k, ["self_attn.o_proj"], H)
    assert correction.inputs is not None
    y = torch.cat([t.flatten(0, 1) for t in kept["y"]])
    whole = y + torch.cat([(h - h_hat).flatten(0, 1) for h, h_hat in streams])
    own = weight + weight @ correction.inputs
    goal = correction.goal("self_attn.o_proj", weight)
    assert error_of(own, x_hat, y) < 0.95 * error_of(weight, x_hat, y)
    assert error_of(goal, x_hat, whole) < error_of(own, x_hat, whole) < error_of(weight, x_hat, whole)
    walk.finish()
    original.leave()


@torch.no_grad()
def test_without_any_loss_the_goal_is_the_weight(tiny: Path) -> None:
    block, entries = enter(tiny)
    groups = input_groups(block, entries[0], 0)
    original = Original(entries, 1)
    original.enter(block, 0, groups)
    walk = Walk(block, 0, entries, groups, {}, 1, original.watched)
    for k, group in enumerate(groups):
        x = torch.cat([x.flatten(0, 1) for share in walk.collect(k, list) for _, x in share])
        correction = original.correction(walk, k, group.names, x.T @ x / len(x))
        for name in group.names:
            weight = linears(block)[name].weight
            assert torch.allclose(correction.goal(name, weight), weight, atol=1e-6)
    assert torch.equal(torch.cat(walk.finish()), torch.cat(walk_outputs(original)))


def walk_outputs(original: Original) -> list[Tensor]:
    original.leave()
    return [entry.hidden for entry in original.entries]


@torch.no_grad()
def test_held_out_batches_do_not_feed_the_goal(tiny: Path) -> None:
    block, entries = enter(tiny)
    groups = input_groups(block, entries[0], 0)
    name = groups[0].names[0]
    entries[-1].held_out = True
    goals = []
    for size in (0.0, 5.0):
        original = Original(entries, 1)
        original.enter(block, 0, groups)
        mine = [Entry(e.hidden + 0.1, e.arguments, e.held_out) for e in entries]
        mine[-1].hidden = mine[-1].hidden + size
        walk = Walk(block, 0, mine, groups, {}, 1, original.watched)
        x = torch.cat([x.flatten(0, 1) for share in walk.collect(0, list) for e, x in share if not e.held_out])
        correction = original.correction(walk, 0, [name], x.T @ x / len(x))
        goals.append(correction.goal(name, linears(block)[name].weight))
        walk.finish()
        original.leave()
    assert torch.equal(*goals)
