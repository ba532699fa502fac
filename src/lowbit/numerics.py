"""The only place that rounds and groups.

Uniform grids are affine in their codes: value = (code - zero_point) * scale. Integers live in
[-2^(b-1), 2^(b-1) - 1] whether or not there is a zero point (which lives in the same range), so one dtype (int8) holds
all of them; FP8 codes are float8_e4m3fn values. Table grids (mid-rise, E2M1, NF4, learned) have value = table[code] *
scale with an ascending table of at most 16 entries, fixed or one per row; their codes count from 0. Lattice grids
(`lattice.py`) have one code for eight entries. A scale may be stored in 8 bits: E4M3 for NVFP4, whose tensor is
multiplied by one float32 first (`tensor.py`), and a power of two (E8M0) for MXFP4.

Entries that share a scale form a rectangle (`TensorScheme.tile`): a tensor of (out, in) is
seen as (out/r, r, in/c, c) and a scale as (out/r, in/c). Tensor, channel, group and block are that one view.
"""

import torch
from torch import Tensor

from lowbit import lattice
from lowbit.errors import InputError
from lowbit.scheme import TensorScheme


def scale_shape(scheme: TensorScheme, shape: tuple[int, int]) -> tuple[int, int]:
    """(out/r, in/c). Raises InputError if the scheme's tile does not divide the shape."""
    rows, columns = scheme.tile(*shape)
    if scheme.kind == "e8p" and shape[1] % lattice.WIDTH:
        raise InputError(f"a lattice code holds 8 inputs, which does not divide the layer's {shape[1]}: use w2a16")
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


_E2M1 = torch.tensor([-6.0, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
# Dettmers et al. 2023, "QLoRA", appendix E: quantiles of N(0, 1), normalized to [-1, 1], 0 included.
_NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def fixed_table(scheme: TensorScheme) -> Tensor | None:
    """(entries,) ascending, for grids that are tables; for a learned one, the table it starts from: evenly spaced."""
    match scheme.kind, scheme.bits:
        case "float", 4:
            return _E2M1
        case "nf", _:
            return _NF4
        case "midrise", bits:
            return torch.arange(2.0**bits) - scheme.qmax
        case "learned", bits:
            return torch.linspace(-1, 1, 2**bits)
        case _:
            return None


def scale_dtype_of(scheme: TensorScheme, default: torch.dtype) -> torch.dtype:
    """The dtype that scales are stored in, if the format leaves no choice, else the default."""
    if (scheme.kind, scheme.bits) == ("float", 4):
        return torch.float8_e4m3fn if scheme.nested else torch.float8_e8m0fnu
    return default


def tensor_scale_of(weight: Tensor, scheme: TensorScheme) -> Tensor | None:
    """() float32 that an NVFP4 weight is multiplied by, so that the largest group's scale is E4M3's largest value."""
    if not scheme.nested:
        return None
    largest = weight.float().abs().amax()
    return torch.where(largest == 0, 1.0, 448.0 * scheme.qmax / largest)


def nearest_level(x: Tensor, table: Tensor) -> Tensor:
    """Indices (as x) of the nearest entries of an ascending table: (entries,), or (rows, entries) by x's first axis."""
    middle = (table[..., 1:] + table[..., :-1]) / 2
    if table.dim() == 1:
        return torch.bucketize(x, middle)
    return torch.searchsorted(middle.contiguous(), x.reshape(len(x), -1).contiguous()).reshape(x.shape)


def _look_up(codes: Tensor, table: Tensor) -> Tensor:
    """table[code], or table[row, code] by the codes' first axis."""
    if table.dim() == 1:
        return table[codes.long()]
    return table.gather(1, codes.long().reshape(len(codes), -1)).reshape(codes.shape)


def round_to_grid(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: TensorScheme, table: Tensor | None = None
) -> Tensor:
    """The nearest codes, as float32, for x with a scale (and zero point) that broadcast to its shape.

    Integers: ties to even, then clamped to the grid. FP8: clamped to +-448 first (the cast would make NaN).
    """
    table = fixed_table(scheme) if table is None else table
    if table is not None:
        return nearest_level(x / scale, table.float()).float()
    if scheme.kind == "float":
        return (x / scale).clamp(scheme.qmin, scheme.qmax).to(torch.float8_e4m3fn).float()
    codes = (x / scale).round()
    if zero_point is not None:
        codes = codes + zero_point
    return codes.clamp(scheme.qmin, scheme.qmax)


def grid_value(codes: Tensor, scale: Tensor, zero_point: Tensor | None, table: Tensor | None = None) -> Tensor:
    """The float32 value of codes with a scale (and zero point) that broadcast to their shape."""
    if table is not None:
        return _look_up(codes, table.float()) * scale
    values = codes.float()
    if zero_point is not None:
        values = values - zero_point
    return values * scale


def beyond_grid(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: TensorScheme, table: Tensor | None = None
) -> Tensor:
    """Which entries of x (out, in) lie more than a step beyond the ends of their grid, under scale and zero_point
    (out/r, in/c); bool (out, in). Not for lattices."""
    y = (_tiles(x.float(), scheme) / _spread(scale.float())).reshape(x.shape)
    if zero_point is not None:
        y = (y.reshape(_tiles(x, scheme).shape) + _spread(zero_point.float())).reshape(x.shape)
    table = fixed_table(scheme) if table is None else table
    if table is not None:
        levels = table.float()
        low, second, before, high = (levels[..., i, None] for i in (0, 1, -2, -1))
        return (y < 2 * low - second) | (y > 2 * high - before)
    step = 32.0 if scheme.kind == "float" else 1.0  # between FP8's last two values
    return (y < scheme.qmin - step) | (y > scheme.qmax + step)


def nearest_value(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: TensorScheme, table: Tensor | None = None
) -> Tensor:
    """The grid's value next to x."""
    table = fixed_table(scheme) if table is None else table
    return grid_value(round_to_grid(x, scale, zero_point, scheme, table), scale, zero_point, table)


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: TensorScheme, table: Tensor | None = None
) -> Tensor:
    """Codes of x (out, in) under scale and zero_point (out/r, in/c): int8, float8_e4m3fn for FP8, and for a lattice
    int32 (out, in/8, stages)."""
    if scheme.kind == "e8p":
        codes = lattice.encode((x.float() / scale.float()).reshape(-1, lattice.WIDTH), scheme.bits)
        return codes.reshape(len(x), -1, codes.shape[1])
    zero = None if zero_point is None else _spread(zero_point).float()
    codes = round_to_grid(_tiles(x.float(), scheme), _spread(scale.float()), zero, scheme, table)
    fp8 = scheme.kind == "float" and scheme.bits == 8
    return codes.reshape(x.shape).to(torch.float8_e4m3fn if fp8 else torch.int8)


def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: TensorScheme, table: Tensor | None = None
) -> Tensor:
    """The float32 values (out, in) that the codes stand for: the inverse of `quantize` on grid values."""
    if scheme.kind == "e8p":
        return lattice.decode(codes, scheme.bits).reshape(len(codes), -1) * scale.float()
    table = fixed_table(scheme) if table is None else table
    if table is not None:
        return grid_value(_tiles(codes.float(), scheme), _spread(scale.float()), None, table).reshape(codes.shape)
    values = torch.empty(codes.shape).copy_(codes)  # and no further copy: a whole layer comes here
    tiles = _tiles(values, scheme)
    if zero_point is not None:
        tiles -= _spread(zero_point).float()
    tiles *= _spread(scale.float())
    return values


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
    """step (float32) as a scale in its storage dtype: never 0, never infinite; 1 where step is 0.

    Eight-bit scales have no sign here: a negative step becomes the smallest one.
    """
    limits = torch.finfo(dtype)
    if dtype.itemsize == 1:
        least = 2.0**-126 if dtype == torch.float8_e8m0fnu else 2.0**-9
        return torch.where(step == 0, 1.0, step.clamp(least, limits.max)).to(dtype)
    smallest = torch.where(step < 0, -1.0, 1.0) * limits.smallest_normal * limits.eps
    scale = step.clamp(limits.min, limits.max).to(dtype)
    scale = torch.where((scale == 0) & (step != 0), smallest.to(dtype), scale)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def half_scale(name: str, scale: Tensor) -> Tensor:
    """A scale as half precision, for formats that store no other. Exact for bfloat16 scales from 2^-17 up; below, the
    weights move by less than 2^-25 a code. Raises InputError where it would overflow."""
    half = scale.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise InputError(f"{name}: scales up to {float(scale.abs().max()):.3g} exceed half precision's 65504.")
    return half


def choose_qparams(
    x: Tensor, scheme: TensorScheme, scale_dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor | None]:
    """Plain min-max scale (out/r, in/c), and zero point if asymmetric, for x (out, in). A lattice, whose points are
    made for Gaussians, is scaled by the root mean square instead."""
    scale_dtype = scale_dtype_of(scheme, scale_dtype)
    if scheme.kind == "e8p":
        return storable(x.float().square().mean(1, keepdim=True).sqrt() / lattice.RMS[scheme.bits], scale_dtype), None
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
