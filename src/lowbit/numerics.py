"""The only place that rounds and groups.

Every grid is affine in its codes: value = (code - zero_point) * scale. Integer codes live in [-2^(b-1), 2^(b-1) - 1]
whether or not there is a zero point (which lives in the same range), so one dtype (int8) holds all of them; FP8 codes
are float8_e4m3fn values. Entries that share a scale form a rectangle (`TensorScheme.tile`): a tensor of (out, in) is
seen as (out/r, r, in/c, c) and a scale as (out/r, in/c). Tensor, channel, group and block are that one view.
"""

import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.scheme import TensorScheme


def scale_shape(scheme: TensorScheme, shape: tuple[int, int]) -> tuple[int, int]:
    """(out/r, in/c). Raises InputError if the scheme's tile does not divide the shape."""
    rows, columns = scheme.tile(*shape)
    for size, tile, name in ((shape[0], rows, "outputs"), (shape[1], columns, "inputs")):
        if size % tile:
            divisors = [d for d in (32, 64, 128, 256) if size % d == 0]
            instead = f"a group size that divides it ({', '.join(map(str, divisors))})" if divisors else "-channel"
            raise InputError(f"group size {tile} does not divide the layer's {size} {name}: use {instead}")
    return shape[0] // rows, shape[1] // columns


def _tiles(x: Tensor, scheme: TensorScheme) -> Tensor:
    """(out, in) -> view (out/r, r, in/c, c)."""
    n_rows, n_columns = scale_shape(scheme, (x.shape[0], x.shape[1]))
    return x.reshape(n_rows, x.shape[0] // n_rows, n_columns, x.shape[1] // n_columns)


def _spread(scale: Tensor) -> Tensor:
    """(out/r, in/c) -> (out/r, 1, in/c, 1), to broadcast over tiles."""
    return scale[:, None, :, None]


def round_to_grid(x: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: TensorScheme) -> Tensor:
    """The nearest codes, as float32, for x with a scale (and zero point) that broadcast to its shape.

    Integers: ties to even, then clamped to the grid. FP8: clamped to +-448 first (the cast would make NaN).
    """
    if scheme.kind == "float":
        return (x / scale).clamp(scheme.qmin, scheme.qmax).to(torch.float8_e4m3fn).float()
    codes = (x / scale).round()
    if zero_point is not None:
        codes = codes + zero_point
    return codes.clamp(scheme.qmin, scheme.qmax)


def grid_value(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """The float32 value of codes with a scale (and zero point) that broadcast to their shape."""
    values = codes.float()
    if zero_point is not None:
        values = values - zero_point
    return values * scale


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: TensorScheme) -> Tensor:
    """Codes of x (out, in) under scale and zero_point (out/r, in/c): int8, or float8_e4m3fn for a float grid."""
    zero = None if zero_point is None else _spread(zero_point).float()
    codes = round_to_grid(_tiles(x.float(), scheme), _spread(scale).float(), zero, scheme)
    return codes.reshape(x.shape).to(torch.int8 if scheme.kind == "int" else torch.float8_e4m3fn)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: TensorScheme) -> Tensor:
    """The float32 values (out, in) that the codes stand for: the inverse of `quantize` on grid values."""
    zero = None if zero_point is None else _spread(zero_point).float()
    return grid_value(_tiles(codes.float(), scheme), _spread(scale).float(), zero).reshape(codes.shape)


def qparams_from_range(
    low: Tensor, high: Tensor, scheme: TensorScheme, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Scale (in its storage dtype, kept as such) and zero point that make the grid span [low, high] and contain 0.

    Symmetric: scale = max|.| / ((qmax - qmin) / 2), the observer formula of compressed-tensors (absmax / 7.5 at
    4 bits). An all-zero tile gets scale 1, so that nothing divides by zero and its codes are 0.
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    steps = scheme.qmax - scheme.qmin
    if scheme.symmetric:
        step = torch.maximum(-low, high) / (steps / 2)
    else:
        step = (high / 2 - low / 2) / (steps / 2)  # halves: the span itself may overflow
    scale = storable(step, scale_dtype)
    if scheme.symmetric:
        return scale, None
    zero_point = (scheme.qmin - low / scale.float()).round().clamp(scheme.qmin, scheme.qmax)
    return scale, zero_point.to(torch.int8)


def storable(step: Tensor, dtype: torch.dtype) -> Tensor:
    """step (float32) as a scale in its storage dtype: never 0, never infinite; 1 where step is 0."""
    limits = torch.finfo(dtype)
    smallest = torch.where(step < 0, -1.0, 1.0) * limits.smallest_normal * limits.eps
    scale = step.clamp(limits.min, limits.max).to(dtype)
    scale = torch.where((scale == 0) & (step != 0), smallest.to(dtype), scale)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def choose_qparams(
    x: Tensor, scheme: TensorScheme, scale_dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor | None]:
    """Plain min-max scale (out/r, in/c), and zero point if asymmetric, for x (out, in)."""
    tiles = _tiles(x.float(), scheme)
    return qparams_from_range(tiles.amin((1, 3)), tiles.amax((1, 3)), scheme, scale_dtype)


def fake_quantize_activation(x: Tensor, scheme: TensorScheme, scale: Tensor | None = None) -> Tensor:
    """x (..., in) rounded to a grid found from x itself, one per token (dynamic), or under a given scale (static:
    one number, larger values saturate), in x's dtype.

    Dynamic int8 uses scale = max|row| / 127 (no code -128), as integer kernels do; FP8 max|row| / 448.
    """
    rows = x.reshape(-1, x.shape[-1]).float()
    if scale is not None:
        one = scale.float().reshape(1, 1)
        return grid_value(round_to_grid(rows, one, None, scheme), one, None).reshape(x.shape).to(x.dtype)
    scale = rows.abs().amax(1, keepdim=True) / scheme.qmax
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return grid_value(round_to_grid(rows, scale, None, scheme), scale, None).reshape(x.shape).to(x.dtype)
