from dataclasses import replace

import pytest
import torch

from lowbit.algorithms.rtn import rtn
from lowbit.scheme import Scheme, TensorScheme
from lowbit.tensor import QuantizedTensor


def weight(rows: int = 12, columns: int = 64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def grid(text: str) -> TensorScheme:
    scheme = Scheme.parse(text).weight
    assert scheme is not None
    return scheme


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("w4a16-g32", 4 + 16 / 32),
        ("w4a16-g32-asym", 4 + (16 + 4) / 32),
        ("w3a16-g64", 3 + 16 / 64),
        ("w8a16-channel", 8 + 16 / 64),
        ("w2a16-g64-asym", 2 + (16 + 2) / 64),
        ("fp8", 8 + 16 / 64),
        ("w8a16-tensor", 8 + 16 / (12 * 64)),
    ],
)
def test_stored_bits_count_codes_scales_and_zero_points(text: str, bits: float) -> None:
    quantized = rtn(weight(), grid(text), torch.bfloat16)
    assert quantized.stored_bits == pytest.approx(bits * 12 * 64)


@pytest.mark.parametrize("text", ["w4a16-g32", "w4a16-g32-asym", "w8a8", "fp8"])
def test_rows_quantized_together_are_rows_quantized_alone(text: str) -> None:
    w = weight()
    parts = rtn(w, grid(text), torch.bfloat16).split_rows([5, 4, 3])
    for part, rows in zip(parts, w.split([5, 4, 3]), strict=True):
        assert torch.equal(part.dequantize(), rtn(rows, grid(text), torch.bfloat16).dequantize())


def test_dequantize_rounds_once() -> None:
    """(code - zero) * scale is formed in float32: a bfloat16 product of bfloat16 factors would round twice."""
    scheme = grid("w8a16-channel-asym")
    quantized = QuantizedTensor(
        torch.tensor([[127]], dtype=torch.int8),
        torch.tensor([[0.0123]]).bfloat16(),
        torch.tensor([[-128]], dtype=torch.int8),
        scheme,
    )
    exact = 255 * quantized.scale.double()
    assert quantized.dequantize().double() == exact
    assert quantized.dequantize(torch.bfloat16) == exact.bfloat16()


@pytest.mark.parametrize("text", ["w4a16-g32", "w4a16-g32-asym", "fp8"])
def test_equality_is_of_values(text: str) -> None:
    mine = rtn(weight(), grid(text), torch.bfloat16)
    assert mine.equals(rtn(weight(), grid(text), torch.bfloat16))
    assert mine.equals(replace(mine, scale=mine.scale.float())), "the same numbers in another dtype"
    codes = mine.codes.clone()
    codes[3, 7] = 1 if float(codes[3, 7]) != 1 else 2
    assert not mine.equals(replace(mine, codes=codes))
    scale = mine.scale.clone()
    scale[2, 0] *= 2
    assert not mine.equals(replace(mine, scale=scale))
