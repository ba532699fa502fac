"""The two batched products of attention in int8 (SmoothQuant, Xiao et al. 2022, figure 6; here without calibration).

    S = Q K^T:  one scale for every token and head of Q and of K, found at run time,
                S_ij = q_i k_j (q-code_i . k-code_j)
    O = P V:    the sum runs over tokens j, so V's scale of token j cannot be taken out of it. It goes into P instead:
                P'_ij = P_ij v_j, whose rows are rounded to 0 .. 255 (probabilities have no sign) under one scale p_i
                and multiplied with V's codes: O_i = p_i Σ_j p-code_ij v-code_j

Every sum of codes is exact, as integer units compute it; what is left out of int8 is what every kernel keeps in float:
the softmax and the scales. A row depends on the tokens it sees alone, so prefill and single steps agree.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from lowbit.errors import InputError
from lowbit.kernels.reference import quantize_rows

NAME = "lowbit_int8_products"
WHY_HERE_ONLY = (
    "the batched products of attention in int8 (-bmm) are computed by lowbit's general engine alone; no file format "
    "and no kernel of lowbit's own carries them"
)


def use_int8_products(net: Any) -> None:
    """Let the attention of `net` compute so. Raises InputError for a model whose attention cannot be replaced."""
    AttentionInterface.register(NAME, int8_attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    if not net._can_set_attn_implementation():
        raise InputError(
            f"{type(net).__name__}: its attention is written out in its own class, so its two products cannot be "
            "computed in int8 (-bmm): use w8a8."
        )
    net.set_attn_implementation(NAME)


def int8_attention(
    _module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, softcap: float | None = None, s_aux: Tensor | None = None, **_words: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query (batch, heads, n, dim), key and value (batch, kv_heads, m, dim), mask added to scores -> (batch, n, heads,
    dim) in the query's dtype."""
    if s_aux is not None:
        raise InputError("attention sinks have no int8 products (-bmm): use w8a8.")
    q, q_scale = _codes(query)
    (k, k_scale), (v, v_scale) = (_codes(_repeat(x, query.shape[1])) for x in (key, value))
    scores = (q @ k.transpose(2, 3)) * q_scale * k_scale.transpose(2, 3)  # below 2^24: exact in float32
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]].float()
    weights = scores.softmax(-1) * v_scale.transpose(2, 3)
    step = weights.amax(-1, keepdim=True) / 255
    codes = torch.where(step > 0, weights / step, torch.zeros_like(weights)).round()
    out = (codes.double() @ v.double()).float() * step
    return out.transpose(1, 2).to(query.dtype).contiguous(), None


def _codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes as float32, and a scale (..., 1) for every row."""
    codes, scale = quantize_rows(x.reshape(-1, x.shape[-1]), 0)
    return codes.float().view(x.shape), scale.view(*x.shape[:-1], 1)


def _repeat(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1)
