"""E8P: eight weights as one of 2^16 points of the densest packing in eight dimensions (2 bits a weight).

E8 = D8 ∪ (D8 + ½), D8 the integer points of even sum. A ball of E8 + ¼ is the best known fixed-rate quantizer of
Gaussians that needs no large table (Tseng et al. 2024, "QuIP#", section 4.2). A point of D8 + ½ has half-integer
entries, and flipping one sign changes its sum's parity: so it is an absolute vector, seven free signs, and an eighth
sign that makes the sum even. With 256 absolute vectors, seven signs and a shift of ±¼ the index has 16 bits:

    bits 0-7  absolute vector        bits 8-14  signs of entries 0-6        bit 15  shift: 0 is +¼, 1 is −¼

The 256 vectors are the 227 of norm² ≤ 10 and 29 of norm² 12. More bits come from quantizing what is left over again
("residual", section 4.3): at 4 bits by a second E8P, at 3 bits by the 256 shortest points of E8.
"""

from functools import cache
from itertools import combinations, product

import torch
from torch import Tensor

WIDTH = 8  # weights a code
STAGE_BITS = {2: (16,), 3: (16, 8), 4: (16, 16)}
# What the leftover is multiplied by before the second stage.
RESIDUAL_SCALE = {3: 2.04, 4: 3.45}
# Root mean square of the weights in units of the scale, least squared error for Gaussian weights.
RMS = {2: 1.03, 3: 0.98, 4: 1.03}
_CHUNK = 1024


@cache
def absolute_vectors() -> Tensor:
    """(256, 8) float32, entries ½, 3/2, 5/2."""
    ball = [v for v in product((0.5, 1.5, 2.5), repeat=WIDTH) if sum(x * x for x in v) <= 10]
    shell = []
    for large in combinations(range(WIDTH), 5):
        shell.append(tuple(1.5 if i in large else 0.5 for i in range(WIDTH)))
    return torch.tensor(ball + shell[: 256 - len(ball)])


@cache
def codebook() -> Tensor:
    """(65536, 8) float32: the point of every index."""
    index = torch.arange(1 << 16)
    size = absolute_vectors()[index & 255]
    negative = (index[:, None] >> torch.arange(8, 15)) & 1
    odd = (size.sum(1).long() + negative.sum(1)) % 2  # flipping an entry changes the sum by an odd number
    signs = 1 - 2 * torch.cat([negative, odd[:, None]], 1)
    return size * signs + torch.where(index < 1 << 15, 0.25, -0.25)[:, None]


@cache
def short_vectors() -> Tensor:
    """(256, 8) float32: 0, the 240 of E8 of norm² 2, and 15 of norm² 4."""
    halves = [v for v in product((-0.5, 0.5), repeat=WIDTH) if sum(v) % 2 == 0]
    pairs = []
    for i, j in combinations(range(WIDTH), 2):
        for a, b in product((-1.0, 1.0), repeat=2):
            pairs.append(tuple(a if k == i else b if k == j else 0.0 for k in range(WIDTH)))
    doubles = [tuple(s if k == i else 0.0 for k in range(WIDTH)) for i in range(WIDTH) for s in (2.0, -2.0)]
    return torch.tensor([(0.0,) * WIDTH, *halves, *pairs, *doubles[:15]])


@cache
def _absolute_index() -> Tensor:
    """(3^8,) int64: the index of the absolute vector whose entries, less ½, are the digits to base 3; -1 if none."""
    index = torch.full((3**WIDTH,), -1)
    index[((absolute_vectors() - 0.5).long() * _BASE_3).sum(1)] = torch.arange(256)
    return index


_BASE_3 = 3 ** torch.arange(WIDTH)


def nearest_e8p(x: Tensor) -> Tensor:
    """(n, 8) -> int32 (n,): the index of the nearest of the 65536 points.

    Most x lie where the nearest point of the whole lattice E8 + ¼ is one of them; only the others, far out, need the
    search over all absolute vectors.
    """
    distances, codes = zip(*(_nearest_of_coset(x, shift) for shift in (0, 1)), strict=True)
    code = torch.where(distances[1] < distances[0], codes[1], codes[0])
    outside = (code < 0).nonzero()[:, 0]
    for rows in outside.split(_CHUNK):
        code[rows] = _search(x[rows])
    return code


def _nearest_of_coset(x: Tensor, shift_bit: int) -> tuple[Tensor, Tensor]:
    """Squared distance (n,) to the nearest point of D8 + ½ ± ¼ and its index, -1 if it is not in the codebook:
    every entry goes to the nearest half-integer and, if the sum is odd, the least certain one to the next."""
    y = x - (0.25, -0.25)[shift_bit]
    point = y.floor() + 0.5
    off = y - point
    odd = point.sum(1).long() % 2 != 0
    worst = off.abs().argmax(1, keepdim=True)
    other = torch.where(off.gather(1, worst) < 0, -1.0, 1.0)
    point = point.scatter_add(1, worst, other * odd[:, None])
    size = (point.abs() - 0.5).long()
    inside = (size <= 2).all(1)
    index = torch.where(inside, _absolute_index()[(size.clamp(max=2) * _BASE_3).sum(1)], -1)
    code = index + ((point[:, :7] < 0) << torch.arange(8, 15)).sum(1) + (shift_bit << 15)
    return (y - point).square().sum(1), torch.where(index < 0, -1, code).int()


def _search(x: Tensor) -> Tensor:
    """For both shifts: signs follow x; where the sum is odd, the cheapest entry is flipped; best absolute vector."""
    size = absolute_vectors()
    parity = size.sum(1) % 2  # of the sum with all signs positive
    best_score, best = torch.full((len(x),), -torch.inf), torch.zeros(len(x), dtype=torch.int32)
    for shift_bit, shift in enumerate((0.25, -0.25)):
        y = x - shift
        negative = y < 0
        z = y.abs()
        flips = (negative.sum(1) % 2).float()[:, None]
        odd = flips + parity - 2 * flips * parity  # (n, 256): 0 or 1
        cheapest = z[:, :1] * size[:, 0]
        product = torch.empty_like(cheapest)
        for i in range(1, WIDTH):
            torch.minimum(cheapest, torch.mul(z[:, i : i + 1], size[:, i], out=product), out=cheapest)
        score = torch.addmm(-size.square().sum(1) / 2, z, size.T) - 2 * odd * cheapest
        value, which = score.max(1)
        value = value - y.square().sum(1) / 2  # minus half the squared distance
        flip = (z * size[which]).argmin(1)
        turn = odd.gather(1, which[:, None])[:, 0] > 0
        signs = negative ^ (torch.nn.functional.one_hot(flip, WIDTH).bool() & turn[:, None])
        code = which + (signs[:, :7].long() << torch.arange(8, 15)).sum(1) + (shift_bit << 15)
        best = torch.where(value > best_score, code.int(), best)
        best_score = torch.maximum(best_score, value)
    return best


def nearest_short(x: Tensor) -> Tensor:
    """(n, 8) -> int32 (n,): the index of the nearest of the 256 short vectors."""
    points = short_vectors()
    return torch.addmm(-points.square().sum(1) / 2, x, points.T).argmax(1).int()


def encode(x: Tensor, bits: int) -> Tensor:
    """x (n, 8) in units of the scale -> codes int32 (n, stages)."""
    first = nearest_e8p(x)
    if bits == 2:
        return first[:, None]
    rest = (x - codebook()[first]) * RESIDUAL_SCALE[bits]
    return torch.stack([first, nearest_short(rest) if bits == 3 else nearest_e8p(rest)], 1)


def decode(codes: Tensor, bits: int) -> Tensor:
    """codes (..., stages) -> (..., 8) in units of the scale."""
    value = codebook()[codes[..., 0]]
    if bits > 2:
        points = short_vectors() if bits == 3 else codebook()
        value = value + points[codes[..., 1]] / RESIDUAL_SCALE[bits]
    return value
