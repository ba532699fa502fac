# ruff: noqa: ARG001  (a fake or a twin takes every argument of its operator)
"""The kernels as torch operators, `torch.ops.lowbit.*`.

Every operator is defined by its torch twin (`reference.py`), which runs on any device; on a CPU whose extension was
built, the C++ kernel of the same name answers instead. Tensors go to C++ as addresses, after the checks here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit.kernels import reference
from lowbit.kernels.pack import PackedWeight, native

_ACTIVATIONS = {"silu": 0, "gelu": 1}
_KV = {"fp16": 0, "bf16": 1, "int8": 2, "fp8": 3, "int4": 4}


def implementation() -> str:
    """What answers on the CPU: an instruction set, or "torch" when the extension was not built."""
    return native.isa() if native is not None else "torch"


def _flat(x: Tensor) -> Tensor:
    return x.detach().to(torch.float32).contiguous()


# ---- linear ----


@torch.library.custom_op("lowbit::linear", mutates_args=())
def linear_op(
    x: Tensor, codes: Tensor, scales: Tensor | None, zeros: Tensor | None, table: Tensor | None, bias: Tensor | None,
    kind: int, bits: int, rows: int, cols: int, group: int, fold: int, zero: int, act_group: int,
) -> Tensor:  # fmt: skip
    """x (..., cols) -> float32 (..., rows) by the packed weight that `codes` .. `zero` describe."""
    weight = reference.weight_of(codes, scales, zeros, table, kind, bits, rows, cols, group, zero)
    return reference.linear(_flat(x).view(-1, cols), weight, bias, kind, act_group).view(*x.shape[:-1], rows)


@linear_op.register_fake
def _(
    x: Tensor, codes: Tensor, scales: Tensor | None, zeros: Tensor | None, table: Tensor | None, bias: Tensor | None,
    kind: int, bits: int, rows: int, cols: int, group: int, fold: int, zero: int, act_group: int,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], rows), dtype=torch.float32)


def _linear_cpu(
    x: Tensor, codes: Tensor, scales: Tensor | None, zeros: Tensor | None, table: Tensor | None, bias: Tensor | None,
    kind: int, bits: int, rows: int, cols: int, group: int, fold: int, zero: int, act_group: int,
) -> Tensor:  # fmt: skip
    w = PackedWeight(kind, bits, rows, cols, group, fold, zero, codes, scales, zeros, table, bias)
    return native_linear(w, x, act_group)


def native_linear(w: PackedWeight, x: Tensor, act_group: int = 32, isa: str | None = None) -> Tensor:
    """The C++ product x (..., cols) -> (..., rows); `isa` names one of `native.isas()`."""
    if x.shape[-1] != w.cols:
        raise ValueError(f"expected {w.cols} columns, got {x.shape[-1]}")
    flat = _flat(x).view(-1, w.cols)
    out = torch.empty(len(flat), w.rows)
    if len(flat):
        native.linear(w.handle(), flat.data_ptr(), len(flat), act_group, out.data_ptr(), isa)
    out = out.view(*x.shape[:-1], w.rows)
    return out if w.rest is None else out.add_(native_linear(w.rest, x, act_group, isa))


def described(w: PackedWeight) -> tuple[Any, ...]:
    """A packed weight as the operator's arguments between x and act_group."""
    tensors = (w.codes, w.scales, w.zeros, w.table, w.bias)
    return (*tensors, w.kind, w.bits, w.rows, w.cols, w.group, w.fold, w.zero)


def linear(x: Tensor, w: PackedWeight, act_group: int = 32) -> Tensor:
    """x (..., cols) times a packed weight -> float32 (..., rows).

    `act_group`: columns per int8 activation scale; 0 one scale a row of x; -1 float activations.
    """
    out: Tensor = linear_op(
        x,
        w.codes,
        w.scales,
        w.zeros,
        w.table,
        w.bias,
        w.kind,
        w.bits,
        w.rows,
        w.cols,
        w.group,
        w.fold,
        w.zero,
        act_group,
    )
    return out if w.rest is None else out + linear(x, w.rest, act_group)


# ---- norm and quantization ----


@torch.library.custom_op("lowbit::rms_norm_quantize", mutates_args=())
def rms_norm_quantize(x: Tensor, weight: Tensor | None, eps: float, group: int) -> tuple[Tensor, Tensor]:
    """x (m, n) -> RMSNorm (none without a weight) -> int8 codes (m, n), scales (m, ceil(n / group)); group 0: a row."""
    return reference.quantize_rows(reference.rms_norm(_flat(x), weight, eps), group)


@rms_norm_quantize.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float, group: int) -> tuple[Tensor, Tensor]:
    m, n = x.shape
    groups = -(-n // group) if group else 1
    return x.new_empty((m, n), dtype=torch.int8), x.new_empty((m, groups), dtype=torch.float32)


@rms_norm_quantize.register_kernel("cuda")
def _rms_norm_quantize_cuda(x: Tensor, weight: Tensor | None, eps: float, group: int) -> tuple[Tensor, Tensor]:
    from lowbit.kernels.triton import ops as gpu  # which imports Triton if it is there and x can use it

    codes, scales = gpu.quantize(x, weight, eps, group, torch.int8)
    return codes, scales


def _rms_norm_quantize_cpu(x: Tensor, weight: Tensor | None, eps: float, group: int) -> tuple[Tensor, Tensor]:
    return native_norm_quantize(x, weight, eps, group)


def native_norm_quantize(
    x: Tensor, weight: Tensor | None, eps: float, group: int, isa: str | None = None
) -> tuple[Tensor, Tensor]:
    """The C++ `rms_norm_quantize`; groups of a multiple of 32 columns."""
    if group % 32:
        raise ValueError(f"the kernel's groups are multiples of 32, got {group}")
    flat, (m, n) = _flat(x), x.shape
    fold = group or 32
    stride = -(-n // fold) * fold
    codes = torch.empty(m, stride, dtype=torch.int8)
    scale, minus_sum = torch.empty(m, stride // fold), torch.empty(m, stride // fold, dtype=torch.int32)
    w = None if weight is None else _flat(weight)
    native.norm_quant(
        flat.data_ptr(), 0 if w is None else w.data_ptr(), eps, m, n, stride, fold, group or stride,
        codes.data_ptr(), scale.data_ptr(), minus_sum.data_ptr(), 0, isa,
    )  # fmt: skip
    return codes[:, :n].contiguous(), scale if group else scale[:, :1].contiguous()


# ---- element-wise ----


@torch.library.custom_op("lowbit::glu", mutates_args=())
def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up, float32; activation "silu" or "gelu" (tanh form)."""
    return reference.glu(_flat(gate), _flat(up), activation)


@glu.register_fake
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape, dtype=torch.float32)


def _glu_cpu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    g, u = _flat(gate), _flat(up)
    out = torch.empty_like(g)
    native.glu(g.data_ptr(), u.data_ptr(), out.data_ptr(), 1, g.numel(), _ACTIVATIONS[activation])
    return out


@torch.library.custom_op("lowbit::rope", mutates_args=())
def rope(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x (tokens, heads, dim), positions (tokens,), cos and sin (max_position, rotary / 2)."""
    return reference.rope(_flat(x), positions, _flat(cos), _flat(sin))


@rope.register_fake
def _(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


def _rope_cpu(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = x.detach().to(torch.float32).clone(memory_format=torch.contiguous_format)
    (tokens, heads, dim), c, s = x.shape, _flat(cos), _flat(sin)
    if tokens and (int(positions.min()) < 0 or int(positions.max()) >= len(c)):
        raise ValueError(f"positions must lie in [0, {len(c)})")
    p = positions.to(torch.int32).contiguous()
    native.rope(out.data_ptr(), p.data_ptr(), tokens, heads, dim, 2 * c.shape[1], c.data_ptr(), s.data_ptr())
    return out


@torch.library.custom_op("lowbit::add_gram", mutates_args={"total"})
def add_gram(total: Tensor, x: Tensor, threads: int) -> None:
    """total (n, n) float32 += xᵀ x for x (rows, n) of any float dtype. Only the lower triangle is promised. `threads`
    are those of C++; torch's products go by its own setting."""
    reference.add_gram(total, x)


@add_gram.register_fake
def _(total: Tensor, x: Tensor, threads: int) -> None:
    return None


def _add_gram_cpu(total: Tensor, x: Tensor, threads: int) -> None:
    if x.dtype == torch.bfloat16:
        native_add_gram(total, x, threads)
    else:
        reference.add_gram(total, x)


def native_add_gram(total: Tensor, x: Tensor, threads: int = 1, isa: str | None = None) -> None:
    """The C++ `add_gram`: the same bits for any number of threads."""
    x = _bfloat16_rows(x)
    _check_square(total, x.shape[1])
    native.gram(x.data_ptr(), *x.shape, total.data_ptr(), threads, isa)


def _bfloat16_rows(x: Tensor) -> Tensor:
    if x.dtype != torch.bfloat16 or x.dim() != 2:
        raise ValueError(f"expected rows of bfloat16, got {x.dtype} in {x.dim()} dimensions")
    return x.detach().contiguous()


def _check_square(matrix: Tensor, n: int) -> None:
    if matrix.dtype != torch.float32 or matrix.shape != (n, n) or not matrix.is_contiguous():
        raise ValueError(f"expected a contiguous float32 matrix of {n} x {n}, got {matrix.dtype} {tuple(matrix.shape)}")


@torch.library.custom_op("lowbit::quadratic_forms", mutates_args=())
def quadratic_forms(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Σ over rows of x H xᵀ for x (rows, n) of any float dtype and each symmetric float32 H (n, n): (matrices,) float64
    on the CPU. It is ⟨xᵀ x, H⟩: one product of half the cost of x H, whatever the number of matrices."""
    return reference.quadratic_forms(x, matrices)


@quadratic_forms.register_fake
def _(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    return torch.empty(len(matrices), dtype=torch.float64)


def _quadratic_forms_cpu(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    if x.dtype == torch.bfloat16:
        return native_quadratic_forms(x, matrices, torch.get_num_threads())
    return reference.quadratic_forms(x, matrices)


def native_quadratic_forms(x: Tensor, matrices: Sequence[Tensor], threads: int = 1, isa: str | None = None) -> Tensor:
    """The C++ `quadratic_forms`: the same bits for any number of threads."""
    x = _bfloat16_rows(x)
    for H in matrices:
        _check_square(H, x.shape[1])
    forms = native.quadratic_forms(x.data_ptr(), *x.shape, [H.data_ptr() for H in matrices], threads, isa)
    return torch.tensor(forms, dtype=torch.float64)


@torch.library.custom_op("lowbit::hadamard", mutates_args=())
def hadamard(x: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of the last dimension, in blocks of its largest power of two."""
    return reference.hadamard(x.detach().float().clone())


@hadamard.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


def _hadamard_cpu(x: Tensor) -> Tensor:
    out = x.detach().to(torch.float32).clone(memory_format=torch.contiguous_format)
    n = x.shape[-1]
    native.hadamard(out.data_ptr(), out.numel() // n, n, (n & -n) ** -0.5)
    return out


# ---- attention ----


@torch.library.custom_op("lowbit::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, kv: str, first: int, scale: float, softcap: float, window: int
) -> Tensor:
    """Causal grouped attention through a cache of type `kv` ("fp16", "bf16", "int8", "fp8", "int4").

    q (tokens, heads, dim) sits at positions first ..; k and v (first + tokens, kv_heads, dim) are stored in the cache
    first. One token over int8 keys takes the decoder's integer path.
    """
    return reference.attention(_flat(q), _flat(k), _flat(v), kv, first, scale, softcap, window)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, kv: str, first: int, scale: float, softcap: float, window: int) -> Tensor:
    return q.new_empty(q.shape, dtype=torch.float32)


def _attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, kv: str, first: int, scale: float, softcap: float, window: int
) -> Tensor:
    return native_attention(q, k, v, kv, first, scale, softcap, window)


def native_attention(
    q: Tensor, k: Tensor, v: Tensor, kv: str, first: int, scale: float, softcap: float = 0.0, window: int = 0,
    isa: str | None = None, block: int = 32, table: Tensor | None = None, fixed: bool = False,
) -> Tensor:  # fmt: skip
    """The C++ `attention`, over a cache of blocks of `block` tokens in the order of `table` (default: shuffled)."""
    (tokens, heads, dim), (total, kv_heads, _) = q.shape, k.shape
    if dim % 16 or heads % kv_heads or total != first + tokens:
        raise ValueError("head_dim must be a multiple of 16, heads of kv_heads, and k must hold first + tokens tokens")
    n_blocks = -(-total // block)
    if table is None:
        table = torch.arange(n_blocks, dtype=torch.int32).flip(0).contiguous()
    cache = torch.empty(native.kv_block_bytes(_KV[kv], kv_heads, dim, block) * n_blocks, dtype=torch.uint8)
    qf, kf, vf = _flat(q), _flat(k), _flat(v)
    out = torch.empty_like(qf)
    common: dict[str, Any] = {
        "heads": heads, "kv_heads": kv_heads, "dim": dim, "kv_type": _KV[kv], "block": block, "cache": cache.data_ptr(),
        "table": table.data_ptr(), "scale": scale, "softcap": softcap, "window": window, "isa": isa, "fixed": fixed,
    }  # fmt: skip
    if first:  # the cached part: stored only
        native.attention(q=0, k=kf.data_ptr(), v=vf.data_ptr(), tokens=first, pos0=0, decode=False, out=0, **common)
    native.attention(
        q=qf.data_ptr(), k=kf[first:].data_ptr(), v=vf[first:].data_ptr(), tokens=tokens, pos0=first,
        decode=tokens == 1, out=out.data_ptr(), **common,
    )  # fmt: skip
    return out


if native is not None:
    linear_op.register_kernel("cpu")(_linear_cpu)
    rms_norm_quantize.register_kernel("cpu")(_rms_norm_quantize_cpu)
    glu.register_kernel("cpu")(_glu_cpu)
    rope.register_kernel("cpu")(_rope_cpu)
    hadamard.register_kernel("cpu")(_hadamard_cpu)
    if native.isa() == "avx512bf16":  # elsewhere bf16 products are emulated, and torch's float ones are faster
        add_gram.register_kernel("cpu")(_add_gram_cpu)
        quadratic_forms.register_kernel("cpu")(_quadratic_forms_cpu)
    attention.register_kernel("cpu")(_attention_cpu)
