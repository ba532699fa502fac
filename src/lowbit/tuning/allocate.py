"""Which scheme for which group of linears, so that the expected loss is least within a budget.

    minimize  sum_u loss[u][choice_u]    subject to  sum_u cost[u][choice_u] <= budget

the multiple-choice knapsack (Kellerer, Pferschy and Pisinger, "Knapsack Problems", 2004, ch. 11). Costs are stored
bits, bytes or measured seconds. Two bounds make it exact in practice:

* Lagrange: for any price p >= 0, sum_u min_o (loss + p cost) - p budget is never above the optimum. The best price
  gives a bound, and a feasible answer next to it.
* Dynamic programming over the groups keeps only (cost, loss) states that no other one beats in both, and of those
  only the ones whose cost and loss, with the Lagrange bound for all groups still to come, can beat the best answer.

If more than MOST_STATES remain, states of nearly equal cost are merged and the gap to the bound says what that may
have lost.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowbit.errors import InputError

MOST_STATES = 200_000
_PRICES = 200  # halvings of the interval that holds the best price


@dataclass(frozen=True)
class Allocation:
    """The index chosen for each group, what it costs and loses, and a bound that no choice can go below."""

    choice: tuple[int, ...]
    cost: float
    loss: float
    bound: float

    @property
    def gap(self) -> float:
        """How far above the bound, relative: 0 is proven optimal."""
        return 0.0 if self.loss <= self.bound else (self.loss - self.bound) / max(abs(self.loss), 1e-300)


def allocate(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float) -> Allocation:
    """The best choice of one option for each group. Raises InputError if even the cheapest options exceed `budget`."""
    loss, cost = [np.asarray(x, dtype=float) for x in losses], [np.asarray(x, dtype=float) for x in costs]
    least = sum(float(c.min()) for c in cost)
    if least > budget * (1 + 1e-12):
        raise InputError(f"the budget cannot be met: the cheapest choice everywhere takes {least:.6g} of {budget:.6g}.")
    budget *= 1 + 1e-12  # what rounding adds up to in a sum
    price, bound, start = _lagrange(loss, cost, budget)
    choice, exact = _states(loss, cost, budget, price, start)
    total_cost, total_loss = _totals(loss, cost, choice)
    return Allocation(choice, total_cost, total_loss, total_loss if exact else bound)


def _totals(loss: list[np.ndarray], cost: list[np.ndarray], choice: Sequence[int]) -> tuple[float, float]:
    return tuple(sum(float(x[o]) for x, o in zip(xs, choice, strict=True)) for xs in (cost, loss))  # type: ignore[return-value]


def _lagrange(loss: list[np.ndarray], cost: list[np.ndarray], budget: float) -> tuple[float, float, tuple[int, ...]]:
    """(price, bound, a choice within the budget): bisection on the price, at which the cost falls."""

    def answer(price: float) -> tuple[int, ...]:
        # among equals the cheaper one, so that a high price ends at the cheapest choice
        return tuple(int(np.lexsort((c, x + price * c))[0]) for x, c in zip(loss, cost, strict=True))

    low, high = 0.0, 1.0
    if _totals(loss, cost, answer(0.0))[0] <= budget:
        choice = answer(0.0)
        return 0.0, _totals(loss, cost, choice)[1], choice
    while _totals(loss, cost, answer(high))[0] > budget:
        if high > 1e300:
            return high, float("-inf"), tuple(int(np.lexsort((x, c))[0]) for x, c in zip(loss, cost, strict=True))
        high *= 4
    for _ in range(_PRICES):
        middle = (low + high) / 2
        if _totals(loss, cost, answer(middle))[0] > budget:
            low = middle
        else:
            high = middle
    bounds = {
        p: sum(float((x + p * c).min()) for x, c in zip(loss, cost, strict=True)) - p * budget for p in (low, high)
    }
    price = max(bounds, key=lambda p: bounds[p])
    return price, bounds[price], answer(high)


def _states(
    loss: list[np.ndarray], cost: list[np.ndarray], budget: float, price: float, start: tuple[int, ...]
) -> tuple[tuple[int, ...], bool]:
    """Dynamic programming from the feasible choice `start`: (the best choice, whether nothing was merged)."""
    best = _totals(loss, cost, start)[1]
    scale = max(abs(best), 1e-300)
    # what the groups from u on take at least: in cost, and in loss + price x cost
    rest_cost = np.append(np.cumsum([c.min() for c in cost][::-1])[::-1], 0.0)
    rest_both = np.append(np.cumsum([(x + price * c).min() for x, c in zip(loss, cost, strict=True)][::-1])[::-1], 0.0)
    at_cost, at_loss = np.zeros(1), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    exact = True
    for u, (x, c) in enumerate(zip(loss, cost, strict=True)):
        new_cost = (at_cost[:, None] + c).ravel()
        new_loss = (at_loss[:, None] + x).ravel()
        parent = np.repeat(np.arange(len(at_cost)), len(c))
        option = np.tile(np.arange(len(c)), len(at_cost))
        hopeful = new_loss + rest_both[u + 1] - price * (budget - new_cost) <= best + 1e-9 * scale
        keep = np.flatnonzero((new_cost + rest_cost[u + 1] <= budget) & hopeful)
        order = keep[np.lexsort((new_loss[keep], new_cost[keep]))]
        falls = np.minimum.accumulate(np.append(np.inf, new_loss[order]))[:-1] > new_loss[order]
        order = order[falls]
        if len(order) > MOST_STATES:
            order, exact = order[np.linspace(0, len(order) - 1, MOST_STATES).astype(int)], False
        if not len(order):  # only rounding can prune everything: the Lagrange choice is as good
            return start, True
        at_cost, at_loss = new_cost[order], new_loss[order]
        trail.append((parent[order], option[order]))
    at = int(at_loss.argmin())
    if at_loss[at] > best:
        return start, exact
    choice = []
    for parent, option in reversed(trail):
        choice.append(int(option[at]))
        at = int(parent[at])
    return tuple(reversed(choice)), exact
