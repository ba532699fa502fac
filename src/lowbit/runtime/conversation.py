"""Text and messages to the tokens a model expects, and the tokens at which it ends an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lowbit.errors import InputError
from lowbit.model.checkpoint import Checkpoint


def encode(tokenizer: Any, text: str) -> list[int]:
    """A text as tokens, with the special tokens that the tokenizer puts before a text (Llama's <s>).

    Raises InputError for an empty one.
    """
    if not text:
        raise InputError("the prompt is empty: give some text.")
    return [int(t) for t in tokenizer(text)["input_ids"]]


def has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def chat_tokens(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Messages ({"role", "content"}) as tokens, up to where the model's answer begins."""
    if not has_template(tokenizer):
        raise InputError(
            "this model has no chat template, so it was not made for conversations: give it a text to continue."
        )
    if not messages:
        raise InputError("the conversation is empty: give at least one message.")
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise InputError(f'a message is {message!r}; expected {{"role": "user", "content": "..."}}.')
    try:
        tokens = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
    except Exception as error:  # templates are programs of the model's makers and raise what they like
        reason = str(error).strip().split("\n")[0][:300] or type(error).__name__
        raise InputError(f"the model's chat template refuses these messages: {reason}") from error
    return [int(t) for t in tokens]


def end_tokens(checkpoint: Checkpoint, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer: what generation_config.json, config.json and the tokenizer say together."""
    file = checkpoint.path / "generation_config.json"
    try:
        generation = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable as JSON ({error}).") from error
    found: list[Any] = [tokenizer.eos_token_id]
    for words in (generation, checkpoint.config):
        value = words.get("eos_token_id") if isinstance(words, dict) else None
        found += value if isinstance(value, list) else [value]
    return tuple(sorted({t for t in found if isinstance(t, int)}))
