"""The native decoder against transformers, family by family, on tiny random models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

pytest.importorskip("lowbit.kernels._cpu", reason="the extension was not built")

from lowbit.kernels import pack
from lowbit.runtime.decoder import Decoder, family_of

CONFIGS = {
    "llama": tf.LlamaConfig,
    "mistral": tf.MistralConfig,
    "qwen2": tf.Qwen2Config,
    "qwen3": tf.Qwen3Config,
    "gemma": tf.GemmaConfig,
    "gemma2": tf.Gemma2Config,
    "gemma3_text": tf.Gemma3TextConfig,
    "phi3": tf.Phi3Config,
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"hidden_size": 80, "head_dim": 32, "attention_bias": True, "mlp_bias": True}),
    ("mistral", {"sliding_window": 40}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("gemma", {}),
    ("gemma2", {"sliding_window": 40}),
    ("gemma3_text", {"sliding_window": 40}),
    ("phi3", {}),
    ("phi3", {"partial_rotary_factor": 0.5, "sliding_window": 50}),
]
IDS = [f"{k}-{'-'.join(o)}" if o else k for k, o in CASES]


def tiny(kind: str, **options: Any) -> Any:
    """A random model with lively weights that bf16 holds exactly."""
    torch.manual_seed(0)
    base = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16,
        "num_key_value_heads": 2, "vocab_size": 160, "max_position_embeddings": 512, "pad_token_id": 0,
    }  # fmt: skip
    if kind == "phi3":
        del base["head_dim"]
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[kind](**(base | options))).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.1)
            p.copy_(p.bfloat16().float())
    return model


def native(model: Any, act_group: int = -1, **options: Any) -> Decoder:
    """The native decoder of a model in bf16 weights; float activations unless asked otherwise."""
    state = model.state_dict()

    def weight(name: str) -> pack.PackedWeight:
        w = state.get(name + ".weight", state["model.embed_tokens.weight"])
        return pack.pack_bf16(w, bias=state.get(name + ".bias"))

    return Decoder(model.config, weight, lambda name: state[name], act_group=act_group, **options)


def reference(model: Any, ids: Tensor) -> Tensor:
    """transformers' logits (tokens, vocab)."""
    with torch.no_grad():
        logits: Tensor = model(ids[None]).logits[0]
    return logits


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize(("kind", "options"), CASES, ids=IDS)
def test_logits_are_those_of_transformers(kind: str, options: dict[str, Any]) -> None:
    model, ids = tiny(kind, **options), torch.randint(3, 160, (150,))
    expected = reference(model, ids)
    # What remains is the cache's rounding: 11 bits of fp16, 8 of bf16 and int8, 4 of fp8 and int4.
    for kv, tolerance in (("fp16", 2e-3), ("bf16", 2e-2), ("int8", 6e-2), ("fp8", 0.3), ("int4", 0.5)):
        d = native(model, kv=kv)
        got, best = d.forward(ids, [(150, 0, False)], d.linear_table(), every=True)
        assert got is not None
        assert gap(got, expected) < tolerance, kv
        assert torch.equal(best.long(), got.argmax(-1))


@pytest.mark.parametrize(("kind", "options"), CASES, ids=IDS)
def test_prefill_is_step_by_step(kind: str, options: dict[str, Any]) -> None:
    """Bit for bit, through int8 or bf16 activations; int8 keys take another path, within its rounding of the query."""
    model, ids = tiny(kind, **options), torch.randint(3, 160, (100,))
    for kv, act_group in (("fp16", 32), ("fp8", 32), ("int4", 32), ("int8", -1)):
        d = native(model, act_group, kv=kv)
        whole, _ = d.forward(ids, [(100, 0, False)], d.linear_table(), every=True)
        first, _ = d.forward(ids[:60], [(60, 0, False)], d.linear_table(), every=True)
        steps = [d.forward(ids[i : i + 1], [(1, i, True)], d.linear_table())[0] for i in range(60, 100)]
        assert whole is not None
        assert first is not None
        together = torch.cat([first, *(s for s in steps if s is not None)])
        if kv == "int8":
            assert gap(together, whole) < 2e-3
        else:
            assert torch.equal(together, whole)


def test_a_batch_is_its_sequences_one_by_one() -> None:
    """Mixed prefill and decoding in one call, blocks in disorder, give the bits of separate calls."""
    model = tiny("llama")
    ids = torch.randint(3, 160, (200,), dtype=torch.int32)
    d = native(model, 32, kv_tokens=512)
    tables = torch.tensor([[7, 3, 0, 9], [1, 8, 2, 5], [11, 10, 6, 4]], dtype=torch.int32)
    alone = []
    for row, (start, n) in enumerate([(0, 40), (50, 70), (130, 3)]):
        got, _ = d.forward(ids[start : start + n], [(n, 0, False)], tables[row : row + 1])
        step, _ = d.forward(ids[start + n : start + n + 1], [(1, n, True)], tables[row : row + 1])
        alone.append((got, step))
    d.forward(ids[:40], [(40, 0, False)], tables[:1])
    mixed = torch.cat([ids[40:41], ids[50:120], ids[130:133]])
    got, _ = d.forward(mixed, [(1, 40, True), (70, 0, False), (3, 0, False)], tables)
    assert got is not None
    assert torch.equal(got[0], alone[0][1][0])
    assert torch.equal(got[1], alone[1][0][0])
    assert torch.equal(got[2], alone[2][0][0])


@pytest.mark.parametrize(
    ("ids", "sequences", "message"),
    [
        ([1, 999], [(2, 0, False)], "vocabulary"),
        ([1, -1], [(2, 0, False)], "vocabulary"),
        ([], [], "tokens"),
        ([1] * 30, [(30, 500, False)], "context"),
        ([1] * 3, [(2, 0, False)], "cover"),
        ([1] * 2, [(2, 0, True)], "one token"),
        ([1], [(1, -5, True)], "cover"),
    ],
)
def test_bad_input_is_refused(ids: list[int], sequences: list[tuple[int, int, bool]], message: str) -> None:
    d = native(tiny("llama"), 32, kv_tokens=512)
    table = d.linear_table()[:, : 512 // 32][: len(sequences)]
    with pytest.raises(ValueError, match=message):
        d.forward(torch.tensor(ids, dtype=torch.int32), sequences, table)


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match="transformers"):
        family_of(tf.GPT2Config())
