"""Every kernel computes what dequantize() means."""

import pytest
import torch

from lowbit.algorithms.rtn import rtn
from lowbit.numerics import fake_quantize_activation
from lowbit.runtime.linear import QuantizedLinear
from lowbit.scheme import Scheme
from lowbit.tensor import InputGrid

KERNELS = {
    "w4a16-g32": "int4", "w4a16-g128-asym": "int4", "w4a16-channel": "int4", "w8a16-channel": "int8",
    "w8a16-tensor": "int8", "w8a8": "w8a8", "w8a8-static": "w8a8", "w4a8": "float", "fp8-static": "float",
    "w4afp8": "float", "w3a16": "float", "fp8": "float",
}  # fmt: skip


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("text", KERNELS)
def test_linear_is_the_product_with_the_dequantized_weight(text: str, rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    scheme = Scheme.parse(text)
    assert scheme.weight is not None
    weight, x = torch.randn(64, 256), torch.randn(2, rows, 256).bfloat16()
    b = torch.randn(64) if bias else None
    quantized = rtn(weight, scheme.weight, torch.bfloat16)
    scale = torch.tensor([0.02]) if scheme.static else None
    grid = None if scheme.activation is None else InputGrid(scheme.activation, scale)
    linear = QuantizedLinear(quantized, scheme, b, torch.bfloat16, grid)
    assert linear.kernel == KERNELS[text]
    inputs = x if scheme.activation is None else fake_quantize_activation(x.float(), scheme.activation, scale)
    expected = torch.nn.functional.linear(inputs.float(), quantized.dequantize(), b)
    assert linear(x).dtype == torch.bfloat16
    error = (linear(x).float() - expected).abs().max() / expected.abs().max()
    assert error < 0.012


def test_bytes_read_are_the_stored_ones() -> None:
    scheme = Scheme.parse("w4a16-g128")
    assert scheme.weight is not None
    linear = QuantizedLinear(rtn(torch.randn(64, 256), scheme.weight, torch.bfloat16), scheme, None, torch.bfloat16)
    assert linear.bytes_read == 64 * 256 // 2 + 64 * 2 * 2 * 2  # nibbles; scale and zero in bfloat16 for each group


@pytest.mark.parametrize("value", [0.0, 3e38, 1e-40])
def test_int8_product_survives_extreme_rows(value: float) -> None:
    scheme = Scheme.parse("w8a8")
    assert scheme.weight is not None
    linear = QuantizedLinear(rtn(torch.eye(32), scheme.weight, torch.float32), scheme, None, torch.float32)
    y = linear(torch.full((2, 32), value))
    assert torch.isfinite(y).all()
