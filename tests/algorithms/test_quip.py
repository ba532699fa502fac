from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lowbit.algorithms.gptq import GPTQSettings, gptq
from lowbit.algorithms.quip import QuipSettings, lattice_sweep, quip
from lowbit.algorithms.rtn import rtn
from lowbit.scheme import Scheme, TensorScheme
from lowbit.stats import quadratic_loss
from lowbit.tensor import QuantizedTensor


def grid(text: str) -> TensorScheme:
    scheme = Scheme.parse(text).weight
    assert scheme is not None
    return scheme


def problem(outlier: float = 0.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 256, generator=g) @ torch.randn(256, 256, generator=g) * 0.1 + 0.1
    weight = torch.randn(64, 256, generator=g) * 0.05
    weight[:, 5] += outlier
    return weight, x.T @ x / 1000


def loss(weight: Tensor, quantized: QuantizedTensor, H: Tensor) -> float:
    return quadratic_loss(weight - quantized.dequantize(), H)


@pytest.mark.parametrize("text", ["e8p2", "e8p3", "e8p4"])
def test_feedback_beats_rounding_in_the_same_basis(text: str) -> None:
    weight, H = problem()
    scheme = grid(text)
    plain = rtn(weight, scheme, torch.bfloat16)
    fed_back, _ = quip(weight, H, scheme, QuipSettings(sweeps=0), torch.bfloat16)
    assert loss(weight, fed_back, H) < 0.75 * loss(weight, plain, H)


@pytest.mark.parametrize("text", ["e8p2", "e8p3"])
def test_sweeps_never_raise_the_loss(text: str) -> None:
    weight, H = problem()
    rotated, _ = quip(weight, H, grid(text), QuipSettings(sweeps=0), torch.bfloat16)
    assert rotated.rotation is not None
    W, Ht = rotated.rotation.apply(weight), rotated.rotation.apply_to_hessian(H)
    losses = []
    for _ in range(4):
        losses.append(loss(weight, rotated, H))
        rotated = lattice_sweep(W, rotated, Ht)
    assert all(after <= before * (1 + 1e-4) for before, after in pairwise(losses))
    assert losses[-1] < 0.95 * losses[0]


def test_the_lattice_beats_two_bit_integers_at_fewer_bits() -> None:
    weight, H = problem()
    lattice, _ = quip(weight, H, grid("e8p2"), QuipSettings(), torch.bfloat16)
    integers, _ = gptq(weight, H, grid("w2a16"), GPTQSettings(sweeps=6), torch.bfloat16)
    assert lattice.stored_bits < integers.stored_bits
    assert loss(weight, lattice, H) < 0.8 * loss(weight, integers, H)


@pytest.mark.parametrize("text", ["w2a16", "w3a16-g64", "w4a16-channel"])
def test_rotation_helps_integers_where_there_are_outliers(text: str) -> None:
    weight, H = problem(outlier=1.0)
    scheme = grid(text)
    rotated, _ = quip(weight, H, scheme, QuipSettings(sweeps=2), torch.bfloat16)
    straight, _ = gptq(weight, H, scheme, GPTQSettings(), torch.bfloat16)
    assert loss(weight, rotated, H) < loss(weight, straight, H)


def test_the_same_seed_gives_the_same_bytes() -> None:
    weight, H = problem()
    one, _ = quip(weight, H, grid("e8p2"), QuipSettings(sweeps=1), torch.bfloat16)
    two, _ = quip(weight, H, grid("e8p2"), QuipSettings(sweeps=1), torch.bfloat16)
    other, _ = quip(weight, H, grid("e8p2"), QuipSettings(sweeps=1, signs_seed=1), torch.bfloat16)
    assert torch.equal(one.codes, two.codes)
    assert torch.equal(one.scale, two.scale)
    assert not torch.equal(one.codes, other.codes)


@pytest.mark.parametrize(("text", "bits"), [("e8p2", 2), ("e8p3", 3), ("e8p4", 4)])
def test_bits_count_scales_and_signs(text: str, bits: int) -> None:
    weight, H = problem()
    quantized, _ = quip(weight, H, grid(text), QuipSettings(sweeps=0), torch.bfloat16)
    assert quantized.shape == (64, 256)
    assert quantized.stored_bits == bits * 64 * 256 + 64 * 16 + 64 + 256
