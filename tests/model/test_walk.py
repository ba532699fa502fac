from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from lowbit.errors import InputError
from lowbit.model.lockstep import Lockstep, Walk
from lowbit.model.walk import Entry, capture_entries, find_blocks, input_groups, linears
from lowbit.numerics import fake_quantize_activation
from lowbit.scheme import TensorScheme
from lowbit.tensor import InputGrid

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "mistral": MistralConfig(**SMALL, sliding_window=4),
    "gemma2": Gemma2Config(**SMALL, sliding_window=4),
}
GROUPS = [
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
]


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model.requires_grad_(False)


def batches(n: int = 3) -> list[Tensor]:
    return list(torch.randint(0, 256, (n, 2, 12), generator=torch.Generator().manual_seed(1)))


def hooked(model: Any, tokens: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Every linear's input by full name, and the hidden states after each block, of a plain forward pass."""
    inputs: dict[str, Tensor] = {}
    outputs: list[Tensor] = []
    handles = [
        m.register_forward_pre_hook(lambda _m, args, n=n: inputs.__setitem__(n, args[0]))
        for n, m in linears(model).items()
    ]
    for block in model.get_submodule(find_blocks(model).name):
        keep = lambda _m, _a, out: outputs.append(out[0] if isinstance(out, tuple) else out)  # noqa: E731
        handles.append(block.register_forward_hook(keep))
    model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return inputs, outputs


def test_blocks_and_input_groups(model: Any) -> None:
    blocks = find_blocks(model)
    assert blocks.name == "model.layers"
    assert blocks.names == ("model.layers.0", "model.layers.1", "model.layers.2")
    (entry,) = capture_entries(model, blocks, batches(1))
    for i, name in enumerate(blocks.names):
        assert [g.names for g in input_groups(model.get_submodule(name), entry, i)] == GROUPS


def test_entries_are_what_the_first_block_gets_and_leave_the_model_whole(model: Any) -> None:
    blocks = find_blocks(model)
    members = list(model.get_submodule(blocks.name))
    seen: list[Tensor] = []
    entries = capture_entries(model, blocks, batches())
    assert list(model.get_submodule(blocks.name)) == members
    handle = members[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    for tokens in batches():
        model(input_ids=tokens, use_cache=False)
    handle.remove()
    for entry, hidden in zip(entries, seen, strict=True):
        assert torch.equal(entry.hidden, hidden)
        assert len(entry.arguments) == 3  # one set a block: sliding-window and full masks differ by layer


def test_walking_is_the_plain_forward_pass(model: Any) -> None:
    """Same inputs of every linear, same hidden states after every block, and one call of each linear a batch."""
    blocks = find_blocks(model)
    plain = [hooked(model, tokens) for tokens in batches()]
    entries = capture_entries(model, blocks, batches())
    for i, name in enumerate(blocks.names):
        block = model.get_submodule(name)
        groups = input_groups(block, entries[0], i)
        calls: Counter[str] = Counter()
        handles = [
            m.register_forward_hook(lambda *_, n=n: calls.update([n]))  # noqa: B023
            for n, m in linears(block).items()
        ]
        walk = Lockstep(block, i, entries, groups, {})
        for k, group in enumerate(groups):
            inputs = [x for _, x in walk.inputs(k)]
            assert len(inputs) == len(entries)
            for x, (theirs, _) in zip(inputs, plain, strict=True):
                for local in group.names:
                    assert torch.equal(x, theirs[f"{name}.{local}"])
        for entry, hidden, (_, outputs) in zip(entries, walk.finish(), plain, strict=True):
            assert torch.equal(hidden, outputs[i])
            entry.hidden = hidden
        for handle in handles:
            handle.remove()
        assert calls == {local: len(entries) for local in linears(block)}


def test_hooks_are_gone_after_the_walk(model: Any) -> None:
    blocks = find_blocks(model)
    entries = capture_entries(model, blocks, batches(1))
    Lockstep(model.get_submodule(blocks.names[0]), 0, entries, (), {}).finish()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def llama(**words: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**(SMALL | words))).eval().requires_grad_(False)


def entries_of(model: Any, n: int = 3) -> list[Entry]:
    return capture_entries(model, find_blocks(model), batches(n))


def test_a_replaced_weight_is_what_later_groups_see() -> None:
    """True sequential order: zeroing q, k and v while all wait there changes o's input, as a plain pass would."""
    model, changed = llama(), llama()
    block = model.model.layers[0]
    for module in (block, changed.model.layers[0]):
        groups = input_groups(module, entries_of(model, 1)[0], 0)
    for local in groups[0].names:
        changed.model.layers[0].get_submodule(local).weight.mul_(0.5)
    expected, outputs = hooked(changed, batches(1)[0])
    walk = Lockstep(block, 0, entries_of(model, 1), groups, {})
    list(walk.inputs(0))
    for local in groups[0].names:
        block.get_submodule(local).weight.mul_(0.5)
    ((_, x),) = walk.inputs(1)
    assert torch.equal(x, expected["model.layers.0.self_attn.o_proj"])
    (hidden,) = walk.finish()
    assert torch.equal(hidden, outputs[0])


def test_groups_may_be_skipped() -> None:
    model = llama()
    entries = entries_of(model)
    block = model.model.layers[0]
    groups = input_groups(block, entries[0], 0)
    expected = [entry.run(block, 0) for entry in entries]
    walk = Lockstep(block, 0, entries, groups, {})
    assert len(list(walk.inputs(2))) == 3
    for mine, theirs in zip(walk.finish(), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_activations_are_rounded_in_the_walk_and_statistics_see_them_unrounded() -> None:
    model = llama()
    entries = entries_of(model, 1)
    block, grid = model.model.layers[0], TensorScheme("int", 8, "token")
    groups = input_groups(block, entries[0], 0)
    plain = Lockstep(block, 0, entries, groups, {})
    ((_, raw),) = plain.inputs(0)
    plain.finish()
    walk = Lockstep(block, 0, entries, groups, dict.fromkeys(linears(block), InputGrid(grid)))
    ((_, x),) = walk.inputs(0)
    assert torch.equal(x, raw)
    (mine,) = walk.finish()
    handles = [
        m.register_forward_pre_hook(lambda _m, args: (fake_quantize_activation(args[0], grid),))
        for m in linears(block).values()
    ]
    assert torch.equal(mine, entries[0].run(block, 0))
    for handle in handles:
        handle.remove()


def test_blocks_that_return_tuples() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, hidden: Tensor, scale: float) -> tuple[Tensor, None]:
            return hidden + scale * self.linear(hidden), None

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(256, 8)
            self.h = nn.ModuleList(Block() for _ in range(3))
            self.heads = nn.ModuleList(nn.Linear(8, 2) for _ in range(5))  # another list, with fewer parameters

        def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
            assert not use_cache
            x = self.embed(input_ids)
            for i, block in enumerate(self.h):
                x = block(x, scale=float(i + 1))[0]
            return x

    model = Model().requires_grad_(False)
    blocks = find_blocks(model)
    assert blocks.names == ("h.0", "h.1", "h.2")
    (entry,) = capture_entries(model, blocks, batches(1))
    for i, name in enumerate(blocks.names):
        (entry.hidden,) = Lockstep(model.get_submodule(name), i, [entry], (), {}).finish()
    assert torch.equal(entry.hidden, model(batches(1)[0], use_cache=False))


def test_a_model_without_blocks() -> None:
    with pytest.raises(InputError, match="Sequential: no list of equal blocks"):
        find_blocks(nn.Sequential(nn.Linear(2, 2)))


def test_experts_inside_a_block_are_not_the_blocks() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(16))

    model = nn.Module()
    model.layers = nn.ModuleList(Mixture() for _ in range(2))
    assert find_blocks(model).name == "layers"
    single = nn.Module()
    single.layers = nn.ModuleList([Mixture()])  # as many parameters in the list inside as in the list outside
    assert find_blocks(single).name == "layers"


def test_threads_share_the_batches_and_compute_the_same() -> None:
    """Five batches on two threads give what they give on one, in order, each group once a batch."""
    model = llama()
    block = model.get_submodule(find_blocks(model).names[0])
    entries = entries_of(model, 5)
    expected = [e.run(block, 0) for e in entries]
    groups = input_groups(block, entries[0], 0)
    walk = Walk(block, 0, entries, groups, {}, threads=2)
    seen = walk.collect(0, lambda inputs: [entry for entry, _ in inputs])
    assert [len(share) for share in seen] == [3, 2]
    assert [e for share in seen for e in share] == entries
    for mine, theirs in zip(walk.finish(), expected, strict=True):
        assert torch.equal(mine, theirs)
    assert not any(m._forward_pre_hooks for m in block.modules())
