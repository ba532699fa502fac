"""Linears that compute from stored low-bit weights, over torch's own CPU kernels.

    int4     4-bit weights in groups, float activations          torch._weight_int4pack_mm_for_cpu
    int8     8-bit weights per row, float activations            torch._weight_int8pack_mm
    w8a8     int8 weights x int8 activations                     torch._int_mm
    float    no kernel for this grid: dequantized once at load; saves disk, not memory or time

`bytes_read` is what one token's product really reads from memory: the numerator of MBU.
"""

import torch
from torch import Tensor, nn

from lowbit.scheme import Scheme, TensorScheme
from lowbit.tensor import InputGrid, QuantizedTensor

_INT4_GROUPS = (256, 128, 64, 32)


def choose_kernel(quantized: QuantizedTensor, scheme: Scheme) -> str:
    """Which of the kernels above can carry this weight."""
    weight = quantized.scheme
    rows, columns = quantized.shape
    if quantized.rotation is not None:
        return "float"
    if weight.kind == "int" and weight.bits == 8 and weight.symmetric and weight.granularity in ("channel", "tensor"):
        return "int8" if scheme.activation is None else "w8a8"
    if (
        weight.kind == "int"
        and weight.bits == 4
        and scheme.activation is None
        and rows % 16 == 0
        and _int4_group(weight, columns)
    ):
        return "int4"
    return "float"


def _int4_group(weight: TensorScheme, columns: int) -> int:
    """The kernel's group size that carries this weight's scales (a row's one scale can be repeated), or 0."""
    if weight.granularity == "group":
        return weight.group_size if weight.group_size in _INT4_GROUPS else 0
    return next((g for g in _INT4_GROUPS if columns % g == 0), 0)


class QuantizedLinear(nn.Module):
    """y = x Wᵀ + b from a QuantizedTensor. x (..., in) in `dtype`; y (..., out) in the same. `grid` is how x is
    rounded, of which the scheme knows the kind but not a stored scale."""

    codes: Tensor
    scales: Tensor

    def __init__(
        self,
        quantized: QuantizedTensor,
        scheme: Scheme,
        bias: Tensor | None,
        dtype: torch.dtype,
        grid: InputGrid | None = None,
    ) -> None:
        super().__init__()
        self.grid = InputGrid(scheme.activation) if grid is None and scheme.activation is not None else grid
        self.kernel = choose_kernel(quantized, scheme)
        self.scheme = scheme
        self.out_features, self.in_features = quantized.shape
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
        row_scale = quantized.scale.expand(self.out_features, -1)
        if self.kernel == "int4":
            self.group = _int4_group(quantized.scheme, self.in_features)
            codes = (quantized.codes.to(torch.int32) + 8).contiguous()
            self.register_buffer("codes", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
            groups = self.in_features // self.group
            scale = row_scale.float().repeat_interleave(groups // row_scale.shape[1], 1)
            zero = torch.zeros_like(scale)
            if quantized.zero_point is not None:
                points = quantized.zero_point.float().expand(self.out_features, -1)
                zero = -points.repeat_interleave(groups // points.shape[1], 1) * scale
            self.register_buffer("scales", torch.stack([scale, zero], -1).transpose(0, 1).contiguous().to(dtype))
        elif self.kernel in ("int8", "w8a8"):
            self.register_buffer("codes", quantized.codes)
            self.register_buffer(
                "scales", row_scale[:, 0].contiguous().to(dtype if self.kernel == "int8" else torch.float32)
            )
        else:
            self.register_buffer("codes", quantized.dequantize(dtype))
            self.register_buffer("scales", torch.empty(0))

    @property
    def bytes_read(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        match self.kernel:
            case "int4":
                y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows.contiguous(), self.codes, self.group, self.scales)
            case "int8":
                y = torch._weight_int8pack_mm(rows.contiguous(), self.codes, self.scales)
            case "w8a8":
                y = self._int8_product(rows)
            case _:
                y = nn.functional.linear(rows if self.grid is None else self.grid.round(rows), self.codes)
        y = y.reshape(*x.shape[:-1], self.out_features)
        biased: Tensor = y if self.bias is None else y + self.bias
        return biased

    def _int8_product(self, rows: Tensor) -> Tensor:
        """int8 x int8 -> int32, scaled once by token (or by the stored scale) and once by output: the grid of
        numerics.fake_quantize_activation."""
        x = rows.float()
        if self.grid is not None and self.grid.scale is not None:
            scale = self.grid.scale.float().reshape(1, 1)
        else:
            scale = x.abs().amax(1, keepdim=True) / 127
            scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        codes = (x / scale).round().clamp(-128, 127).to(torch.int8)
        product: Tensor = torch._int_mm(codes, self.codes.T).float() * (scale * self.scales)
        return product.to(rows.dtype)
