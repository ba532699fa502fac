"""Tokenizers out of GGUF files: what lowbit writes comes back, and SentencePiece files read as SentencePiece reads."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from lowbit.errors import InputError
from lowbit.formats.gguf_tokenizer import read_tokenizer
from lowbit.formats.gguf_tokens import tokenizer_metadata
from lowbit.model.checkpoint import DEMO, open_checkpoint
from lowbit.model.load import load_tokenizer

TEXTS = (
    "def f(x):\n    return x ** 2  # ümläut\n", "  two  spaces\t", "it's 12345 — naïve 日本", "a</s>b", "\n\n\n",
    "I'LL", "e\u0301 \u2581 <0x41>",
)  # fmt: skip


def values(metadata: dict[str, Any]) -> dict[str, Any]:
    """Typed metadata as a reader gives them."""
    return {key: value for key, (_, value) in metadata.items()}


@pytest.fixture(scope="module")
def demo() -> Any:
    return load_tokenizer(open_checkpoint(DEMO / "model"))


def test_a_byte_level_tokenizer_comes_back(demo: Any) -> None:
    back = read_tokenizer(values(tokenizer_metadata(demo, 4096)), "x.gguf")
    text = (DEMO / "evaluation.txt").read_text(encoding="utf-8")[:20_000]
    for sample in (*TEXTS, text):
        for special in (False, True):
            ids = demo(sample, add_special_tokens=special)["input_ids"]
            assert back(sample, add_special_tokens=special)["input_ids"] == ids
        assert back.decode(ids) == demo.decode(ids)
    assert (back.bos_token_id, back.eos_token_id) == (demo.bos_token_id, demo.eos_token_id)


# A small SentencePiece-style vocabulary: bytes, characters, and joined pieces in the order in which they are joined.
_MERGES = [
    ("▁", "t"),
    ("h", "e"),
    ("▁t", "he"),
    ("i", "n"),
    ("in", "g"),
    ("▁", "s"),
    ("e", "r"),
    ("he", "r"),
    ("▁", "▁"),
]


def sentence_piece() -> Any:
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    pieces = ["<unk>", "<s>", "</s>", *bytes_, *"▁abcdefghinorstu", *("".join(m) for m in _MERGES)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=_MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_a_sentencepiece_tokenizer_comes_back() -> None:
    own = sentence_piece()
    metadata = values(tokenizer_metadata(own, len(own)))
    back = read_tokenizer(metadata, "x.gguf")
    for text in (*TEXTS, "the string in the other thing", "hers  ings", "theher inging"):
        ids = own(text, add_special_tokens=False)["input_ids"]
        assert back(text, add_special_tokens=False)["input_ids"] == ids
        assert back.decode(ids) == own.decode(ids)
    with_start = read_tokenizer(metadata | {"tokenizer.ggml.add_bos_token": True}, "x.gguf")
    assert with_start("the")["input_ids"] == [1, *back("the", add_special_tokens=False)["input_ids"]]


def test_the_highest_score_is_joined_first() -> None:
    """Naive SentencePiece: join the best neighbouring pair until there is none."""
    metadata = values(tokenizer_metadata(sentence_piece(), 300))
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    rank = {t: (scores[i], -i) for i, t in enumerate(tokens) if metadata["tokenizer.ggml.token_type"][i] == 1}
    back = read_tokenizer(metadata, "x.gguf")
    for text in ("the thing", "in the string", "sher", "  ings"):
        pieces = list("▁" + text.replace(" ", "▁"))
        while pairs := [(rank[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in rank]:
            best = max(score for score, _ in pairs)
            at = min(i for score, i in pairs if score == best)
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        assert back.convert_ids_to_tokens(back(text, add_special_tokens=False)["input_ids"]) == pieces


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"tokenizer.ggml.model": "t5"}, "of the kind 't5'; lowbit reads 'gpt2' and 'llama'"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "lowbit reads 'gpt2'"),
        ({"tokenizer.ggml.pre": "martian"}, "splits text as 'martian'"),
        ({"tokenizer.ggml.merges": ["a notatoken"]}, r"name no token: \('a', 'notatoken'\)"),
        ({"tokenizer.ggml.merges": None}, "merges are missing"),
        ({"tokenizer.ggml.token_type": [1]}, "another number of token types"),
        ({"tokenizer.ggml.model": "llama"}, "another number of scores"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(demo: Any, damage: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        read_tokenizer(values(tokenizer_metadata(demo, 4096)) | damage, "x.gguf")


def test_a_file_alone_is_enough_to_chat_and_evaluate(tiny: Path, tmp_path: Path) -> None:
    from lowbit.accuracy import evaluate
    from lowbit.exporting import export
    from lowbit.runtime.engine import load

    export(tiny, tmp_path / "full.gguf", "gguf", type="f32")
    export(tiny, tmp_path / "small.gguf", "gguf", type="q8_0", method="search")
    assert load(tmp_path / "full.gguf", "float32").generate("def f", max_new_tokens=4) == load(
        tiny, "float32"
    ).generate("def f", max_new_tokens=4)
    (tmp_path / "t.txt").write_text((DEMO / "evaluation.txt").read_text(encoding="utf-8")[:1500])
    document = evaluate(
        [tmp_path / "small.gguf"], tmp_path / "t.txt", against=tmp_path / "full.gguf", seq_len=64, runtime="float32"
    )
    assert document["results"][0]["kl"]["mean"] < 0.01
