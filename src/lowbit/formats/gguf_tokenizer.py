"""The tokenizer inside a GGUF file, as transformers has it.

Two of llama.cpp's kinds are read, those that gguf_tokens.py writes:

gpt2    byte-level BPE with the file's own merges; `tokenizer.ggml.pre` names how text is split before
llama   SentencePiece: of all neighbouring pieces that join to a piece of the vocabulary, those with the highest score
        are joined first; characters without a piece become bytes. As BPE: a merge for every way to cut a piece into two
        others, ranked by the piece's score.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lowbit.errors import InputError

_UNKNOWN, _CONTROL, _USER, _BYTE = 2, 3, 4, 6  # of tokenizer.ggml.token_type
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS, _REST = r"|[^\r\n\p{L}\p{N}]?\p{L}+", r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + _LETTERS + r"|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + _LETTERS + r"|\p{N}" + _REST
_SPLITS = {  # llama.cpp's name -> splitting expression; None: GPT-2's, which is built in
    "gpt-2": None, "phi-2": None, "olmo": None,
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3,
    "qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2,
}  # fmt: skip
_SPACE = "▁"


def read_tokenizer(metadata: Mapping[str, Any], where: str) -> Any:
    """The transformers tokenizer that `tokenizer.ggml.*` describes. Raises InputError for other kinds, and for
    metadata that contradict themselves."""

    def word(key: str, default: Any = None) -> Any:
        value = metadata.get(f"tokenizer.ggml.{key}", default)
        return value.tolist() if isinstance(value, np.ndarray) else value

    kind, tokens = word("model"), word("tokens")
    if kind not in ("gpt2", "llama") or not _strings(tokens):
        raise InputError(
            f"{where}: its tokenizer is of the kind {kind!r}; lowbit reads 'gpt2' and 'llama'. Name the model that the "
            "file was made from (evaluate: --against)."
        )
    types = word("token_type", [1] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise InputError(f"{where}: {len(tokens)} tokens, but another number of token types: the file is damaged.")
    unknown = next((t for t, k in zip(tokens, types, strict=True) if k == _UNKNOWN), None)
    if kind == "gpt2":
        tokenizer = _byte_level(tokens, word("merges"), word("pre", "gpt-2"), where)
    else:
        prefix = bool(word("add_space_prefix", True))
        tokenizer = _sentence_piece(tokens, types, word("scores"), unknown, where, prefix=prefix)
    added = [(t, k) for t, k in zip(tokens, types, strict=True) if k in (_UNKNOWN, _CONTROL, _USER)]
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=k != _USER) for t, k in added])
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {f"{ours}_token": _token(tokens, word(f"{theirs}_token_id")) for ours, theirs in names.items()}
    _frame(tokenizer, special, bos=word("add_bos_token", kind == "llama"), eos=word("add_eos_token", False))
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{name: token for name, token in special.items() if token is not None}
    )
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        wrapped.chat_template = template
    return wrapped


def _strings(tokens: Any) -> bool:
    return isinstance(tokens, list) and bool(tokens) and all(isinstance(t, str) for t in tokens)


def _token(tokens: list[str], number: Any) -> str | None:
    return tokens[number] if isinstance(number, int) and 0 <= number < len(tokens) else None


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    """Token -> number; of equal tokens the first."""
    found: dict[str, int] = {}
    for number, token in enumerate(tokens):
        found.setdefault(token, number)
    return found


def _byte_level(tokens: list[str], merges: Any, pre: Any, where: str) -> Tokenizer:
    if pre not in _SPLITS:
        raise InputError(
            f"{where}: it splits text as {pre!r}, which lowbit does not know; it knows {', '.join(_SPLITS)}. Name the "
            "model that the file was made from (evaluate: --against)."
        )
    vocabulary = _vocabulary(tokens)
    pairs = [(left, right) for left, _, right in (m.partition(" ") for m in merges or [] if isinstance(m, str))]
    lost = next(
        (p for p in pairs if p[0] not in vocabulary or p[1] not in vocabulary or "".join(p) not in vocabulary), None
    )
    if not pairs or lost is not None:
        raise InputError(f"{where}: the tokenizer's merges are missing or name no token: {lost!r}.")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    expression = _SPLITS[pre]
    if expression is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        split = pre_tokenizers.Split(Regex(expression), behavior="isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(
    tokens: list[str], types: list[int], scores: Any, unknown: str | None, where: str, *, prefix: bool
) -> Tokenizer:
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise InputError(f"{where}: {len(tokens)} tokens, but another number of scores: the file is damaged.")
    vocabulary = _vocabulary(tokens)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=_merges(vocabulary, types, scores), unk_token=unknown, fuse_unk=True,
            byte_fallback=_BYTE in types,
        )
    )  # fmt: skip
    steps = [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    ends = [decoders.Strip(" ", 1, 0)] if prefix else []
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def _merges(vocabulary: Mapping[str, int], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """All cuts of a piece into two others, the highest score first, of one piece the lowest numbers first."""
    apart = (_UNKNOWN, _CONTROL, _USER, _BYTE)  # never joined from others
    pieces = {t: n for t, n in vocabulary.items() if types[n] not in apart}
    ranked = []
    for piece, number in pieces.items():
        for at in range(1, len(piece)):
            left, right = pieces.get(piece[:at]), pieces.get(piece[at:])
            if left is not None and right is not None:
                ranked.append((-scores[number], number, left, right, at, piece))
    return [(piece[:at], piece[at:]) for *_, at, piece in sorted(ranked)]


def _frame(tokenizer: Tokenizer, special: Mapping[str, str | None], *, bos: Any, eos: Any) -> None:
    """The special tokens that go around a text."""
    before = special["bos_token"] if bos else None
    after = special["eos_token"] if eos else None
    around = [t for t in (before, after) if t is not None]
    if around:
        form = [*([before] if before else []), "$A", *([after] if after else [])]
        numbers = [(t, tokenizer.token_to_id(t) or 0) for t in dict.fromkeys(around)]
        tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=numbers)
