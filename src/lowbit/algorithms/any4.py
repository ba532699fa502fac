"""any4: sixteen values learned for every output row.

A row's weights, divided by their group's scale, are drawn from one distribution, and the best 16 values for it are
found by clustering them in one dimension (Elhoushi, Johnson 2025, "any4", section 3): for row i minimize over the
table T and the assignment c

    Σ_j a_j s_ij² (w_ij / s_ij - T[c_ij])²

where s_ij is the group's scale and a_j says what an error in column j costs: the diagonal of the Hessian, E[x_j²] (the
paper takes E|x_j| and s to the first power). Lloyd's iterations run for all rows at once; one-dimensional clusters are
intervals, so a round is a search in 15 thresholds and two sums a cluster. The exact optimum comes from a dynamic
programme over the sorted weights, D[k][j] = min_i D[k-1][i] + cost(i, j), whose best i never decreases with j
(Wu 1991; Grønlund et al. 2017): every level by divide and conquer, O(k n log n) a row. Run over bins of entries and
for many rows at once, it is what Lloyd starts from.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lowbit.algorithms.scale_search import search_qparams
from lowbit.numerics import choose_qparams, fixed_table, nearest_level, quantize
from lowbit.scheme import TensorScheme
from lowbit.tensor import QuantizedTensor

TABLE_DTYPE = torch.bfloat16
_BINS = 128  # of a row's entries, for the start of Lloyd's iterations
_ROWS = 64  # at a time


@dataclass(frozen=True)
class Any4Settings:
    """iterations: of Lloyd, at most. scale_search: group scales by weighted search instead of min-max."""

    iterations: int = 30
    scale_search: bool = False


def any4(
    weight: Tensor, hessian: Tensor | None, scheme: TensorScheme, settings: Any4Settings, scale_dtype: torch.dtype
) -> QuantizedTensor:
    """Learn the tables of weight (out, in) and round to them. `hessian` None: every column counts the same."""
    importance = None if hessian is None else hessian.diagonal()
    if settings.scale_search:
        scale, _ = search_qparams(weight, scheme, importance, scale_dtype)
    else:
        scale, _ = choose_qparams(weight, scheme, scale_dtype)
    table = learn_table(weight, scale, scheme, importance, settings.iterations)
    return QuantizedTensor(quantize(weight, scale, None, scheme, table), scale, None, scheme, table)


def start_table(rows: int, scheme: TensorScheme) -> Tensor:
    """(rows, entries): evenly spaced, the table of every row before learning."""
    levels = fixed_table(scheme)
    assert levels is not None
    return levels.to(TABLE_DTYPE).expand(rows, -1).contiguous()


def learn_table(
    weight: Tensor, scale: Tensor, scheme: TensorScheme, importance: Tensor | None, iterations: int = 30
) -> Tensor:
    """(out, entries) in bfloat16, ascending, for weight (out, in) and scales (out, groups)."""
    step = scale.float().repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    cost = step.square() if importance is None else step.square() * importance.clamp(min=0)
    table = kmeans_1d(weight.float() / step, cost, start_table(len(weight), scheme).float(), iterations)
    return table.to(TABLE_DTYPE)


def kmeans_1d(x: Tensor, cost: Tensor, start: Tensor, iterations: int) -> Tensor:
    """Lloyd's iterations for every row of x (rows, n) with costs (rows, n), from two starts: `start` (rows, k) and the
    optimum for the row's entries in bins. Returns the better table (rows, k), ascending; never worse than `start`."""
    best = start
    best_loss = clustering_loss(x, cost, start)
    for table in (start, binned_optimum(x, cost, start.shape[1])):
        for _ in range(iterations):
            moved = _centers(x, cost, table)
            if torch.equal(moved, table):
                break
            table = moved
        loss = clustering_loss(x, cost, table)
        better = loss < best_loss
        best = torch.where(better[:, None], table, best)
        best_loss = torch.minimum(loss, best_loss)
    return best


def clustering_loss(x: Tensor, cost: Tensor, table: Tensor) -> Tensor:
    """(rows,) weighted squared distance of x (rows, n) to the nearest entries of a table (rows, k)."""
    value = table.gather(1, nearest_level(x, table))
    return ((x - value).square() * cost).sum(1)


def _centers(x: Tensor, cost: Tensor, table: Tensor) -> Tensor:
    """Every entry moves to the weighted mean of what is nearest to it; one that has nothing stays."""
    index = nearest_level(x, table)
    mass = torch.zeros_like(table).scatter_add_(1, index, cost)
    moment = torch.zeros_like(table).scatter_add_(1, index, cost * x)
    return torch.where(mass > 0, moment / mass.clamp(min=1e-38), table).sort(1).values


def binned_optimum(x: Tensor, cost: Tensor, k: int) -> Tensor:
    """(rows, k) ascending: for every row the best k values for its entries gathered in bins, exactly; no bins are
    needed, and the result is the optimum, where a row has no more than that many entries."""
    return torch.cat([_binned_optimum(*pair, k) for pair in zip(x.split(_ROWS), cost.split(_ROWS), strict=True)])


def _binned_optimum(x: Tensor, cost: Tensor, k: int) -> Tensor:
    """All intervals' losses at once: D[j] = min_i D[i] + loss(i, j), k - 1 times for all rows."""
    ordered, order = x.double().sort(1)
    weight = cost.double().gather(1, order)
    mass, first, second = (_prefix(v, _bins(ordered, weight)) for v in _moments(ordered, weight))
    m, f, s = (p[:, None, :] - p[:, :, None] for p in (mass, first, second))  # (rows, from, to)
    loss = torch.where(m > 0, s - f * f / m.clamp(min=1e-300), 0.0).clamp(min=0)
    count = loss.shape[1]
    loss.masked_fill_(torch.ones(count, count).tril(-1).bool(), torch.inf)
    best, cuts = loss[:, 0], []
    for _ in range(k - 1):
        best, cut = (best[:, :, None] + loss).min(1)
        cuts.append(cut)
    ends = [torch.full((len(x), 1), count - 1)]
    for cut in reversed(cuts):
        ends.append(cut.gather(1, ends[-1]))
    bounds = torch.cat([torch.zeros(len(x), 1, dtype=torch.long), *reversed(ends)], 1)
    m, f = (p.gather(1, bounds).diff(dim=1) for p in (mass, first))
    centers = torch.where(m > 0, f / m.clamp(min=1e-300), ordered[:, :1])
    return centers.sort(1).values.to(x.dtype)


def _moments(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return weight, weight * x, weight * x * x


def _bins(ordered: Tensor, weight: Tensor) -> Tensor:
    """(rows, n) the bin of every sorted entry: equal shares of (density of cost)^(1/3), which is how the values of a
    fine quantizer are spread (Panter, Dite 1951); an entry's share is the cube root of cost times gap squared."""
    n = ordered.shape[1]
    if n <= _BINS:
        return torch.arange(n).expand(len(ordered), -1)
    gaps = torch.diff(ordered, prepend=ordered[:, :1]).clamp(min=1e-9)
    share = (weight.clamp(min=1e-20) * gaps.square()).pow(1 / 3).cumsum(1)
    return (share / share[:, -1:] * _BINS).long().clamp(max=_BINS - 1)


def _prefix(values: Tensor, bins: Tensor) -> Tensor:
    """(rows, bins + 1) sums of all bins before each."""
    count = min(_BINS, values.shape[1])
    total = torch.zeros(len(values), count + 1, dtype=values.dtype)
    return total.scatter_add_(1, bins + 1, values).cumsum(1)


def optimal_1d(x: Tensor, cost: Tensor, k: int) -> tuple[Tensor, float]:
    """The best k values for one row x (n,) with costs (n,), exactly: (values (k,) ascending, loss). float64."""
    ordered, order = x.double().sort()
    weight = cost.double()[order]
    zero = torch.zeros(1, dtype=torch.double)
    mass, first, second = (torch.cat([zero, (weight * ordered**p).cumsum(0)]) for p in (0, 1, 2))

    def interval(i: Tensor, j: int) -> Tensor:
        """Loss of one value for the sorted entries i to j - 1, for every i."""
        m, f, s = mass[j] - mass[i], first[j] - first[i], second[j] - second[i]
        return torch.where(m > 0, s - f * f / m.clamp(min=1e-300), 0.0).clamp(min=0)

    n = len(ordered)
    loss = torch.cat([zero, torch.stack([interval(torch.tensor(0), j) for j in range(1, n + 1)])])
    cuts = []
    for _ in range(k - 1):
        loss, cut = _one_more(loss, interval, n)
        cuts.append(cut)
    ends = [n]
    for cut in reversed(cuts):
        ends.append(int(cut[ends[-1]]))
    bounds = [0, *reversed(ends)]
    values = []
    for i, j in pairwise(bounds):
        empty = j == i or mass[j] == mass[i]
        values.append(ordered[min(i, n - 1)] if empty else (first[j] - first[i]) / (mass[j] - mass[i]))
    return torch.stack(values).sort().values, float(loss[n])


def _one_more(loss: Tensor, interval: Callable[[Tensor, int], Tensor], n: int) -> tuple[Tensor, Tensor]:
    """From the losses of the first j entries with m values to those with m + 1, and where the last value begins."""
    new, cut = torch.empty_like(loss), torch.zeros(n + 1, dtype=torch.long)
    stack = [(0, n, 0, n)]
    while stack:
        low, high, first, last = stack.pop()
        if low > high:
            continue
        j = (low + high) // 2
        starts = torch.arange(first, min(last, j) + 1)
        total = loss[starts] + interval(starts, j)
        best = int(total.argmin())
        new[j], cut[j] = total[best], starts[best]
        stack += [(low, j - 1, first, int(starts[best])), (j + 1, high, int(starts[best]), last)]
    return new, cut
