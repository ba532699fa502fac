import pytest
import torch

from lowbit.algorithms.hadamard import block_width, hadamard_matrix, random_rotation
from lowbit.errors import InputError

ORDERS = [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 60, 64, 68, 76, 84, 108, 140, 192, 256, 576, 896, 1280]


@pytest.mark.parametrize("order", ORDERS)
def test_hadamard_matrices_are_signs_and_orthogonal(order: int) -> None:
    H = hadamard_matrix(order)
    assert H.shape == (order, order)
    assert bool((H.abs() == 1).all())
    assert torch.equal(H @ H.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [3, 6, 52, 92, 100])
def test_orders_that_are_not_known(order: int) -> None:
    with pytest.raises(ValueError, match=f"order {order}"):
        hadamard_matrix(order)


@pytest.mark.parametrize(
    ("width", "block"), [(64, 64), (3072, 3072), (3584, 3584), (5120, 5120), (832, 832), (2304, 2304), (52, 4), (92, 4)]
)
def test_blocks(width: int, block: int) -> None:
    assert block_width(width) == block


def test_widths_that_cannot_be_mixed() -> None:
    with pytest.raises(InputError, match="51 channels cannot be rotated"):
        block_width(51)


@pytest.mark.parametrize("width", [64, 96, 208])
def test_a_rotation_between_two_linears_changes_nothing(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, writer, reader, bias = (torch.randn(s, generator=generator) for s in ((5, 7), (width, 7), (9, width), (width,)))
    rotation = random_rotation(width, 3)
    before = (x @ writer.T + bias) @ reader.T
    hidden = x @ rotation.apply_rows(writer).T + rotation.apply_rows(bias)
    assert torch.allclose(hidden, rotation.apply(x @ writer.T + bias), atol=1e-4)
    assert torch.allclose(hidden @ rotation.apply(reader).T, before, atol=1e-3)


def test_an_outlier_is_spread_over_all_channels() -> None:
    x = torch.zeros(1, 256)
    x[0, 17] = 16.0
    y = random_rotation(256, 0).apply(x)
    assert torch.allclose(y.abs(), torch.ones(1, 256))
    assert not torch.equal(y, random_rotation(256, 1).apply(x))
