"""Hadamard transforms with random signs: the rotation that makes every weight about as large as every other.

An orthogonal matrix with entries ±1/√n, after random signs, turns any vector into one whose entries look Gaussian
(Tseng et al. 2024, "QuIP#", section 3, lemma 3.1: max |entry| ≤ √(2 log(2n/δ) / n) · norm, with probability 1 − δ).
A matrix product with it costs O(n log n): it is a Kronecker product of small Hadamard matrices, so a row is viewed as
a box of those sizes and every axis is multiplied by its small matrix.

Orders: a power of two is 2 ⊗ 2 ⊗ ... (Sylvester); q + 1 for a prime q ≡ 3 mod 4, and 2(q + 1) for a prime q ≡ 1 mod 4,
come from the quadratic residues of q (Paley 1933): 12, 20, 28, 36, 44, 60, ... times powers of two. A width with no
such factorization is split into equal blocks of its largest power of two.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

_LARGEST_FACTOR = 128  # of a power of two; larger ones are split further
_LARGEST_PALEY = 1024


@cache
def hadamard_matrix(n: int) -> Tensor | None:
    """The orthonormal (n, n) float32 Hadamard matrix of a power of two or a Paley order; None if there is none."""
    if n & (n - 1) == 0:
        signs = torch.ones(1, 1)
        while len(signs) < n:
            signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    else:
        paley = _paley(n)
        if paley is None:
            return None
        signs = paley
    return torch.mul(signs, n**-0.5)


def _paley(n: int) -> Tensor | None:
    if n % 4 == 0 and _is_prime(n - 1):
        border = torch.zeros(n, n)
        border[0, 1:], border[1:, 0] = 1, -1
        border[1:, 1:] = _jacobsthal(n - 1)
        return border + torch.eye(n)
    q = n // 2 - 1
    if n % 4 == 0 and q % 4 == 1 and _is_prime(q):
        border = torch.zeros(q + 1, q + 1)
        border[0, 1:] = border[1:, 0] = 1
        border[1:, 1:] = _jacobsthal(q)
        two, corner = torch.tensor([[1.0, 1], [1, -1]]), torch.tensor([[1.0, -1], [-1, -1]])
        return torch.kron(border, two) + torch.kron(torch.eye(q + 1), corner)
    return None


def _jacobsthal(q: int) -> Tensor:
    """Q[i, j] = +1 if i - j is a non-zero square modulo q, 0 on the diagonal, -1 otherwise."""
    character = -torch.ones(q)
    character[torch.arange(1, q).square() % q] = 1
    character[0] = 0
    index = torch.arange(q)
    return character[(index[:, None] - index[None, :]) % q]


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


@cache
def box(n: int) -> tuple[int, tuple[int, ...]]:
    """(number of equal blocks, sizes of the Kronecker factors of each) whose product is n."""
    power = n & -n
    odd = n // power
    for two in [4, 8, 16, 32, 64, 128]:
        order = odd * two
        if odd > 1 and two <= power and order <= _LARGEST_PALEY and hadamard_matrix(order) is not None:
            return 1, (order, *_powers(power // two))
    return odd, _powers(power)


def _powers(power: int) -> tuple[int, ...]:
    sizes = []
    while power > 1:
        sizes.append(min(power, _LARGEST_FACTOR))
        power //= sizes[-1]
    return tuple(sizes)


def transform(x: Tensor, *, inverse: bool = False) -> Tensor:
    """x (..., n) -> x Hᵀ, or x H for the inverse; H is orthonormal. float32."""
    blocks, sizes = box(x.shape[-1])
    y = x.reshape(-1, blocks, *sizes)
    for axis, size in enumerate(sizes):
        matrix = hadamard_matrix(size)
        assert matrix is not None
        y = torch.movedim(torch.movedim(y, axis + 2, -1) @ (matrix if inverse else matrix.T), -1, axis + 2)
    return y.reshape(x.shape)


@dataclass(frozen=True)
class Rotation:
    """W (out, in) is stored as W̃ = H (s_out · W · s_in) Hᵀ. Signs are int8 ±1, (in,) and (out,)."""

    in_signs: Tensor
    out_signs: Tensor

    @staticmethod
    def random(rows: int, columns: int, seed: int) -> "Rotation":
        """Signs that depend on the seed and the shape only, on every machine."""
        draw = np.random.default_rng([seed, rows, columns])
        signs = torch.from_numpy(draw.integers(0, 2, rows + columns, dtype=np.int8) * 2 - 1)
        return Rotation(signs[:columns].clone(), signs[columns:].clone())

    def apply(self, weight: Tensor) -> Tensor:
        """(out, in) -> W̃."""
        rotated = transform(weight.float() * self.in_signs)
        return transform((rotated * self.out_signs[:, None]).T.contiguous()).T.contiguous()

    def undo(self, rotated: Tensor) -> Tensor:
        """W̃ -> (out, in)."""
        weight = transform(rotated.T.contiguous(), inverse=True).T * self.out_signs[:, None]
        return transform(weight.contiguous(), inverse=True) * self.in_signs

    def apply_to_hessian(self, hessian: Tensor) -> Tensor:
        """H (in, in) of the rotated inputs, symmetric: the loss of W̃ under it is the loss of W under H."""
        half = transform(hessian.float() * self.in_signs).T.contiguous()
        rotated = transform(half * self.in_signs)
        return (rotated + rotated.T) / 2

    @property
    def stored_bits(self) -> int:
        return self.in_signs.numel() + self.out_signs.numel()


def incoherence(weight: Tensor) -> float:
    """μ of a matrix (rows, n): max |entry| · √(rows · n) / Frobenius norm; 1 at best."""
    return float(weight.abs().max() * weight.numel() ** 0.5 / weight.norm())
