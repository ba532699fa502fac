import pytest
import torch

from lowbit.hadamard import Rotation, box, hadamard_matrix, incoherence, transform


@pytest.mark.parametrize("n", [1, 2, 8, 12, 20, 24, 28, 36, 44, 60, 64, 108, 128])
def test_matrices_are_plus_minus_one_and_orthogonal(n: int) -> None:
    matrix = hadamard_matrix(n)
    assert matrix is not None
    signs = matrix * n**0.5
    assert torch.allclose(signs.abs(), torch.ones(n, n), atol=1e-5)
    assert torch.allclose(matrix @ matrix.T, torch.eye(n), atol=1e-5)


@pytest.mark.parametrize(
    ("n", "expected"), [(256, (1, (128, 2))), (768, (1, (12, 64))), (11008, (43, (128, 2))), (100, (25, (4,)))]
)
def test_widths_become_boxes(n: int, expected: tuple[int, tuple[int, ...]]) -> None:
    assert box(n) == expected


@pytest.mark.parametrize("n", [8, 56, 96, 100, 256, 768])
def test_transform_is_orthogonal_and_its_inverse_undoes_it(n: int) -> None:
    matrix = transform(torch.eye(n))
    assert torch.allclose(matrix @ matrix.T, torch.eye(n), atol=1e-5)
    x = torch.randn(3, 5, n, generator=torch.Generator().manual_seed(n))
    assert torch.allclose(transform(transform(x), inverse=True), x, atol=1e-5)
    assert torch.allclose(transform(x), x @ matrix, atol=1e-4)


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 256, generator=g)
    weight[3, 7] = 60.0  # one outlier
    x = torch.randn(500, 256, generator=g) * torch.logspace(1, -1, 256)
    return weight, x.T @ x / 500


def test_rotation_comes_back_and_keeps_the_loss() -> None:
    weight, H = problem()
    rotation = Rotation.random(96, 256, 0)
    rotated = rotation.apply(weight)
    assert torch.allclose(rotation.undo(rotated), weight, atol=1e-4)
    before = ((weight @ H) * weight).sum()
    after = ((rotated @ rotation.apply_to_hessian(H)) * rotated).sum()
    assert float(after) == pytest.approx(float(before), rel=1e-4)


def test_rotation_makes_weights_and_hessian_incoherent() -> None:
    weight, H = problem()
    rotation = Rotation.random(96, 256, 0)
    assert incoherence(weight) > 30
    assert incoherence(rotation.apply(weight)) < 6
    diagonal, rotated = H.diagonal(), rotation.apply_to_hessian(H).diagonal()
    assert float(rotated.max() / rotated.mean()) < 0.2 * float(diagonal.max() / diagonal.mean())


def test_signs_depend_on_seed_and_shape_alone() -> None:
    one, same = Rotation.random(96, 256, 1), Rotation.random(96, 256, 1)
    assert torch.equal(one.in_signs, same.in_signs)
    assert torch.equal(one.out_signs, same.out_signs)
    assert not torch.equal(one.in_signs, Rotation.random(96, 256, 2).in_signs)
