"""Rotations of channels that many linears share."""

import pytest
import torch

from lowbit.algorithms.hadamard import random_rotation
from lowbit.errors import InputError


def test_widths_that_cannot_be_mixed() -> None:
    with pytest.raises(InputError, match="51 channels cannot be rotated"):
        random_rotation(51, 0)


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
