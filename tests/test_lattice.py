import pytest
import torch

from lowbit import lattice


def test_the_codebook_is_65536_points_of_e8_plus_a_quarter() -> None:
    """x - 1/4 is all integers or all half-integers, with an even sum: E8."""
    points = lattice.codebook()
    assert len(torch.unique(points, dim=0)) == 1 << 16
    shifted = (points - 0.25).double()
    doubled = (2 * shifted).long()
    assert torch.equal(doubled.double(), 2 * shifted)
    assert bool((doubled % 2 == doubled[:, :1] % 2).all())
    assert bool((shifted.sum(1) % 2 == 0).all())


def test_absolute_vectors_fill_the_ball_and_part_of_its_shell() -> None:
    norms = lattice.absolute_vectors().square().sum(1)
    assert {int(n): int((norms == n).sum()) for n in norms.unique()} == {2: 1, 4: 8, 6: 28, 8: 64, 10: 126, 12: 29}


def test_short_vectors_are_the_shortest_of_e8() -> None:
    points = lattice.short_vectors()
    assert len(torch.unique(points, dim=0)) == 256
    norms = points.square().sum(1)
    assert [int((norms == n).sum()) for n in (0, 2, 4)] == [1, 240, 15]
    assert bool((points.sum(1) % 2 == 0).all())
    assert bool((2 * points % 2 == (2 * points % 2)[:, :1]).all())


@pytest.mark.parametrize("spread", [0.3, 1.0, 2.5])
def test_nearest_is_the_nearest_of_all(spread: float) -> None:
    x = spread * torch.randn(1500, 8, generator=torch.Generator().manual_seed(0))
    found = lattice.codebook()[lattice.nearest_e8p(x).long()]
    distance = torch.cdist(x.double(), lattice.codebook().double()).min(1).values
    assert torch.allclose((x - found).double().norm(dim=1), distance, atol=1e-5)


def test_every_point_is_its_own_nearest() -> None:
    index = torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0))[:5000]
    assert torch.equal(lattice.nearest_e8p(lattice.codebook()[index]).long(), index)


@pytest.mark.parametrize(("bits", "scalar"), [(2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_gaussian_error_is_below_the_best_scalar_quantizers(bits: int, scalar: float) -> None:
    """`scalar`: Lloyd-Max quantizer of 2^bits levels for a Gaussian (Max 1960, table I)."""
    x = torch.randn(20000, 8, generator=torch.Generator().manual_seed(0))
    y = x * lattice.RMS[bits]
    error = (lattice.decode(lattice.encode(y, bits), bits) - y) / lattice.RMS[bits]
    assert float(error.square().mean()) < 0.95 * scalar or bits == 4
    assert float(error.square().mean()) < 1.02 * scalar
