from itertools import combinations

import pytest
import torch
from torch import Tensor

from lowbit.algorithms.any4 import (
    Any4Settings,
    any4,
    binned_optimum,
    clustering_loss,
    kmeans_1d,
    learn_table,
    optimal_1d,
    start_table,
)
from lowbit.algorithms.gptq import GPTQSettings, gptq
from lowbit.algorithms.rtn import rtn
from lowbit.numerics import choose_qparams
from lowbit.scheme import Scheme, TensorScheme
from lowbit.stats import quadratic_loss


def grid(text: str) -> TensorScheme:
    scheme = Scheme.parse(text).weight
    assert scheme is not None
    return scheme


def rows(count: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, n, generator=g), torch.rand(count, n, generator=g) + 0.05


def brute_force(x: Tensor, cost: Tensor, k: int) -> float:
    """The least loss over all ways to cut the sorted row into k runs."""
    ordered, order = x.double().sort()
    weight = cost.double()[order]
    best = float("inf")
    for cuts in combinations(range(1, len(x)), k - 1):
        total = 0.0
        for i, j in zip((0, *cuts), (*cuts, len(x)), strict=True):
            mean = (weight[i:j] * ordered[i:j]).sum() / weight[i:j].sum()
            total += float((weight[i:j] * (ordered[i:j] - mean).square()).sum())
        best = min(best, total)
    return best


@pytest.mark.parametrize(("n", "k"), [(7, 2), (9, 3), (10, 4), (11, 5)])
def test_the_dynamic_programme_finds_the_optimum(n: int, k: int) -> None:
    for seed in range(3):
        x, cost = rows(1, n, seed)
        values, loss = optimal_1d(x[0], cost[0], k)
        assert loss == pytest.approx(brute_force(x[0], cost[0], k), rel=1e-9)
        assert loss == pytest.approx(float(clustering_loss(x.double(), cost.double(), values[None])[0]), rel=1e-6)


def test_the_dynamic_programme_on_fewer_distinct_values_than_entries() -> None:
    x = torch.tensor([1.0, 1.0, 2.0, 2.0, 2.0])
    values, loss = optimal_1d(x, torch.ones(5), 4)
    assert loss == pytest.approx(0)
    assert {1.0, 2.0} <= set(values.tolist())


def test_kmeans_is_never_above_its_start_and_near_the_optimum() -> None:
    x, cost = rows(12, 400)
    start = torch.linspace(-2, 2, 16).expand(12, -1).contiguous()
    table = kmeans_1d(x, cost, start, 100)
    found, before = clustering_loss(x, cost, table), clustering_loss(x, cost, start)
    assert bool((found <= before).all())
    best = torch.tensor([optimal_1d(a, c, 16)[1] for a, c in zip(x, cost, strict=True)])
    assert bool((found >= best * (1 - 1e-4)).all())
    assert float((found / best).mean()) < 1.02
    assert bool((table.diff(dim=1) >= 0).all())


def test_few_entries_need_no_bins_and_give_the_optimum() -> None:
    x, cost = rows(5, 90)
    table = binned_optimum(x, cost, 8)
    best = [optimal_1d(a, c, 8)[1] for a, c in zip(x, cost, strict=True)]
    assert clustering_loss(x, cost, table).tolist() == pytest.approx(best, rel=1e-4)


def problem() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(800, 256, generator=g) @ torch.randn(256, 256, generator=g) * 0.1
    x = x * torch.rand(256, generator=g).exp() + 0.1
    return torch.randn(48, 256, generator=g) * 0.05, x.T @ x / 800


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_learned_tables_beat_even_ones_and_feedback_beats_both(bits: int) -> None:
    weight, H = problem()
    scheme = grid(f"any{bits}")
    even = quadratic_loss(weight - rtn(weight, scheme, torch.bfloat16).dequantize(), H)
    learned = quadratic_loss(weight - any4(weight, H, scheme, Any4Settings(), torch.bfloat16).dequantize(), H)
    fed_back, _ = gptq(weight, H, scheme, GPTQSettings(), torch.bfloat16)
    assert learned < 0.8 * even
    assert quadratic_loss(weight - fed_back.dequantize(), H) < 0.8 * learned


def test_tables_are_learned_row_by_row() -> None:
    """Rows on different 16-value tables come back exactly, which no shared table could do."""
    g = torch.Generator().manual_seed(0)
    tables = torch.rand(6, 16, generator=g).sort(1).values.bfloat16().float()
    weight = tables.gather(1, torch.randint(0, 16, (6, 256), generator=g))
    weight[:, ::128] = 1.0  # the group's scale is 1 exactly
    scheme = grid("any4")
    scale, _ = choose_qparams(weight, scheme)
    table = learn_table(weight, torch.ones_like(scale), scheme, None, 100)
    loss = clustering_loss(weight, torch.ones_like(weight), table.float())
    even = clustering_loss(weight, torch.ones_like(weight), start_table(6, scheme).float())
    assert bool((loss < 0.05 * even).all())


def test_bits_count_the_tables() -> None:
    weight, H = problem()
    quantized = any4(weight, H, grid("any4"), Any4Settings(), torch.bfloat16)
    assert quantized.stored_bits / quantized.numel == pytest.approx(4 + 16 / 128 + 16 * 16 / 256)
