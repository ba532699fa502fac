import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from lowbit.calibration import load_calibration, read_documents, tokenize
from lowbit.errors import InputError
from lowbit.model.checkpoint import DEMO, open_checkpoint
from lowbit.model.load import load_tokenizer

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(open_checkpoint("demo"))


@pytest.fixture
def chat_tokenizer() -> Any:
    tokenizer = load_tokenizer(open_checkpoint("demo"))
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """write(name, text or bytes) -> the file's path as a string."""

    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("seed", [0, 7])
def test_text_windows_follow_the_peers_convention(text_file: Path, tokenizer: Any, seed: int) -> None:
    """Tokenized whole without special tokens; windows start where numpy's default_rng(seed) says."""
    ids = np.array(
        Tokenizer.from_file(str(DEMO / "model" / "tokenizer.json"))
        .encode(text_file.read_text(encoding="utf-8"), add_special_tokens=False)
        .ids
    )
    starts = np.random.default_rng(seed).integers(0, len(ids) - 96, 12)
    expected = torch.from_numpy(np.stack([ids[s : s + 96] for s in starts]).astype(np.int64))
    calibration = load_calibration(str(text_file), tokenizer, 12, 96, seed)
    assert calibration.tokens.dtype == torch.int64
    assert torch.equal(calibration.tokens, expected)
    assert calibration.digest == hashlib.sha256(expected.numpy().tobytes()).hexdigest()


def test_documents_are_shuffled_joined_and_cut(write: Callable[..., str], tokenizer: Any) -> None:
    texts = [f"def function_{i}(x): return x + {i}" for i in range(30)]
    source = write("d.jsonl", jsonl([{"text": t, "other": 1} for t in texts]))
    order = np.random.default_rng(5).permutation(30)
    stream = np.concatenate([[*tokenize(texts[i], tokenizer), tokenizer.eos_token_id] for i in order])
    calibration = load_calibration(source, tokenizer, 4, 32, 5)
    assert calibration.tokens.tolist() == stream[: 4 * 32].reshape(4, 32).tolist()


def test_chat_goes_through_the_template(write: Callable[..., str], chat_tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    source = write("c.jsonl", jsonl([{"messages": messages}]))
    assert read_documents(Path(source), chat_tokenizer) == ["<user>hello\n<assistant>yes\n"]
    tokens = load_calibration(source, chat_tokenizer, 1, 8, 0).tokens
    assert tokens.tolist() == [tokenize("<user>hello\n<assistant>yes\n", chat_tokenizer)[:8].tolist()]


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl"])
def test_same_seed_same_windows(write: Callable[..., str], tokenizer: Any, name: str) -> None:
    lines = [f"import module_{i}  # line {i} of a file" for i in range(60)]
    source = write(name, jsonl([{"text": t} for t in lines]) if name.endswith("l") else "\n".join(lines))
    first, again, other = (load_calibration(source, tokenizer, 4, 24, seed) for seed in (1, 1, 2))
    assert torch.equal(first.tokens, again.tokens)
    assert first.digest == again.digest != other.digest


def test_the_digest_is_of_the_windows_not_of_the_file(text_file: Path, tokenizer: Any, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere.txt"
    moved.write_bytes(text_file.read_bytes())
    one, two = (load_calibration(str(p), tokenizer, 3, 16, 0) for p in (text_file, moved))
    assert (one.digest, one.source) != (two.digest, two.source)
    assert one.digest == two.digest


def test_too_little_text_says_how_much(write: Callable[..., str], tokenizer: Any) -> None:
    text = "a short text"
    n = len(tokenize(text, tokenizer))
    with pytest.raises(InputError, match=rf"s\.txt: {n} tokens, .*windows of 512.*--samples .*--seq-len"):
        load_calibration(write("s.txt", text), tokenizer, 128, 512, 0)
    with pytest.raises(InputError, match=rf"s\.jsonl: {n + 1} tokens, but 4 windows of 16 need 64.*at most 0 here"):
        load_calibration(write("s.jsonl", jsonl([{"text": text}])), tokenizer, 4, 16, 0)


def test_one_window_more_than_there_is(write: Callable[..., str], tokenizer: Any) -> None:
    source = write("s.jsonl", jsonl([{"text": "word " * 100}]))
    ids = len(tokenize("word " * 100, tokenizer)) + 1
    fits = ids // 10
    assert len(load_calibration(source, tokenizer, fits, 10, 0).tokens) == fits
    with pytest.raises(InputError, match=f"lower --samples \\(at most {fits} here\\)"):
        load_calibration(source, tokenizer, fits + 1, 10, 0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.txt", "", r"no text \(0 characters"),
        ("e.txt", " \n\n ", r"no text \(4 characters, all white space\)"),
        ("e.jsonl", "\n", "no text"),
        ("l.txt", "caf\xe9 au lait".encode("latin-1"), r"l\.txt: not UTF-8 at byte 3 \(0xe9\)"),
        ("u.jsonl", '{"text": "x"}'.encode("utf-16"), r"u\.jsonl: not UTF-8 at byte 0 \(0xff\)"),
        ("b.jsonl", '{"text": "a"}\n\n{"text": "b"}\n\n\n{"text": "c"}\n', "3 empty lines, the first is line 2"),
        ("j.jsonl", '{"text": "a"}\n{"text": \n', r"j\.jsonl:2: not JSON"),
        ("j.jsonl", '{"text": "a"}\n' + "[" * 100_000 + "\n", r"j\.jsonl:2: not JSON"),
        ("j.jsonl", '{"text": "a", "n": ' + "1" * 5000 + "}\n", r"j\.jsonl:1: not JSON"),
        ("a.jsonl", '["a"]\n', r"a\.jsonl:1: expected an object with 'text' or 'messages', got list"),
        ("f.jsonl", '{"prompt": "a", "answer": "b"}\n', r"got the fields \['answer', 'prompt'\]"),
        ("f.jsonl", '{"text": 3}\n', r"expected a string field 'text'.*got the fields \['text'\]"),
        ("f.jsonl", '{"text": "  "}\n', r"f\.jsonl:1: the text is empty"),
        (
            "m.jsonl",
            '{"messages": [{"role": "user", "content": "x"}]}\n',
            "m.jsonl:1: .*tokenizer has no chat template",
        ),
        ("s.jsonl", '{"text": "' + "\\ud800" * 40 + '"}\n', r"s\.jsonl"),
    ],
)
def test_files_at_fault(write: Callable[..., str], tokenizer: Any, name: str, content: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_calibration(write(name, content), tokenizer, 1, 8, 0)


@pytest.mark.parametrize("messages", [["hello"], [{"content": "x"}], [3], [None]])
def test_messages_the_template_refuses(write: Callable[..., str], chat_tokenizer: Any, messages: list[Any]) -> None:
    chat_tokenizer.chat_template = "{{ messages[0]['role'] + messages[0]['content'] }}"
    source = write("m.jsonl", jsonl([{"messages": messages}]))
    with pytest.raises(InputError, match=r"m\.jsonl:1: the chat template refuses these messages"):
        load_calibration(source, chat_tokenizer, 1, 8, 0)


def test_missing_file_and_directory(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"nowhere\.txt: no such file"):
        load_calibration(str(tmp_path / "nowhere.txt"), tokenizer, 1, 8, 0)
    with pytest.raises(InputError, match="this is a directory"):
        load_calibration(str(tmp_path), tokenizer, 1, 8, 0)


def test_windows_line_ends_are_read(write: Callable[..., str], tokenizer: Any) -> None:
    source = write("w.jsonl", '{"text": "one"}\r\n{"text": "two"}\r\n')
    assert read_documents(Path(source), tokenizer) == ["one", "two"]
