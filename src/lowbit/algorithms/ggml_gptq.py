"""GPTQ on ggml's grids: error feedback, then exact descent, with scales in two levels.

algorithms/gptq.py tells the idea. What is added here: a block's d and dmin are searched on the weights as updated when
its first column is reached, a group's integers s and m again when the group is; blocks, groups in a block and columns
in a group are visited by their largest H_ii. Afterwards sweeps descend on  tr (W - Ŵ) H (W - Ŵ)ᵀ : with
G = (W - Ŵ) H, a step t along a direction X of one row changes its loss by  -2 t G·X + t² X H Xᵀ, which is exact for s,
m, d and dmin (X = d q, -dmin, s q, -m on their columns) and for each code; a step is taken where it lowers the loss
after rounding. Sweeps therefore never raise the loss.
"""

import torch
from torch import Tensor

from lowbit.algorithms.ggml_search import join, nearest, search_blocks
from lowbit.algorithms.gptq import Factor, alive, factorize
from lowbit.ggml import BlockTensor, BlockType

_NEIGHBOURS = 4  # integers tried on either side when a group's s is chosen again
_LAZY = 256  # columns between updates of the later ones
_ROWS = 2048  # rows worked on at once


def gptq_blocks(
    weight: Tensor, hessian: Tensor, kind: BlockType, dampening_frac: float = 0.01, sweeps: int = 3
) -> BlockTensor:
    """Quantize weight (out, in) into blocks of `kind` given H (in, in). Raises ValueError as `gptq` does."""
    H = alive(hessian.float())
    order = block_order(H.diagonal(), kind)
    factored = factorize(H, dampening_frac, order)
    parts = []
    for rows in weight.float().split(_ROWS):
        tensor = _feedback(rows, factored, order, kind)
        for _ in range(sweeps):
            tensor = refine(rows, tensor, H)
        parts.append(tensor)
    return join(parts)


def block_order(diagonal: Tensor, kind: BlockType) -> Tensor:
    """(in,) permutation: blocks, groups within, columns within, each by its largest H_ii."""
    groups = diagonal.reshape(-1, kind.block // kind.group, kind.group)
    columns = torch.arange(len(diagonal)).reshape(groups.shape)
    inside = groups.argsort(dim=-1, descending=True, stable=True)
    columns = columns.gather(2, inside)
    by_group = groups.amax(2).argsort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, by_group[:, :, None].expand_as(columns))
    return columns[groups.amax((1, 2)).argsort(descending=True, stable=True)].reshape(-1)


class _Grid:
    """The parameters of some rows while they are being chosen, and the float scale and offset of every group."""

    def __init__(self, rows: int, columns: int, kind: BlockType) -> None:
        blocks, groups = columns // kind.block, columns // kind.group
        self.kind, self.per_block = kind, kind.block // kind.group
        self.d, self.dmin = torch.zeros(rows, blocks), torch.zeros(rows, blocks)
        self.s, self.m = torch.ones(rows, groups), torch.zeros(rows, groups)
        self.scale, self.offset = torch.zeros(rows, groups), torch.zeros(rows, groups)

    @staticmethod
    def of(tensor: BlockTensor) -> "_Grid":
        grid = _Grid(tensor.codes.shape[0], tensor.codes.shape[1], tensor.type)
        grid.put(slice(None), slice(None), tensor)
        return grid

    def put(self, blocks: slice, groups: slice, tensor: BlockTensor) -> None:
        self.d[:, blocks], self.s[:, groups] = tensor.d.float(), tensor.s.float()
        if tensor.dmin is not None and tensor.m is not None:
            self.dmin[:, blocks], self.m[:, groups] = tensor.dmin.float(), tensor.m.float()
        scale, offset = tensor.steps()
        self.scale[:, groups] = scale
        if offset is not None:
            self.offset[:, groups] = offset

    def update(self) -> None:
        """scale and offset from d, s, dmin, m."""
        self.scale = self.d.repeat_interleave(self.per_block, 1) * self.s
        self.offset = self.dmin.repeat_interleave(self.per_block, 1) * self.m

    def tensor(self, codes: Tensor) -> BlockTensor:
        d, s = self.d.to(torch.float16), self.s.to(torch.int16)
        if self.kind.m is None:
            return BlockTensor(self.kind, codes.to(torch.int16), d, s)
        return BlockTensor(self.kind, codes.to(torch.int16), d, s, self.dmin.to(torch.float16), self.m.to(torch.int16))


def _feedback(weight: Tensor, factored: Factor, order: Tensor, kind: BlockType) -> BlockTensor:
    """The GPTQ pass over rows (out, in); the factor belongs to the permuted Hessian."""
    W = weight[:, order]  # what a column is rounded to: its weights, and repairs
    grid = _Grid(W.shape[0], W.shape[1], kind)
    codes = torch.empty_like(W)
    for start in range(0, W.shape[1], _LAZY):
        end = min(start + _LAZY, W.shape[1])
        W1, N1 = W[:, start:end].clone(), factored.N[start:end, start:end]
        E, importance = weight[:, order[start:end]], factored.D[start:end]
        for i, column in enumerate(order[start:end].tolist()):
            group = column // kind.group
            if i % kind.block == 0:
                _choose_block(grid, W1, i, order[start:end], importance)
            elif i % kind.group == 0:
                part = slice(i, i + kind.group)
                _choose_group(grid, group, W1[:, part], importance[part])
            scale, offset = grid.scale[:, group], grid.offset[:, group]
            q = nearest(W1[:, i], scale, offset, kind)
            codes[:, column] = q
            E[:, i] -= scale * q - offset
            W1[:, i + 1 :].addr_(E[:, i], N1[i, i + 1 :])
        W[:, end:].addmm_(E, factored.N[start:end, end:])
    return grid.tensor(codes)


def _choose_block(grid: _Grid, W1: Tensor, i: int, order: Tensor, importance: Tensor) -> None:
    """All parameters of the block whose first column (in visiting order) is the i-th, for its weights as of now."""
    kind = grid.kind
    columns = slice(i, i + kind.block)
    block = int(order[i]) // kind.block
    natural = order[columns].argsort()
    found = search_blocks(W1[:, columns][:, natural], kind, importance[columns][natural])
    first = block * grid.per_block
    grid.put(slice(block, block + 1), slice(first, first + grid.per_block), found)


def _choose_group(grid: _Grid, group: int, w: Tensor, h: Tensor) -> None:
    """The integers s and m of one group (rows, group) once more, d and dmin being fixed by now."""
    kind = grid.kind
    d, dmin = (x[:, group // grid.per_block, None] for x in (grid.d, grid.dmin))
    s0, m0 = grid.s[:, group, None], grid.m[:, group, None]
    total = h.sum()
    least = torch.full_like(d, torch.inf)
    best_s, best_m = s0, m0
    for step in range(-_NEIGHBOURS, _NEIGHBOURS + 1):
        s, m = (s0 + step).clamp(*kind.s), m0
        for _ in range(2):
            q = nearest(w, d * s, dmin * m, kind)
            error = (h * (w - d * s * q + dmin * m).square()).sum(1, keepdim=True)
            better = error < least
            least = torch.where(better, error, least)
            best_s, best_m = torch.where(better, s, best_s), torch.where(better, m, best_m)
            if kind.m is None:
                break
            wanted = (h * (d * s * q - w)).sum(1, keepdim=True) / total
            m = torch.where(dmin == 0, m, wanted / torch.where(dmin == 0, 1.0, dmin)).round().clamp(*kind.m)
    grid.s[:, group], grid.m[:, group] = best_s[:, 0], best_m[:, 0]
    grid.scale[:, group], grid.offset[:, group] = (d * best_s)[:, 0], (dmin * best_m)[:, 0]


def refine(weight: Tensor, tensor: BlockTensor, H: Tensor) -> BlockTensor:
    """One sweep: every group's s and m, every block's d and dmin, every column's codes."""
    kind = tensor.type
    grid, codes = _Grid.of(tensor), tensor.codes.float()
    G = (weight.float() - tensor.dequantize()) @ H
    if kind.s != (1, 1):
        for group in range(grid.s.shape[1]):
            _refine_group(grid, group, codes, G, H)
    for block in range(grid.d.shape[1]):
        _refine_block(grid, block, codes, G, H)
    grid.update()
    _refine_codes(grid, codes, G, H)
    return grid.tensor(codes)


def _refine_group(grid: _Grid, group: int, codes: Tensor, G: Tensor, H: Tensor) -> None:
    kind = grid.kind
    columns = slice(group * kind.group, (group + 1) * kind.group)
    block = group // grid.per_block
    along = grid.d[:, block, None] * codes[:, columns]
    down = (-grid.dmin[:, block, None]).expand_as(along)
    steps = _Plane(along, down, G[:, columns], H[columns, columns])
    s0, m0 = grid.s[:, group], grid.m[:, group]
    ds, dm = torch.zeros_like(s0), torch.zeros_like(m0)
    gain = torch.zeros_like(s0)
    best_s, _ = steps.optimum()
    for candidate in (s0, s0 + best_s, s0 - 1, s0 + 1):
        step = candidate.round().clamp(*kind.s) - s0
        other = torch.zeros_like(m0)
        if kind.m is not None:
            other = (m0 + steps.second(step)).round().clamp(*kind.m) - m0
        won = steps.gain(step, other)
        better = won > gain
        gain, ds, dm = (torch.where(better, x, y) for x, y in ((won, gain), (step, ds), (other, dm)))
    grid.s[:, group], grid.m[:, group] = s0 + ds, m0 + dm
    G.addmm_(ds[:, None] * along + dm[:, None] * down, H[columns], alpha=-1)


def _refine_block(grid: _Grid, block: int, codes: Tensor, G: Tensor, H: Tensor) -> None:
    kind = grid.kind
    columns = slice(block * kind.block, (block + 1) * kind.block)
    groups = slice(block * grid.per_block, (block + 1) * grid.per_block)
    along = grid.s[:, groups].repeat_interleave(kind.group, 1) * codes[:, columns]
    down = -grid.m[:, groups].repeat_interleave(kind.group, 1)
    steps = _Plane(along, down, G[:, columns], H[columns, columns])
    best, _ = steps.optimum()
    d0, dmin0 = grid.d[:, block].clone(), grid.dmin[:, block].clone()
    d = (d0 + best).to(torch.float16).float()
    d = torch.where((d == 0) | ~torch.isfinite(d), d0, d)
    dmin = (dmin0 + steps.second(d - d0)).to(torch.float16).float()
    dmin = torch.where(torch.isfinite(dmin), dmin, dmin0)
    better = steps.gain(d - d0, dmin - dmin0) > 0
    d, dmin = torch.where(better, d, d0), torch.where(better, dmin, dmin0)
    grid.d[:, block], grid.dmin[:, block] = d, dmin
    G.addmm_((d - d0)[:, None] * along + (dmin - dmin0)[:, None] * down, H[columns], alpha=-1)


class _Plane:
    """The loss along two directions of every row: slopes and curvatures of x (rows, n) and y (rows, n)."""

    def __init__(self, x: Tensor, y: Tensor, G: Tensor, H: Tensor) -> None:
        hx = x @ H
        self.gx, self.gy = (G * x).sum(1), (G * y).sum(1)
        self.xx, self.xy, self.yy = (hx * x).sum(1), (hx * y).sum(1), ((y @ H) * y).sum(1)

    def optimum(self) -> tuple[Tensor, Tensor]:
        """The best real steps (along x, along y)."""
        spread = self.xx * self.yy - self.xy.square()
        solid = spread > 1e-6 * self.xx * self.yy
        safe = torch.where(solid, spread, 1.0)
        alone = torch.where(self.xx > 0, self.gx / self.xx.clamp(min=1e-30), 0.0)
        along = torch.where(solid, (self.gx * self.yy - self.gy * self.xy) / safe, alone)
        return along, torch.where(solid, (self.gy * self.xx - self.gx * self.xy) / safe, 0.0)

    def second(self, step: Tensor) -> Tensor:
        """The best step along y after `step` along x."""
        return torch.where(self.yy > 0, (self.gy - step * self.xy) / self.yy.clamp(min=1e-30), 0.0)

    def gain(self, a: Tensor, b: Tensor) -> Tensor:
        """By how much the loss falls."""
        bend = a.square() * self.xx + 2 * a * b * self.xy + b.square() * self.yy
        return 2 * (a * self.gx + b * self.gy) - bend


def _refine_codes(grid: _Grid, codes: Tensor, G: Tensor, H: Tensor) -> None:
    """Each column's codes given all other columns, in place."""
    kind, diagonal = grid.kind, H.diagonal()
    for start in range(0, codes.shape[1], _LAZY):
        end = min(start + _LAZY, codes.shape[1])
        G1, H1 = G[:, start:end].clone(), H[start:end, start:end]
        change = torch.zeros_like(G1)
        for i in range(end - start):
            j = start + i
            scale, offset = grid.scale[:, j // kind.group], grid.offset[:, j // kind.group]
            now = scale * codes[:, j] - offset
            q = nearest(now + G1[:, i] / diagonal[j], scale, offset, kind)
            change[:, i] = scale * (q - codes[:, j])
            codes[:, j] = q
            G1.addr_(change[:, i], H1[i], alpha=-1)
        G.addmm_(change, H[start:end], alpha=-1)
