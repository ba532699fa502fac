"""The allocation is optimal: another solver and brute force find nothing better."""

import itertools

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from lowbit.errors import InputError
from lowbit.tuning import allocate as module
from lowbit.tuning.allocate import allocate


def problem(groups: int, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Losses that fall about fourfold a bit, from a sensitivity of its own for each group; costs in bits."""
    rng = np.random.default_rng(seed)
    bits = np.array([2.25, 2.5, 3.125, 3.25, 3.5, 4.125, 4.25, 4.5, 8.125])
    losses = [10 ** rng.uniform(-3, 0) * 4.0**-bits * rng.uniform(0.7, 1.3, len(bits)) for _ in range(groups)]
    costs = [int(rng.integers(1, 9)) * 65536 * bits for _ in range(groups)]
    return losses, costs


def by_milp(losses: list[np.ndarray], costs: list[np.ndarray], budget: float) -> float:
    one_each = np.zeros((len(losses), sum(map(len, losses))))
    at = 0
    for row, x in zip(one_each, losses, strict=True):
        row[at : at + len(x)] = 1
        at += len(x)
    result = milp(
        np.concatenate(losses) / 1e-4,
        integrality=np.ones(at),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(np.concatenate(costs)[None] / budget, 0, 1)],
        options={"mip_rel_gap": 0},
    )
    return float(result.fun) * 1e-4


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("bits", [2.6, 3.5, 5.0])
def test_as_good_as_a_mixed_integer_solver(seed: int, bits: float) -> None:
    losses, costs = problem(24, seed)
    budget = bits * sum(c[0] / 2.25 for c in costs)
    answer = allocate(losses, costs, budget)
    assert answer.cost <= budget * (1 + 1e-9)
    assert answer.loss == pytest.approx(by_milp(losses, costs, budget), rel=1e-6)
    assert answer.gap == 0
    assert answer.loss == pytest.approx(sum(x[o] for x, o in zip(losses, answer.choice, strict=True)))


@pytest.mark.parametrize("seed", range(20))
def test_as_good_as_trying_everything(seed: int) -> None:
    """Costs and losses without any order: no convexity is taken for granted."""
    rng = np.random.default_rng(seed)
    losses, costs = [rng.uniform(size=4) for _ in range(5)], [rng.uniform(size=4) for _ in range(5)]
    budget = sum(c.min() for c in costs) + rng.uniform(0, 2)
    feasible = [
        sum(x[o] for x, o in zip(losses, choice, strict=True))
        for choice in itertools.product(range(4), repeat=5)
        if sum(c[o] for c, o in zip(costs, choice, strict=True)) <= budget
    ]
    assert allocate(losses, costs, budget).loss == pytest.approx(min(feasible))


def test_a_group_that_matters_more_gets_more_bits() -> None:
    bits = np.array([3.125, 4.125, 8.125])
    losses = [4.0**-bits, 100 * 4.0**-bits, 4.0**-bits]
    answer = allocate(losses, [bits * 1000] * 3, budget=3.5 * 3000)
    assert answer.choice[1] > answer.choice[0] == answer.choice[2]


def test_merged_states_come_with_a_bound_that_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    losses, costs = [rng.uniform(size=9) for _ in range(40)], [rng.uniform(size=9) for _ in range(40)]
    exact = allocate(losses, costs, 12.0)
    monkeypatch.setattr(module, "MOST_STATES", 3)
    rough = allocate(losses, costs, 12.0)
    assert rough.bound <= exact.loss <= rough.loss
    assert rough.gap < 0.05


def test_a_budget_below_the_cheapest_choice_is_refused() -> None:
    with pytest.raises(InputError, match=r"the cheapest choice everywhere takes 3 of 2\.5"):
        allocate([[1.0, 0.5], [1.0, 0.2]], [[1, 2], [2, 3]], 2.5)
    assert allocate([[1.0, 0.5], [1.0, 0.2]], [[1, 2], [2, 3]], 3).choice == (0, 0)
    assert allocate([[1.0, 0.5], [1.0, 0.2]], [[1, 2], [2, 3]], 99).choice == (1, 1)
