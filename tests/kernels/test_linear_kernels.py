"""Packed products against their torch twins: every storage, instruction set, odd size and row count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from lowbit.kernels import ops, pack, reference

native = pytest.importorskip("lowbit.kernels._cpu", reason="the extension was not built")
ISAS = native.isas()
SHAPES = [(48, 256, 128), (33, 320, 64), (70, 96, 32), (17, 100, 100), (1, 32, 32), (16, 2048, 256), (64, 1024, 1024)]


def weight_and_packed(
    rows: int, cols: int, group: int, bits: int, asym: bool, act_group: int, bias: bool = True
) -> tuple[Tensor, pack.PackedWeight]:
    """A random canonical weight, dequantized by its definition, and its packed form."""
    half, groups = 1 << (bits - 1), -(-cols // group)
    codes = torch.randint(-half, half, (rows, cols), dtype=torch.int8)
    scale = torch.randn(rows, groups)
    zero = torch.randint(-half, half, (rows, groups)) if asym else None
    spread = codes.double() - (zero.double().repeat_interleave(group, 1)[:, :cols] if zero is not None else 0)
    dense = (spread * scale.double().repeat_interleave(group, 1)[:, :cols]).float()
    b = torch.randn(rows) if bias else None
    return dense, pack.pack_int(codes, scale, zero, bits=bits, bias=b, act_group=act_group)


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 3e-6) -> None:
    """Within `tolerance` of the largest expected value: sums of thousands of floats in another order."""
    error = (got - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    assert error < tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("asym", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_int_linear_is_its_twin(bits: int, asym: bool, isa: str) -> None:
    torch.manual_seed(bits)
    for rows, cols, group in SHAPES:
        for act_group in (32, 0, -1):
            dense, w = weight_and_packed(rows, cols, group, bits, asym, act_group)
            for m in (1, 2, 3, 5, 8, 9, 14):
                x = torch.randn(m, cols)
                expected = reference.linear(x, dense, w.bias, w.kind, act_group)
                assert_close(ops.native_linear(w, x, act_group, isa), expected, 1e-5 if act_group < 0 else 3e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_rows_do_not_depend_on_the_batch(isa: str) -> None:
    """One row, eight and two hundred give the same bits: prefill is decode."""
    torch.manual_seed(0)
    for bits, asym, act_group in [(4, False, 32), (4, True, 64), (8, False, 0), (3, False, 32), (2, True, 32)]:
        _, w = weight_and_packed(50, 1536, 128, bits, asym, act_group)
        x = torch.randn(200, 1536)
        all_rows = ops.native_linear(w, x, act_group, isa)
        for m in (1, 2, 7, 8, 13):
            assert torch.equal(ops.native_linear(w, x[:m], act_group, isa), all_rows[:m])
    w = pack.pack_bf16(torch.randn(50, 1536))
    x = torch.randn(200, 1536)
    all_rows = ops.native_linear(w, x, 32, isa)
    for m in range(1, 14):  # one pass for up to twelve rows, each with code of its own
        assert torch.equal(ops.native_linear(w, x[:m], 32, isa), all_rows[:m])


def test_threads_do_not_change_a_bit() -> None:
    torch.manual_seed(0)
    before = native.threads()
    _, w = weight_and_packed(500, 512, 128, 4, False, 32)
    x = torch.randn(20, 512)
    try:
        results = []
        for threads in (1, 2, 3, 5):
            native.set_threads(threads)
            results.append(ops.native_linear(w, x))
    finally:
        native.set_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("isa", ISAS)
def test_table_linear_is_its_twin(isa: str) -> None:
    torch.manual_seed(0)
    for rows, cols, group in [(48, 256, 128), (33, 320, 64), (70, 96, 32), (5, 40, 40)]:
        groups = -(-cols // group)
        codes, scale = torch.randint(0, 16, (rows, cols)), torch.rand(rows, groups) + 0.1
        table = torch.randint(-127, 128, (rows, 16)).float()
        table[:, 3] = 127  # entries on the kernel's own grid: exact
        w = pack.pack_table(codes, scale, table)
        dense = torch.gather(table, 1, codes) * scale.repeat_interleave(group, 1)[:, :cols]
        for m in (1, 2, 4, 8, 11):
            x = torch.randn(m, cols)
            assert_close(ops.native_linear(w, x, 32, isa), reference.linear(x, dense, None, w.kind, 32))
            assert_close(ops.native_linear(w, x, -1, isa), reference.linear(x, dense, None, w.kind, -1), 1e-5)


def test_table_entries_are_within_half_a_step() -> None:
    """An arbitrary table costs at most 1/254 of its row's largest entry."""
    torch.manual_seed(0)
    table, codes = torch.randn(16, 16), torch.arange(16).repeat(16, 2)
    w = pack.pack_table(codes, torch.ones(16, 1), table)
    dense = reference.weight_of(w.codes, w.scales, w.zeros, w.table, w.kind, 4, 16, 32, 32, 128)
    assert ((dense - torch.gather(table, 1, codes)).abs() <= table.abs().amax(1, keepdim=True) / 253).all()


@pytest.mark.parametrize("isa", ISAS)
def test_bf16_linear_is_its_twin(isa: str) -> None:
    torch.manual_seed(0)
    for rows, cols in [(48, 256), (33, 320), (70, 100), (1, 8)]:
        dense = torch.randn(rows, cols).bfloat16()
        w = pack.pack_bf16(dense, bias=torch.randn(rows))
        for m in (1, 3, 4, 12, 13, 30):
            x = torch.randn(m, cols)
            assert_close(ops.native_linear(w, x, 32, isa), reference.linear(x, dense.float(), w.bias, w.kind, 32), 1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [4, 8])
def test_adversarial_values(bits: int, isa: str) -> None:
    """Codes and activations at their limits, zeros, subnormals, one huge value in a group."""
    cols = 1024
    lowest, highest = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    codes = torch.full((33, cols), lowest, dtype=torch.int8)
    codes[::2] = highest
    w = pack.pack_int(codes, torch.ones(33, 1), bits=bits)
    rows = [
        torch.ones(cols),
        -torch.ones(cols),
        torch.zeros(cols),
        torch.full((cols,), 1e-42),
        torch.full((cols,), 1e30),
    ]
    spike = torch.zeros(cols)
    spike[5] = 1e6
    rows += [spike, torch.full((cols,), 1e-31), (torch.arange(cols) % 2 * 2.0 - 1) * 3e-30]
    x = torch.stack(rows)
    for act_group in (32, 0):
        got = ops.native_linear(w, x, act_group, isa)
        assert_close(got[[0, 1, 5]], reference.linear(x, codes.float(), None, w.kind, act_group)[[0, 1, 5]])
        assert torch.isfinite(got).all()
        assert (got[2] == 0).all()
        assert (got[3] == 0).all()


def test_strange_activations_stay_in_their_rows() -> None:
    torch.manual_seed(0)
    _, w = weight_and_packed(20, 64, 32, 4, False, 32)
    for rows in (4, 20):  # a few rows, and tiles
        x = torch.randn(rows, 64)
        x[0], x[1], x[2] = float("nan"), float("inf"), -float("inf")
        assert torch.equal(ops.native_linear(w, x)[3:], ops.native_linear(w, x[3:]))


def test_unaligned_input() -> None:
    torch.manual_seed(0)
    dense, w = weight_and_packed(40, 100, 100, 4, False, 32, bias=False)
    x = torch.randn(801)[1:].view(8, 100)
    assert_close(ops.native_linear(w, x), reference.linear(x, dense, None, w.kind, 32))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing_is_the_naive_packing(bits: int) -> None:
    for rows, cols in [(16, 32), (17, 100), (1, 1), (40, 320)]:
        codes = torch.randint(0, 1 << bits, (rows, cols), dtype=torch.uint8)
        w = pack.pack_int(codes, torch.ones(rows, 1), torch.zeros(rows, 1, dtype=torch.int64), bits=bits)
        assert torch.equal(w.codes, reference.pack_codes(codes, bits, 0))
        assert torch.equal(reference.unpack_codes(w.codes, bits, rows, cols), codes)


def test_table_and_bf16_packing_are_the_naive_packings() -> None:
    codes, dense = torch.randint(0, 16, (33, 100), dtype=torch.uint8), torch.randn(33, 100).bfloat16()
    w = pack.pack_table(codes, torch.ones(33, 1), torch.randn(16))
    assert torch.equal(w.codes, reference.pack_table_codes(codes))
    assert torch.equal(reference.unpack_table_codes(w.codes, 33, 100), codes)
    b = pack.pack_bf16(dense)
    assert torch.equal(b.codes, reference.pack_bf16_codes(dense))
    assert torch.equal(reference.unpack_bf16_codes(b.codes, 33, 100), dense)


def test_scales_are_kept_exactly_and_narrowly() -> None:
    codes = torch.zeros(16, 64, dtype=torch.int8)
    for dtype in (torch.bfloat16, torch.float16):
        scale = torch.randn(16, 1).to(dtype).float()
        w = pack.pack_int(codes, scale, bits=4)
        assert w.scales is not None
        assert w.scales.dtype == dtype
    w = pack.pack_int(codes, torch.randn(16, 1), bits=4)
    assert w.scales is not None
    assert w.scales.dtype == torch.float32


@pytest.mark.parametrize(
    ("codes", "scale", "bits", "message"),
    [
        (torch.zeros(4, 64, dtype=torch.int8), torch.ones(4, 1), 5, "2, 3, 4 or 8 bits"),
        (torch.full((4, 64), 9, dtype=torch.int8), torch.ones(4, 1), 4, "do not fit"),
        (torch.zeros(4, 96, dtype=torch.int8), torch.ones(4, 2), 4, "multiple of 32"),
    ],
)
def test_bad_weights_are_refused(codes: Tensor, scale: Tensor, bits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack.pack_int(codes, scale, bits=bits)


def test_opcheck() -> None:
    _, w = weight_and_packed(20, 64, 32, 4, True, 32)
    opcheck(ops.linear_op, (torch.randn(3, 64), *ops.described(w), 32))


def test_operator_and_twin_agree() -> None:
    torch.manual_seed(0)
    dense, w = weight_and_packed(20, 64, 32, 4, True, 32)
    x = torch.randn(2, 3, 64)
    assert_close(ops.linear(x, w).view(6, 20), reference.linear(x.view(6, 64), dense, w.bias, w.kind, 32))
