from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from lowbit.errors import InputError
from lowbit.model.checkpoint import SINGLE, open_checkpoint
from lowbit.model.load import load_tokenizer, materialize, materialize_outside, open_source, release, skeleton
from lowbit.model.stream import stream_logits
from lowbit.model.walk import find_blocks


def test_skeleton_holds_no_weights(tiny: Path) -> None:
    model = skeleton(open_checkpoint(tiny))
    assert all(p.is_meta for p in model.parameters())
    assert all(not b.is_meta for b in model.buffers())


def test_materialize_and_release_one_block(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    model = skeleton(checkpoint)
    source = open_source(model, checkpoint)
    block = materialize(model, "model.layers.1", source, torch.float32)
    stored = load_file(tiny / SINGLE)
    for name, parameter in block.named_parameters():
        assert torch.equal(parameter, stored[f"model.layers.1.{name}"].float())
    assert all(p.is_meta for p in model.get_submodule("model.layers.0").parameters())
    release(block)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_model_is_transformers_own(make_llama: Callable[..., Path], tmp_path: Path, tied: bool) -> None:
    path = make_llama(tmp_path / "model", torch.float32, tie_word_embeddings=tied)
    checkpoint = open_checkpoint(path)
    assert ("lm_head.weight" in checkpoint.tensors) == (not tied)
    model = skeleton(checkpoint)
    source, blocks = open_source(model, checkpoint), find_blocks(model)
    materialize_outside(model, blocks, source, torch.float32)
    for name in blocks.names:
        materialize(model, name, source, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(path)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    tokens = torch.arange(24).reshape(2, 12)
    assert torch.equal(model(input_ids=tokens).logits, theirs(input_ids=tokens).logits)
    assert torch.equal(stream_logits(checkpoint, tokens), theirs(input_ids=tokens).logits)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"model_type": "no-such-model"}, "cannot build a language model of model_type 'no-such-model'"),
        ({"model_type": "t5", "architectures": None}, "an encoder-decoder model .model_type 't5'."),
        ({"model_type": None}, "cannot build a language model of model_type None"),
        ({"vocab_size": "many"}, "cannot build a language model"),
        ({"hidden_size": -4}, "cannot build a language model"),
        ({"hidden_size": 96}, r"is \[.*\] in model\.safetensors but config\.json makes it \[.*96"),
        ({"intermediate_size": 256}, r"is \[.*128.*\] in model\.safetensors but config\.json makes it \[.*256"),
        ({"vocab_size": 5000}, r"is \[4096, 64\] in model\.safetensors but config\.json makes it \[5000, 64\]"),
        ({"num_hidden_layers": 3}, "are in no shard, the first is 'model.layers.2"),
        ({"attention_bias": True}, r"are in no shard, the first is 'model\.layers\.0\.self_attn\.q_proj\.bias'"),
    ],
)
def test_configs_at_fault(broken: Path, edit_json: Callable[..., None], words: dict[str, object], message: str) -> None:
    edit_json(broken / "config.json", **words)
    with pytest.raises(InputError, match=message):
        skeleton(open_checkpoint(broken))


def test_weights_of_more_layers_than_the_config_has(broken: Path, edit_json: Callable[..., None]) -> None:
    """Dropping blocks in silence would make another model."""
    edit_json(broken / "config.json", num_hidden_layers=1)
    with pytest.raises(InputError, match=r"model\.layers\.1\."):
        skeleton(open_checkpoint(broken))


def test_missing_parameter(broken: Path) -> None:
    tensors = load_file(broken / SINGLE)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / SINGLE)
    with pytest.raises(InputError, match=r"1 of the model's parameters.*'model\.layers\.1\.mlp\.up_proj\.weight'"):
        skeleton(open_checkpoint(broken))


def test_no_tokenizer(broken: Path) -> None:
    (broken / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"no tokenizer \(tokenizer\.json"):
        load_tokenizer(open_checkpoint(broken))


def test_damaged_tokenizer(broken: Path) -> None:
    (broken / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(InputError, match="the tokenizer cannot be loaded"):
        load_tokenizer(open_checkpoint(broken))


def test_tokenizer_of_another_model(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_llama(tmp_path / "model", vocab_size=256))
    with pytest.raises(InputError, match="the tokenizer has 4096 tokens but the embedding only 256 rows"):
        load_tokenizer(checkpoint)


def test_transformers_settings_stay_as_they_were(tiny: Path) -> None:
    transformers_logging.disable_progress_bar()
    skeleton(open_checkpoint(tiny))
    assert not transformers_logging.is_progress_bar_enabled()
