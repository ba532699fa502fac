"""Weight-only GPU products against their torch twin: in Triton's interpreter, or on the GPU where there is one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from lowbit.errors import InputError
from lowbit.kernels.triton import PLACE, layout, ops, twins

pytest.importorskip("triton", minversion="3.9" if PLACE == "cpu" else "3.6", reason="interpreter: Triton 3.9 or newer")

from lowbit.kernels.triton import w4a16

SHAPES = [(40, 640, 128), (17, 100, 100), (70, 96, 32), (33, 544, 544)]  # odd rows, columns that fill no tile


def dense_and_tiled(
    rows: int, cols: int, group: int, bits: int, asym: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, layout.TiledWeight]:
    """A random weight dequantized by its definition, float32, and its tiled form with a bias."""
    half, groups = 1 << (bits - 1), -(-cols // group)
    codes = torch.randint(-half, half, (rows, cols), dtype=torch.int8)
    scale = torch.randn(rows, groups).to(dtype)
    zero = torch.randint(-half, half, (rows, groups)) if asym else None
    spread = codes.float() - (zero.float().repeat_interleave(group, 1)[:, :cols] if zero is not None else 0)
    dense = spread * scale.float().repeat_interleave(group, 1)[:, :cols]
    return dense, layout.pack_int(codes, scale, zero, bits=bits, bias=torch.randn(rows))


def assert_product(x: Tensor, w: layout.TiledWeight, dense: Tensor, kernel: str | None = None) -> None:
    """The kernel's y is the float64 product, up to the rounding of y to x's type (and sums in another order)."""
    y = w4a16.linear(x.to(PLACE), w.to(PLACE), kernel).cpu()
    assert w.bias is not None
    expected = x.double() @ dense.double().T + w.bias
    assert y.dtype == x.dtype
    error = (y.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    assert error <= torch.finfo(x.dtype).eps * 0.51, f"{kernel} {tuple(x.shape)}: {error:.1e}"


@pytest.mark.parametrize("asym", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integer_products_are_their_twin(bits: int, asym: bool) -> None:
    torch.manual_seed(bits)
    for i, (rows, cols, group) in enumerate(SHAPES):
        dense, w = dense_and_tiled(rows, cols, group, bits, asym)
        torch.testing.assert_close(twins.weight_of(w), dense, rtol=1e-6, atol=0)
        dtype = (torch.float16, torch.bfloat16)[i % 2]
        for m, kernel in ((1, "gemv"), (3, "gemm")) if i else ((2, "gemv"), (1, "gemm"), (16, "gemm"), (37, None)):
            assert_product(torch.randn(m, cols).to(dtype), w, dense, kernel)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_of_any_type(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dense, w = dense_and_tiled(33, 256, 64, 4, True, dtype)
    assert w.scales.dtype == dtype
    for m in (1, 5):
        assert_product(torch.randn(m, 256).bfloat16(), w, dense)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_and_zero_points_at_their_limits(bits: int) -> None:
    """All codes lowest or highest, zero points at either end, activations zero, small or one spike: exact."""
    top = (1 << bits) - 1
    codes = torch.tensor([0, top], dtype=torch.uint8).repeat_interleave(16)[:, None].expand(32, 96).contiguous()
    zero = torch.tensor([0, top]).repeat(16)[:, None]
    w = layout.pack_int(codes, torch.ones(32, 1), zero, bits=bits, bias=torch.zeros(32))
    dense = codes.float() - zero.float()
    x = torch.zeros(4, 96)
    x[1], x[2, 95], x[3] = 1.0, -2.0, 1.0 / 256
    x[3, ::2] = -1.0 / 256
    for kernel in ("gemv", "gemm"):
        assert_product(x.half(), w, dense, kernel)
        assert_product(x.bfloat16(), w, dense, kernel)


@pytest.mark.parametrize("shared", [True, False], ids=["nf4", "any4"])
def test_table_products_are_their_twin(shared: bool) -> None:
    torch.manual_seed(0)
    for rows, cols, group in [(40, 320, 64), (17, 100, 100)]:
        codes = torch.randint(0, 16, (rows, cols), dtype=torch.uint8)
        table = torch.randn(16 if shared else rows * 16).bfloat16().view(-1, 16)  # exact in bf16: not rounded again
        scale = torch.rand(rows, -(-cols // group)) + 0.1
        dense = torch.gather(table.float().expand(rows, 16), 1, codes.long())
        dense = dense * scale.repeat_interleave(group, 1)[:, :cols]
        w = layout.pack_table(codes, scale, table, bias=torch.randn(rows))
        for m in (1, 5):
            assert_product(torch.randn(m, cols).bfloat16(), w, dense)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing_is_the_naive_packing(bits: int) -> None:
    """Every code is where `layout.py` says, by a second implementation that follows the words, a code at a time."""
    rows, cols = 19, 545
    codes = torch.randint(0, 1 << bits, (rows, cols), dtype=torch.uint8)
    words, high = layout.pack_words(codes, bits)
    low = min(bits, 2) if bits == 3 else bits
    width = 32 * (32 // low)
    for n in range(rows):
        for k in range(cols):
            tile, within = divmod(k, width)
            i, j = divmod(within, 32)
            value = int(words[n // 16, tile, n % 16, j]) >> (i * low) & ((1 << low) - 1)
            if bits == 3:
                assert high is not None
                value |= (int(high[n // 16, tile, n % 16, j]) >> i & 1) << 2
            assert value == int(codes[n, k])
    assert torch.equal(layout.unpack_words(words, high, bits, rows, cols), codes)


def test_rows_do_not_depend_on_the_batch() -> None:
    """A row alone and among others, through the same kernel, gives the same bits."""
    torch.manual_seed(0)
    _, w = dense_and_tiled(40, 512, 128, 4, False)
    w, x = w.to(PLACE), torch.randn(40, 512).half().to(PLACE)
    for kernel in ("gemv", "gemm"):
        assert torch.equal(w4a16.linear(x[:16], w, kernel)[:3], w4a16.linear(x[:3], w, kernel))


def test_split_columns_cover_every_tile_once() -> None:
    for programs in (1, 3, 100, 1000):
        for tiles in (1, 2, 7, 64):
            splits, each = w4a16.split_of(programs, tiles, 132)
            assert (splits - 1) * each < tiles <= splits * each


def test_bad_input_is_refused() -> None:
    _, w = dense_and_tiled(16, 64, 32, 4, False)
    with pytest.raises(ValueError, match="fp16 or bf16"):
        w4a16.linear(torch.zeros(1, 64, device=PLACE), w.to(PLACE))
    with pytest.raises(ValueError, match="64 columns"):
        w4a16.linear(torch.zeros(1, 32, device=PLACE).half(), w.to(PLACE))
    with pytest.raises(InputError, match="expected"):
        w4a16.linear(torch.zeros(1, 64, device="meta").half(), w.to(PLACE))
    with pytest.raises(ValueError, match="multiple of 32"):
        layout.pack_int(torch.zeros(4, 96, dtype=torch.int8), torch.ones(4, 2), bits=4)
    with pytest.raises(ValueError, match="2, 3, 4 or 8"):
        layout.pack_int(torch.zeros(4, 96, dtype=torch.int8), torch.ones(4, 1), bits=5)
    with pytest.raises(ValueError, match="do not fit"):
        layout.pack_int(torch.full((4, 96), 9, dtype=torch.int8), torch.ones(4, 1), bits=4)
    with pytest.raises(ValueError, match="do not fit"):
        layout.pack_table(torch.full((4, 96), 16, dtype=torch.uint8), torch.ones(4, 1), torch.zeros(16))


def test_operator() -> None:
    """The operator is its twin on any device, and tells the truth about itself."""
    torch.manual_seed(0)
    _, w = dense_and_tiled(20, 64, 32, 3, True)
    x = torch.randn(2, 3, 64).bfloat16()
    assert torch.equal(ops.linear(x, w), twins.linear(x, w))
    opcheck(ops.linear_op, (x, *w.tensors(), w.bits, w.rows, w.cols, w.group))
