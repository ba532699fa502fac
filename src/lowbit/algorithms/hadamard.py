"""Hadamard rotations: spread outliers over all channels, at no cost at run time.

An orthogonal Q can be put between any two linear maps:  (x Q) (W Q)ᵀ = x Wᵀ. With random signs D and a Hadamard matrix
H (entries ±1, H Hᵀ = n I),  Q = D H / √n  mixes every channel into all others, so that no channel stands out and a
grid fits its values better (Ashkboos et al. 2024, "QuaRot", section 4; Tseng et al. 2024, "QuIP#", section 3).

R1 turns the residual stream: everything that writes it is multiplied by Q, everything that reads it too. RMSNorm
commutes with a rotation once its gain has moved into the linears behind it. R2 turns each head's values between v and
o. Both are fused into ordinary weights (model/rotate.py).

Which widths have a Hadamard matrix, and what happens to the others, is in lowbit/hadamard.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.hadamard import box, transform

_SMALLEST_BLOCK = 4


@dataclass(frozen=True)
class HadamardSettings:
    """r1: rotate the residual stream. r2: rotate each head's values."""

    r1: bool = True
    r2: bool = True

    def __post_init__(self) -> None:
        if not (self.r1 or self.r2):
            raise InputError("hadamard: with r1=false and r2=false nothing is left to rotate.")


@dataclass(frozen=True)
class ChannelRotation:
    """x -> x Q with Q = D Hᵀ in blocks of `block` channels; `signs` (width,) is D's diagonal, H orthonormal."""

    signs: Tensor
    block: int

    def apply(self, x: Tensor) -> Tensor:
        """x Q for x (..., width), float32. Also the new weight of a linear that *reads* x."""
        return transform((x.float() * self.signs).reshape(-1, self.block)).reshape(x.shape)

    def apply_rows(self, weight: Tensor) -> Tensor:
        """Qᵀ W for W (width, in) or a bias (width,): the new weight of a linear that *writes* x."""
        return self.apply(weight) if weight.dim() == 1 else self.apply(weight.T.contiguous()).T.contiguous()


def random_rotation(width: int, seed: int) -> ChannelRotation:
    """Signs by the seed. Raises InputError for a width that only splits into blocks too small to mix anything."""
    if width // box(width)[0] < _SMALLEST_BLOCK:
        raise InputError(f"hadamard: {width} channels cannot be rotated: no Hadamard matrix divides them.")
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (width,), generator=generator).float() * 2 - 1
    return ChannelRotation(signs, width)
