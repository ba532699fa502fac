"""Tokens per second of the native decoder on a 1.1 B Llama shape with random weights.

Hidden 2048, inner 8192, 16 layers, 32/8 heads, vocabulary 32000: what `llama-bench` is run on beside it. Prefill is
512 tokens in one call; decoding runs at the asked context, one call a token. Medians over repeats; the best is shown
too, because on a shared machine it is the one that says what the code can do.

    python benchmarks/decoder_1b.py --scheme w4a16-g128 --kv fp16 --json -
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from lowbit.kernels import pack
from lowbit.kernels.pack import PackedWeight
from lowbit.runtime.decoder import Decoder

SHAPE = LlamaConfig(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=32000,
    max_position_embeddings=8192,
)
# name -> bits of the linears, group (0: one scale a row), activation group, bits of the head
SCHEMES: dict[str, tuple[int, int, int, int]] = {
    "w4a16-g128": (4, 128, 32, 8),
    "w4a16-g32": (4, 32, 32, 8),
    "w4a8-g128": (4, 128, 128, 8),
    "w8a16": (8, 0, 32, 8),
    "w8a8": (8, 0, 0, 8),
    "bf16": (16, 0, 32, 16),
    "w3a16-g128": (3, 128, 32, 8),
    "w2a16-g128": (2, 128, 32, 8),
}


def random_weight(rows: int, cols: int, bits: int, group: int, act_group: int) -> PackedWeight:
    """A matrix of small random values in the asked storage."""
    if bits == 16:
        return pack.pack_bf16(torch.randn(rows, cols, dtype=torch.bfloat16) * 0.02)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (rows, cols), dtype=torch.int8)
    scale = torch.full((rows, cols // group if group else 1), 0.04 / half).to(torch.bfloat16)
    return pack.pack_int(codes, scale.float(), bits=bits, act_group=act_group)


def make(scheme: str, kv: str, kv_tokens: int, max_tokens: int = 512) -> Decoder:
    """The decoder with random weights of one scheme; matrices of a shape share nothing but their values' law."""
    bits, group, act_group, head_bits = SCHEMES[scheme]
    c = SHAPE
    shapes = {
        "q_proj": (c.hidden_size, c.hidden_size), "k_proj": (512, c.hidden_size), "v_proj": (512, c.hidden_size),
        "o_proj": (c.hidden_size, c.hidden_size), "gate_proj": (c.intermediate_size, c.hidden_size),
        "up_proj": (c.intermediate_size, c.hidden_size), "down_proj": (c.hidden_size, c.intermediate_size),
    }  # fmt: skip

    def weight(name: str) -> PackedWeight:
        if name == "lm_head":
            return random_weight(c.vocab_size, c.hidden_size, head_bits, 0, act_group)
        return random_weight(*shapes[name.rsplit(".", 1)[1]], bits, group, act_group)

    def tensor(name: str) -> torch.Tensor:
        if "embed" in name:
            return torch.randn(c.vocab_size, c.hidden_size, dtype=torch.bfloat16) * 0.02
        return torch.ones(c.hidden_size)

    return Decoder(
        c,
        weight,
        tensor,
        kv=kv,
        kv_tokens=kv_tokens,
        max_tokens=max_tokens,
        max_position=min(kv_tokens, 8192),
        act_group=act_group,
    )


def timed(run: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of `repeats` runs after one that is not counted."""
    run()
    out = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        out.append(time.perf_counter() - start)
    return out


def read_bandwidth() -> float:
    """Bytes/s, best of the read patterns, median of five."""
    buffer = torch.empty(512 << 20, dtype=torch.uint8)
    pack.native.advise_huge(buffer.data_ptr(), buffer.numel())
    buffer.fill_(1)
    rate = pack.native.read_rate
    return max(statistics.median(rate(buffer.data_ptr(), buffer.numel(), p) for _ in range(5)) for p in range(8))


def measure(d: Decoder, context: int, batch: int, prefill: int, repeats: int, steps: int) -> dict[str, float]:
    """Prefill and decode rates of one decoder."""
    table = d.linear_table(batch)
    ids = torch.randint(0, d.vocab, (prefill,), dtype=torch.int32)
    result: dict[str, float] = {}
    if batch == 1 and prefill:
        s = timed(lambda: d.forward(ids, [(prefill, 0, False)], table, logits=False), repeats)
        result |= {"prefill_tokens_per_s": prefill / statistics.median(s), "prefill_best": prefill / min(s)}
    one = torch.randint(0, d.vocab, (batch,), dtype=torch.int32)
    for i in range(0, context, 256):  # fill the cache
        n = min(256, context - i)
        for b in range(batch):
            d.forward(
                torch.randint(0, d.vocab, (n,), dtype=torch.int32), [(n, i, False)], table[b : b + 1], logits=False
            )
    s = timed(lambda: d.forward(one, [(1, context, True)] * batch, table, logits=False), steps)
    kv = batch * context * SHAPE.num_hidden_layers * d.kv_bytes / (d.kv_blocks * d.kv_block)
    return result | {
        "decode_tokens_per_s": batch / statistics.median(s),
        "decode_best": batch / min(s),
        "bytes_per_s": (d.weight_bytes + kv) / statistics.median(s),
    }


def main() -> None:
    """Parse, measure, print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--scheme", action="append", choices=SCHEMES)
    p.add_argument("--kv", default="fp16", choices=["fp16", "bf16", "int8", "fp8"])
    p.add_argument("--context", type=int, default=128)
    p.add_argument("--batch", type=int, action="append")
    p.add_argument("--prefill", type=int, default=512)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--steps", type=int, default=40)
    p.add_argument("--threads", type=int, default=0)
    p.add_argument("--json", metavar="FILE")
    a = p.parse_args()
    if a.threads:
        pack.native.set_threads(a.threads)
    peak = read_bandwidth()
    out: dict[str, Any] = {
        "isa": pack.native.isa(),
        "threads": pack.native.threads(),
        "read_bytes_per_s": peak,
        "results": [],
    }
    print(f"{out['isa']}, {out['threads']} threads, read {peak / 1e9:.1f} GB/s", file=sys.stderr)
    for scheme in a.scheme or ["w4a16-g128", "w4a16-g32", "w8a16", "w8a8"]:
        batches = a.batch or [1, 8]
        d = make(scheme, a.kv, max(batches) * (-(-(a.context + 1) // 32) * 32 + 32) + a.prefill)
        for batch in batches:
            r = measure(d, a.context, batch, a.prefill, a.repeats, a.steps)
            r["mbu"] = r["bytes_per_s"] / peak
            out["results"].append({"scheme": scheme, "kv": a.kv, "context": a.context, "batch": batch,
                                   "weight_bytes": d.weight_bytes, **r})  # fmt: skip
            print(
                scheme,
                a.kv,
                f"ctx {a.context} batch {batch}:",
                *(f"{k} {v:.4g}" for k, v in r.items()),
                file=sys.stderr,
            )
        del d
    if a.json:
        text = json.dumps(out, indent=1)
        print(text) if a.json == "-" else Path(a.json).write_text(text)


if __name__ == "__main__":
    main()
