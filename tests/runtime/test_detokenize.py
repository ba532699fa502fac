"""Pieces join to the decoded whole; characters are whole; stop strings cut the same text however it is split."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from lowbit.model.checkpoint import open_checkpoint
from lowbit.model.load import load_tokenizer
from lowbit.runtime.detokenize import Detokenizer, StopText


@pytest.fixture(scope="module")
def byte_level() -> Any:
    return load_tokenizer(open_checkpoint("demo"))


@pytest.fixture(scope="module")
def sentencepiece() -> Any:
    """Words that begin with U+2581 and bytes for the rest, decoded as Llama 2 does: the first space is dropped."""
    vocab = {"<unk>": 0, "<s>": 1, "\u2581hello": 2, "\u2581world": 3, "ld": 4, ",": 5, "\u2581": 6}
    vocab |= {f"<0x{b:02X}>": 7 + b for b in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def pieces(tokenizer: Any, tokens: list[int], prompt: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt or [])
    return [*(detokenizer.push(t) for t in tokens), detokenizer.flush()]


@given(text=st.text(max_size=40))
@settings(max_examples=150, deadline=None)
def test_pieces_join_to_the_text(byte_level: Any, text: str) -> None:
    out = pieces(byte_level, byte_level(text, add_special_tokens=False)["input_ids"])
    assert "".join(out) == text
    assert "\ufffd" not in "".join(out) or "\ufffd" in text


@given(tokens=st.lists(st.integers(3, 4095), max_size=30))
@settings(max_examples=150, deadline=None)
def test_pieces_join_to_the_decoded_whole_even_of_garbage(byte_level: Any, tokens: list[int]) -> None:
    assert "".join(pieces(byte_level, tokens)) == byte_level.decode(tokens)


def test_a_character_of_several_tokens_comes_once_and_whole(byte_level: Any) -> None:
    tokens = byte_level("a\U0001f600b", add_special_tokens=False)["input_ids"]
    out = pieces(byte_level, tokens)
    assert len(tokens) > 4
    assert [p for p in out if p] == ["a", "\U0001f600", "b"]


def test_bytes_that_never_become_a_character_come_at_the_end(byte_level: Any) -> None:
    tokens = byte_level("\U0001f600", add_special_tokens=False)["input_ids"][:-1]
    out = pieces(byte_level, tokens)
    assert out[:-1] == [""] * len(tokens)
    assert out[-1] == "\ufffd"


def test_the_space_before_a_word_depends_on_the_prompt(sentencepiece: Any) -> None:
    assert pieces(sentencepiece, [2, 3])[:2] == ["hello", " world"]
    assert pieces(sentencepiece, [3, 5, 3], prompt=[1, 2]) == [" world", ",", " world", ""]
    assert pieces(sentencepiece, [3], prompt=[1]) == ["world", ""]  # nothing stands before it


def test_byte_tokens_of_sentencepiece_make_characters(sentencepiece: Any) -> None:
    tokens = [2, *(7 + b for b in "é€\U0001f600".encode()), 3]
    assert [p for p in pieces(sentencepiece, tokens) if p] == ["hello", "é", "€", "\U0001f600", " world"]


def test_special_tokens_give_no_text(byte_level: Any) -> None:
    assert "".join(pieces(byte_level, [1, *byte_level("x", add_special_tokens=False)["input_ids"], 2])) == "x"


def naive_cut(text: str, stops: list[str]) -> str:
    """Letter by letter: the first moment at which the text ends with a stop string."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stops if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


@given(
    parts=st.lists(st.text("ab\n", max_size=4), max_size=8),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
@settings(max_examples=400, deadline=None)
def test_stop_strings_cut_the_same_however_the_text_is_split(parts: list[str], stops: list[str]) -> None:
    filter_, out = StopText(stops), ""
    whole = naive_cut("".join(parts), stops)
    for part in parts:
        out += filter_.push(part)
        assert whole.startswith(out)  # nothing is sent that would have to be taken back
    assert filter_.stopped == (whole != "".join(parts))
    assert out + filter_.flush() == whole


def test_only_a_possible_beginning_is_held_back() -> None:
    stop = StopText(["\n\nUser:"])
    assert [stop.push(p) for p in ("one", "\n", "two\n\nUs", "ual\n\nUse")] == ["one", "", "\ntwo", "\n\nUsual"]
    assert stop.push("r:") == ""
    assert stop.stopped
    assert stop.push("more") == stop.flush() == ""
