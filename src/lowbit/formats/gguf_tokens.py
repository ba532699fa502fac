"""A tokenizer in GGUF's words.

Two kinds are written: byte-level BPE (GPT-2, Llama 3, Qwen: "gpt2"), whose splitting expression llama.cpp knows by name
only, and SentencePiece-style BPE with byte fallback (Llama 2, Mistral, Gemma, Phi-3: "llama"), whose merges become
scores: the earlier a piece is merged, the higher.
"""

import json
from typing import Any

from lowbit.errors import InputError
from lowbit.formats.gguf_write import Typed

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
# What follows the contractions in the splitting expressions of tokenizer.json, and llama.cpp's name for each.
_SPLITS = {
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt-2",
}


def tokenizer_metadata(tokenizer: Any, vocab_size: int) -> dict[str, Typed]:
    """The tokenizer.* keys of a transformers tokenizer. Raises InputError for one llama.cpp would split otherwise."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError("GGUF export needs a tokenizer.json (a fast tokenizer); this one has none.")
    document = json.loads(backend.to_str())
    model = document["model"]
    if model["type"] != "BPE":
        raise InputError(f"GGUF export knows BPE tokenizers, not {model['type']}.")
    ids = {i: token for token, i in model["vocab"].items()}
    added = {t["id"]: t for t in document["added_tokens"]}
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    kinds, tokens = [], []
    for i in range(vocab_size):
        token = added[i]["content"] if i in added else ids.get(i, f"[PAD{i}]")
        tokens.append(token)
        kinds.append(_kind(i, token, ids, added, model))
    found: dict[str, Typed] = {"tokenizer.ggml.tokens": ("array:str", tokens)}
    if _is_byte_level(document):
        found |= {
            "tokenizer.ggml.model": ("str", "gpt2"),
            "tokenizer.ggml.pre": ("str", _split_name(document["pre_tokenizer"])),
            "tokenizer.ggml.merges": ("array:str", merges),
        }
    elif model.get("byte_fallback"):
        found |= {
            "tokenizer.ggml.model": ("str", "llama"),
            "tokenizer.ggml.pre": ("str", "default"),
            "tokenizer.ggml.scores": ("array:f32", _scores(tokens, model["merges"])),
            "tokenizer.ggml.add_space_prefix": ("bool", _prefixes_space(document)),
        }
    else:
        raise InputError("GGUF export knows byte-level BPE and BPE with byte fallback; this tokenizer is neither.")
    found["tokenizer.ggml.token_type"] = ("array:i32", kinds)
    return found | _special(tokenizer)


def _kind(i: int, token: str, ids: dict[int, str], added: dict[int, Any], model: dict[str, Any]) -> int:
    if token == model.get("unk_token") or (i in added and token == "<unk>"):
        return _UNKNOWN
    if i in added:
        return _CONTROL if added[i]["special"] else _USER
    if i not in ids:
        return _UNUSED
    if model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return _BYTE
    return _NORMAL


def _parts(step: dict[str, Any] | None, of: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, a sequence or a single one."""
    if step is None:
        return []
    return list(step[of]) if step["type"] == "Sequence" else [step]


def _is_byte_level(document: dict[str, Any]) -> bool:
    return any(p["type"] == "ByteLevel" for p in _parts(document["pre_tokenizer"], "pretokenizers"))


def _split_name(pre_tokenizer: dict[str, Any]) -> str:
    steps = _parts(pre_tokenizer, "pretokenizers")
    if len(steps) == 1 and steps[0].get("use_regex") and not steps[0].get("add_prefix_space"):
        return "gpt-2"
    splits = [s["pattern"].get("Regex", "") for s in steps if s["type"] == "Split"]
    if len(steps) == 2 and len(splits) == 1:
        for ending, name in _SPLITS.items():
            if splits[0].endswith(ending):
                return name
    raise InputError(
        f"llama.cpp has no name for this tokenizer's way of splitting text ({json.dumps(pre_tokenizer)[:200]}): its "
        "tokens would differ. Known: those of GPT-2, Llama 3 and Qwen 2."
    )


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """Minus the rank at which a piece is first merged. One character needs no score; other pieces are never merged."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    return [-float(ranks[t]) if t in ranks else (0.0 if len(t) == 1 else -1e6) for t in tokens]


def _prefixes_space(document: dict[str, Any]) -> bool:
    steps = _parts(document["normalizer"], "normalizers") + _parts(document["pre_tokenizer"], "pretokenizers")
    return any(
        s["type"] == "Prepend" or (s["type"] == "Metaspace" and s.get("prepend_scheme", "always") != "never")
        for s in steps
    )


def _special(tokenizer: Any) -> dict[str, Typed]:
    found: dict[str, Typed] = {}
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding"}  # so spelled there
    for ours, theirs in names.items():
        token = getattr(tokenizer, f"{ours}_token_id", None)
        if token is not None:
            found[f"tokenizer.ggml.{theirs}_token_id"] = ("u32", token)
    plain, whole = (tokenizer("a", add_special_tokens=s)["input_ids"] for s in (False, True))
    found["tokenizer.ggml.add_bos_token"] = ("bool", whole != plain and whole[0] == tokenizer.bos_token_id)
    found["tokenizer.ggml.add_eos_token"] = ("bool", whole != plain and whole[-1] == tokenizer.eos_token_id)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        found["tokenizer.chat_template"] = ("str", template)
    return found
