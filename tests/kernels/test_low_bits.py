"""3-bit codes and lattice codebooks: packed as drawn, and multiplied as their definitions say."""

from __future__ import annotations

import pytest
import torch
from test_linear_kernels import assert_close
from torch import Tensor

from lowbit import lattice
from lowbit.hadamard import Rotation
from lowbit.kernels import ops, pack, reference
from lowbit.runtime.rotated import RotatedLinear
from lowbit.scheme import Scheme
from lowbit.tensor import QuantizedTensor

native = pytest.importorskip("lowbit.kernels._cpu", reason="the extension was not built")


def test_three_bit_layout_code_by_code() -> None:
    """A second, naive packer: every bit of every code put where kernels.h says."""
    torch.manual_seed(0)
    rows, cols = 17, 72
    codes = torch.randint(0, 8, (rows, cols))
    expected = [0] * (2 * 3 * 192)
    for row in range(rows):
        for col in range(cols):
            code, j = int(codes[row, col]), col % 32 // 4
            at = (row // 16 * 3 + col // 32) * 192 + row % 16 * 4 + col % 4
            if j < 6:
                expected[at + 64 * (j // 2)] |= code << (3 * (j % 2))
            else:
                expected[at + 64 * (j - 6)] |= (code >> 1) << 6
                expected[at + 128] |= (code & 1) << j
    unsigned = codes.to(torch.uint8)
    assert pack.pack_int(unsigned, torch.ones(rows, 1), torch.zeros(rows, 1), bits=3).codes.tolist() == expected
    assert reference.pack_codes(unsigned, 3, 0).tolist() == expected


def lattice_weight(rows: int, octets: int, bits: int, groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes and scales, and the matrix they define (lattice.decode)."""
    stages = [torch.randint(0, 1 << b, (rows, octets)) for b in lattice.STAGE_BITS[bits]]
    codes, scale = torch.stack(stages, -1).int(), torch.rand(rows, groups) + 0.5
    dense = lattice.decode(codes, bits).reshape(rows, -1) * scale.repeat_interleave(8 * octets // groups, 1)
    return codes, scale, dense


def test_every_point_of_the_codebook_is_decoded() -> None:
    codes = torch.arange(1 << 16).view(256, 256, 1).int()
    w = pack.pack_lattice(codes, torch.ones(256, 1), bits=2)
    dense = reference.weight_of(w.codes, w.scales, None, w.table, w.kind, w.bits, w.rows, w.cols, w.group, w.zero)
    assert torch.equal(dense, lattice.codebook()[codes.long()[..., 0]].view(256, -1))
    # The kernels multiply by unit vectors: activations 127 / 127, and so the very weights. One row, and many.
    eye = torch.zeros(2048, 2048)
    eye.fill_diagonal_(1.0)
    for isa in native.isas():
        few = torch.cat([ops.native_linear(w, eye[i : i + 1], 32, isa) for i in range(0, 2048, 97)])
        assert_close(few, dense.T[::97])
        assert_close(ops.native_linear(w, eye[:300], 32, isa), dense.T[:300])


def test_lattice_layout_code_by_code() -> None:
    """A second, naive packer; the sign of entry 7 counted from the definition of E8."""
    torch.manual_seed(1)
    rows, octets = 19, 7
    codes, _, _ = lattice_weight(rows, octets, 2)
    expected = [0] * (2 * 2 * 128)
    for row in range(rows):
        for octet in range(octets):
            code = int(codes[row, octet, 0])
            at = (row // 16 * 2 + octet // 4) * 128
            at += 16 * (row % 8 // 2) + 4 * (octet % 4) + 2 * (row % 2) + row % 16 // 8
            shift = code >> 15
            last = int(lattice.codebook()[code, 7] < 0)
            expected[at] = code & 255
            expected[at + 64] = (code >> 8 & 127) | (last ^ shift) << 7
    assert pack.pack_lattice(codes, torch.ones(rows, 1), bits=2).codes.tolist() == expected
    bytes_ = torch.randint(0, 256, (rows, octets, 2), dtype=torch.uint8)
    assert torch.equal(reference.unpack_octets(reference.pack_octets(bytes_), rows, octets, 2), bytes_)


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lattice_linear_is_its_twin(bits: int, isa: str) -> None:
    torch.manual_seed(bits)
    for rows, octets, groups in [(48, 32, 2), (33, 40, 1), (5, 5, 1), (16, 256, 8)]:
        codes, scale, dense = lattice_weight(rows, octets, bits, groups)
        bias = torch.randn(rows)
        for act_group in (32, 0, -1):
            w = pack.pack_lattice(codes, scale, bits=bits, bias=bias, act_group=act_group)
            for m in (1, 2, 3, 8, 11):
                x = torch.randn(m, 8 * octets)
                expected = reference.linear(x, dense, bias, w.kind, act_group)
                assert_close(ops.native_linear(w, x, act_group, isa), expected, 1e-5)
                assert_close(ops.linear(x, w, act_group), expected, 1e-5)


@pytest.mark.parametrize("isa", native.isas())
def test_lattice_rows_do_not_depend_on_the_batch(isa: str) -> None:
    torch.manual_seed(0)
    for bits in (2, 3, 4):
        codes, scale, _ = lattice_weight(50, 192, bits, 3)
        w, x = pack.pack_lattice(codes, scale, bits=bits), torch.randn(40, 1536)
        together = ops.native_linear(w, x, 32, isa)
        for m in (1, 2, 7):
            assert torch.equal(ops.native_linear(w, x[:m], 32, isa), together[:m])


def test_lattice_bytes_are_the_codes_bits() -> None:
    for bits, per_weight in [(2, 2), (3, 3), (4, 4)]:
        codes, scale, _ = lattice_weight(64, 128, bits)
        w = pack.pack_lattice(codes, scale, bits=bits)
        stages = (w, w.rest) if w.rest else (w,)
        assert sum(s.codes.numel() for s in stages) * 8 == 64 * 1024 * per_weight


@pytest.mark.parametrize(("rows", "cols"), [(64, 256), (48, 160), (96, 96)])
def test_rotating_the_activations_undoes_the_rotation(rows: int, cols: int) -> None:
    """y = x dequantize()ᵀ, widths of powers of two, of Paley's orders and of neither."""
    torch.manual_seed(0)
    codes, scale, _ = lattice_weight(rows, cols // 8, 2)
    scheme = Scheme.parse("e8p2").weight
    assert scheme is not None
    quantized = QuantizedTensor(codes, scale, None, scheme, rotation=Rotation.random(rows, cols, 0))
    bias, x = torch.randn(rows), torch.randn(2, 3, cols)
    linear = RotatedLinear(quantized, bias, torch.float32)
    expected = torch.nn.functional.linear(x, quantized.dequantize(), bias)
    assert float((linear(x) - expected).norm() / expected.norm()) < 0.01  # int8 activations
    assert linear.bytes_read < quantized.numel * 2 / 2 + 4096
