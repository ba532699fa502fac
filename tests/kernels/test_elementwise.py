"""Norm with quantization, gated activations, rotary positions, Hadamard, attention: kernels against twins."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from lowbit.kernels import ops, reference

native = pytest.importorskip("lowbit.kernels._cpu", reason="the extension was not built")
ISAS = native.isas()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", [32, 100, 256, 2048])
def test_quantization_is_its_twin_exactly(n: int, isa: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, n)
    x[1] = 0
    x[2] *= 1e-40
    x[3] *= 1e20
    for group in (32, 128, 0):
        codes, scale = ops.native_norm_quantize(x, None, 0.0, group, isa)
        expected, expected_scale = reference.quantize_rows(x, group)
        assert torch.equal(codes, expected)
        assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("isa", ISAS)
def test_norm_quantize_is_its_twin(isa: str) -> None:
    torch.manual_seed(0)
    for n in (64, 100, 2048):
        x, w = torch.randn(4, n) * 3, torch.randn(n)
        codes, scale = ops.native_norm_quantize(x, w, 1e-5, 32, isa)
        expected, expected_scale = reference.quantize_rows(reference.rms_norm(x, w, 1e-5), 32)
        assert (codes.int() - expected.int()).abs().max() <= 1  # a value on the edge of two codes may fall either way
        assert (codes != expected).float().mean() < 0.01
        torch.testing.assert_close(scale, expected_scale, rtol=1e-5, atol=0)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_glu_is_its_twin(activation: str) -> None:
    gate, up = torch.linspace(-100, 100, 1003), torch.randn(1003)
    torch.testing.assert_close(ops.glu(gate, up, activation), reference.glu(gate, up, activation), rtol=2e-6, atol=2e-6)


def test_rope_is_its_twin() -> None:
    for dim, rotary in [(64, 64), (96, 48), (16, 16), (80, 20)]:
        x, angle = torch.randn(7, 3, dim), torch.rand(50, rotary // 2) * 6
        positions = torch.randint(0, 50, (7,))
        got = ops.rope(x, positions, angle.cos(), angle.sin())
        torch.testing.assert_close(got, reference.rope(x, positions, angle.cos(), angle.sin()), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="positions"):
        ops.rope(x, positions + 50, angle.cos(), angle.sin())


@pytest.mark.parametrize("n", [1, 2, 8, 16, 24, 256, 768, 2048])
def test_hadamard_is_its_twin_and_its_own_inverse(n: int) -> None:
    x = torch.randn(3, n)
    y = ops.hadamard(x)
    torch.testing.assert_close(y, reference.hadamard(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ops.hadamard(y), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv", ["fp16", "bf16", "int8", "fp8", "int4", "int8-fixed", "int4-fixed"])
def test_attention_is_its_twin(kv: str, isa: str) -> None:
    kv, _, fixed = kv.partition("-")
    torch.manual_seed(0)
    for heads, kv_heads, dim, first, tokens, softcap, window in [
        (8, 2, 64, 0, 37, 0.0, 0),
        (8, 2, 64, 100, 1, 0.0, 0),
        (4, 4, 16, 63, 66, 0.0, 20),
        (6, 1, 128, 5, 40, 30.0, 0),
        (4, 2, 80, 129, 1, 0.0, 50),
        (1, 1, 32, 0, 1, 0.0, 0),
    ]:
        q = torch.randn(tokens, heads, dim)
        k, v = torch.randn(2, first + tokens, kv_heads, dim)
        if fixed:  # as if divided by stored scales: some values are past the grid's end
            q, k, v = q / 40, k * (40 if kv == "int8" else 3), v * (40 if kv == "int8" else 3)
        got = ops.native_attention(q, k, v, kv, first, dim**-0.5, softcap, window, isa, fixed=bool(fixed))
        expected = reference.attention(q, k, v, kv, first, dim**-0.5, softcap, window, fixed=bool(fixed))
        # Decoding over int8 keys rounds the query to 15 bits; all else is float arithmetic.
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-3 if fixed else 2e-4 if kv == "int8" else 5e-6)


@pytest.mark.parametrize("kv", ["fp16", "int8", "int4"])
def test_a_token_does_not_depend_on_the_prompt_it_came_with(kv: str) -> None:
    """A cached prefix gives the same bits as the whole prompt at once."""
    torch.manual_seed(0)
    q, (k, v) = torch.randn(90, 4, 32), torch.randn(2, 90, 2, 32)
    whole = ops.native_attention(q, k, v, kv, 0, 0.2)
    for first in (1, 40, 64, 80):
        assert torch.equal(ops.native_attention(q[first:], k, v, kv, first, 0.2), whole[first:])


def test_attention_survives_extremes() -> None:
    q = torch.full((3, 2, 16), 1e4)
    k, v = torch.full((3, 2, 16), -1e4), torch.zeros(3, 2, 16)
    for kv in ("fp16", "bf16", "int8", "fp8", "int4"):
        assert torch.isfinite(ops.native_attention(q, k, v, kv, 0, 1.0)).all()


def test_opcheck() -> None:
    opcheck(ops.rms_norm_quantize, (torch.randn(3, 64), torch.randn(64), 1e-5, 32))
    opcheck(ops.glu, (torch.randn(3, 64), torch.randn(3, 64), "silu"))
    angle = torch.rand(9, 8)
    opcheck(ops.rope, (torch.randn(3, 2, 16), torch.arange(3), angle.cos(), angle.sin()))
    opcheck(ops.hadamard, (torch.randn(3, 24),))
    q, kv = torch.randn(3, 4, 16), torch.randn(3, 2, 16)
    opcheck(ops.attention, (q, kv, kv, "fp16", 0, 0.25, 0.0, 0))
