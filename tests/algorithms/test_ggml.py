"""Search and GPTQ on ggml's grids: less error than the plain way, never more by descending."""

import itertools

import pytest
import torch
from torch import Tensor

from lowbit.algorithms.ggml_gptq import block_order, gptq_blocks, refine
from lowbit.algorithms.ggml_search import search_blocks
from lowbit.formats.gguf_blocks import pack, unpack
from lowbit.ggml import Q3_K, Q4_0, Q4_K, TYPES, BlockTensor, BlockType
from lowbit.stats import quadratic_loss

BLOCK_TYPES = [t for t in TYPES.values() if isinstance(t, BlockType)]


@pytest.fixture(scope="module")
def layer() -> tuple[Tensor, Tensor]:
    """A weight (48, 512) and the Hessian of inputs as real ones are: a few directions carry most of it, and a few
    channels are loud."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 512, generator=generator) * torch.rand(48, 1, generator=generator)
    mix = torch.randn(512, 512, generator=generator) * torch.logspace(0, -2, 512)[:, None]
    x = torch.randn(2000, 512, generator=generator) @ mix
    x[:, ::50] *= 6
    return weight, x.T @ x / len(x)


def plain(weight: Tensor, kind: BlockType) -> Tensor:
    """Each group's own min-max scale (and offset) in float32: what two-level parameters can at most imitate."""
    groups = weight.reshape(len(weight), -1, kind.group)
    if kind.m is None:
        scale = groups.abs().amax(-1, keepdim=True) / -kind.q[0]
        return ((groups / scale).round().clamp(*kind.q) * scale).reshape(weight.shape)
    low = groups.amin(-1, keepdim=True)
    scale = (groups.amax(-1, keepdim=True) - low) / kind.q[1]
    return (((groups - low) / scale).round().clamp(*kind.q) * scale + low).reshape(weight.shape)


def weighted(error: Tensor, h: Tensor) -> float:
    return float((error.square() * h).sum())


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda t: t.name)
def test_search_beats_unquantized_min_max_scales(layer: tuple[Tensor, Tensor], kind: BlockType) -> None:
    """Although its scales are themselves rounded, to six bits or to half precision."""
    weight, H = layer
    h = H.diagonal()
    found = search_blocks(weight, kind, h)
    assert weighted(found.dequantize() - weight, h) < weighted(plain(weight, kind) - weight, h)


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda t: t.name)
def test_importance_lowers_the_error_it_weights(layer: tuple[Tensor, Tensor], kind: BlockType) -> None:
    weight, H = layer
    h = H.diagonal()
    with_it, without = (search_blocks(weight, kind, i).dequantize() - weight for i in (h, None))
    assert weighted(with_it, h) < weighted(without, h)
    assert weighted(without, torch.ones_like(h)) < weighted(with_it, torch.ones_like(h))


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda t: t.name)
def test_feedback_beats_search_and_sweeps_only_descend(layer: tuple[Tensor, Tensor], kind: BlockType) -> None:
    weight, H = layer

    def loss(tensor: BlockTensor) -> float:
        return quadratic_loss(weight - tensor.dequantize(), H)

    found = gptq_blocks(weight, H, kind, sweeps=0)
    assert loss(found) < 0.8 * loss(search_blocks(weight, kind, H.diagonal()))
    losses = [loss(found)]
    for _ in range(3):
        found = refine(weight, found, H)
        losses.append(loss(found))
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda t: t.name)
def test_what_was_found_can_be_stored(layer: tuple[Tensor, Tensor], kind: BlockType) -> None:
    weight, H = layer
    found = gptq_blocks(weight, H, kind, sweeps=1)
    assert torch.equal(unpack(pack(found), kind).dequantize(), found.dequantize())


@pytest.mark.parametrize("kind", [Q4_0, Q3_K, Q4_K], ids=lambda t: t.name)
def test_odd_blocks_give_finite_values(kind: BlockType) -> None:
    """All zero, constant, one huge entry, one sign only, tiny."""
    rows = torch.zeros(5, 256)
    rows[1], rows[2, 7], rows[3] = 3.0, 1e4, torch.rand(256, generator=torch.Generator().manual_seed(1)) + 5
    rows[4] = torch.randn(256, generator=torch.Generator().manual_seed(2)) * 1e-9
    H = torch.eye(256)
    H[9, 9] = 0  # a column that no token reached
    for found in (search_blocks(rows, kind, H.diagonal()), gptq_blocks(rows, H, kind)):
        values = found.dequantize()
        assert bool(torch.isfinite(values).all())
        assert not bool(values[0].any())
        assert float((values[1] - 3).abs().max()) < 0.25
        assert float((values[2] - rows[2]).abs().max()) < 1e3


def test_order_keeps_blocks_and_groups_together() -> None:
    order = block_order(torch.rand(1024, generator=torch.Generator().manual_seed(0)), Q4_K)
    assert sorted(order.tolist()) == list(range(1024))
    for start in range(0, 1024, 256):
        assert len({c // 256 for c in order[start : start + 256].tolist()}) == 1
    for start in range(0, 1024, 32):
        assert len({c // 32 for c in order[start : start + 32].tolist()}) == 1


def test_rows_do_not_depend_on_each_other(layer: tuple[Tensor, Tensor]) -> None:
    weight, H = layer
    whole, part = gptq_blocks(weight, H, Q4_K), gptq_blocks(weight[10:20], H, Q4_K)
    assert torch.allclose(whole.dequantize()[10:20], part.dequantize(), atol=1e-5)
