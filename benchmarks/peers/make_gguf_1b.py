"""Write a 1.1-billion-parameter Llama with random weights as a BF16 GGUF file: make_gguf_1b.py OUT.gguf [--seed 0].

Good for timing only: the shape is real, the words are noise. One tensor is in memory at a time.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType
from gguf.quants import quantize

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, VOCABULARY, CONTEXT = 2048, 8192, 16, 32, 8, 32000, 4096
HEAD = HIDDEN // HEADS
BF16 = GGMLQuantizationType.BF16


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """The name and shape (out, in) of every tensor, in the order of the file."""
    yield "token_embd.weight", (VOCABULARY, HIDDEN)
    for i in range(LAYERS):
        yield f"blk.{i}.attn_norm.weight", (HIDDEN,)
        yield f"blk.{i}.attn_q.weight", (HIDDEN, HIDDEN)
        yield f"blk.{i}.attn_k.weight", (KV_HEADS * HEAD, HIDDEN)
        yield f"blk.{i}.attn_v.weight", (KV_HEADS * HEAD, HIDDEN)
        yield f"blk.{i}.attn_output.weight", (HIDDEN, HIDDEN)
        yield f"blk.{i}.ffn_norm.weight", (HIDDEN,)
        yield f"blk.{i}.ffn_gate.weight", (INNER, HIDDEN)
        yield f"blk.{i}.ffn_up.weight", (INNER, HIDDEN)
        yield f"blk.{i}.ffn_down.weight", (HIDDEN, INNER)
    yield "output_norm.weight", (HIDDEN,)
    yield "output.weight", (VOCABULARY, HIDDEN)


def make_tensor(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Norms of ones in float32; matrices in BF16 (as bytes), scaled so that activations keep their size."""
    if len(shape) == 1:
        return np.ones(shape, dtype=np.float32)
    weight = rng.standard_normal(shape, dtype=np.float32)
    weight *= shape[1] ** -0.5
    return quantize(weight, BF16)


def add_metadata(writer: GGUFWriter) -> None:
    writer.add_name("random-1b")
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)


def add_tokenizer(writer: GGUFWriter) -> None:
    """A stand-in of the right size: three special tokens, the 256 bytes, then made-up words."""
    special, octets = ["<unk>", "<s>", "</s>"], [f"<0x{i:02X}>" for i in range(256)]
    words = [f"\u2581w{i}" for i in range(VOCABULARY - len(special) - len(octets))]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    kinds += [TokenType.BYTE] * len(octets) + [TokenType.NORMAL] * len(words)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(special + octets + words)
    writer.add_token_scores([-float(i) for i in range(VOCABULARY)])
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = np.random.default_rng(args.seed)
    writer = GGUFWriter(args.out, "llama")
    add_metadata(writer)
    add_tokenizer(writer)
    for name, shape in shapes():
        items, width, stored = int(np.prod(shape)), 4, None
        if len(shape) > 1:
            width, stored = 2, BF16
        writer.add_tensor_info(name, shape, np.dtype(np.float32), items * width, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, shape in shapes():
        writer.write_tensor_data(make_tensor(shape, rng))
    writer.close()


if __name__ == "__main__":
    main()
