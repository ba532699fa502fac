"""Hadamard rotations: spread outliers over all channels, at no cost at run time.

An orthogonal Q can be put between any two linear maps:  (x Q) (W Q)ᵀ = x Wᵀ. With random signs D and a Hadamard matrix
H (entries ±1, H Hᵀ = n I),  Q = D H / √n  mixes every channel into all others, so that no channel stands out and a
grid fits its values better (Ashkboos et al. 2024, "QuaRot", section 4; Tseng et al. 2024, "QuIP#", section 3).

R1 turns the residual stream: everything that writes it is multiplied by Q, everything that reads it too. RMSNorm
commutes with a rotation once its gain has moved into the linears behind it. R2 turns each head's values between v and
o. Both are fused into ordinary weights (model/rotate.py).

Hadamard matrices are built as 2^k by doubling times a core of Paley's: with q prime and q ≡ 3 mod 4 there is one of
order q + 1, with q ≡ 1 mod 4 one of order 2 (q + 1) (Paley 1933). 12, 20, 28, 36, 44, 60, 68, 76, 84, 108, 140 are
such orders. Other widths are rotated in blocks of the largest power of two that divides them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import InputError

_SMALLEST_BLOCK = 4


@dataclass(frozen=True)
class HadamardSettings:
    """r1: rotate the residual stream. r2: rotate each head's values."""

    r1: bool = True
    r2: bool = True

    def __post_init__(self) -> None:
        if not (self.r1 or self.r2):
            raise InputError("hadamard: with r1=false and r2=false nothing is left to rotate.")


def hadamard_matrix(order: int) -> Tensor:
    """H (order, order) float64 of ±1 with H Hᵀ = order · I. Raises ValueError for an order that is not known."""
    for core in _cores(order):
        matrix = core
        while len(matrix) < order:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return matrix
    raise ValueError(f"no Hadamard matrix of order {order} is known here")


def _cores(order: int) -> Iterator[Tensor]:
    """Hadamard matrices whose order is `order` divided by a power of two, the smallest first."""
    odd = order
    while odd % 2 == 0:
        odd //= 2
    if odd == 1:
        yield torch.ones(1, 1, dtype=torch.float64)
    size = 4 * odd
    while odd > 1 and order % size == 0:
        if _is_prime(size - 1) and size % 4 == 0:
            yield _paley_one(size - 1)
        if _is_prime(size // 2 - 1) and (size // 2 - 1) % 4 == 1:
            yield _paley_two(size // 2 - 1)
        size *= 2


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _jacobsthal(q: int) -> Tensor:
    """(q, q): +1 where i - j is a nonzero square modulo the prime q, -1 where it is none, 0 on the diagonal."""
    residues = torch.zeros(q, dtype=torch.float64) - 1
    residues[[i * i % q for i in range(1, q)]] = 1
    residues[0] = 0
    index = torch.arange(q)
    return residues[(index[:, None] - index[None]) % q]


def _paley_one(q: int) -> Tensor:
    """Order q + 1 for a prime q ≡ 3 mod 4: I + S with S skew."""
    S = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    S[0, 1:], S[1:, 0], S[1:, 1:] = 1, -1, _jacobsthal(q)
    return S + torch.eye(q + 1, dtype=torch.float64)


def _paley_two(q: int) -> Tensor:
    """Order 2 (q + 1) for a prime q ≡ 1 mod 4: a symmetric conference matrix with its zeros and ones made 2 x 2."""
    C = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    C[0, 1:], C[1:, 0], C[1:, 1:] = 1, 1, _jacobsthal(q)
    one = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    zero = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(C, one) + torch.kron(torch.eye(q + 1, dtype=torch.float64), zero)


def block_width(width: int) -> int:
    """The width itself if a Hadamard matrix of it is known, else the largest power of two that divides it.

    Raises InputError if that is too small to mix anything.
    """
    if next(_cores(width), None) is not None:
        return width
    block = width & -width
    if block < _SMALLEST_BLOCK:
        raise InputError(f"hadamard: {width} channels cannot be rotated: no Hadamard matrix divides them.")
    return block


@dataclass(frozen=True)
class Rotation:
    """x -> x Q with Q = D H / √n in blocks of n channels: `signs` (width,) is D's diagonal, `matrix` (n, n) H / √n."""

    signs: Tensor
    matrix: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """x Q for x (..., width), in float64 inside; float32 out. Also the new weight of a linear that *reads* x."""
        rows = (x.double() * self.signs).reshape(-1, len(self.matrix))
        return (rows @ self.matrix).reshape(x.shape).float()

    def apply_rows(self, weight: Tensor) -> Tensor:
        """Qᵀ W for W (width, in) or a bias (width,): the new weight of a linear that *writes* x."""
        return self.apply(weight) if weight.dim() == 1 else self.apply(weight.T).T.contiguous()


def random_rotation(width: int, seed: int) -> Rotation:
    """Signs by the seed, and the Hadamard matrix of `block_width`."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1
    order = block_width(width)
    return Rotation(signs, hadamard_matrix(order) / order**0.5)
