"""Checkpoints damaged in some hundreds of seeded ways: the outcome is a result or one clear InputError, never
another exception, and never a half-made directory."""

import json
import math
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import lowbit
from lowbit.artifact import read_manifest
from lowbit.errors import InputError
from lowbit.model.checkpoint import INDEX, SINGLE

ROUNDS = 50  # of each kind of damage
ODD: list[Any] = [
    None, -1, 0, 1, 3, 7, 1.5, math.inf, 10**9, 2**63, "", "x", "silu", [], [1], {}, {"type": "linear"}, True, False,
]  # fmt: skip
DTYPES = ["F32", "F16", "BF16", "F64", "I8", "I32", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "X7", "", None]


def read_parts(file: Path) -> tuple[Any, bytes]:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_parts(file: Path, header: Any, body: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)


def damage_bytes(path: Path, rng: random.Random) -> None:
    """A few bytes anywhere, half of the time in the header."""
    data = bytearray((path / SINGLE).read_bytes())
    (header,) = struct.unpack("<Q", data[:8])
    end = len(data) if rng.random() < 0.5 else header + 8
    for _ in range(rng.choice([1, 1, 2, 8])):
        data[rng.randrange(end)] = rng.randrange(256)
    (path / SINGLE).write_bytes(bytes(data))


def damage_length(path: Path, rng: random.Random) -> None:
    """The file cut or grown, or another header length."""
    data = (path / SINGLE).read_bytes()
    how = rng.randrange(3)
    if how == 0:
        data = data[: rng.randrange(len(data))]
    elif how == 1:
        data += rng.randbytes(rng.randrange(1, 100))
    else:
        length = rng.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(data), rng.randrange(len(data))])
        data = struct.pack("<Q", length) + data[8:]
    (path / SINGLE).write_bytes(data)


def damage_header(path: Path, rng: random.Random) -> None:
    """A tensor's dtype, shape, offsets or name."""
    header, body = read_parts(path / SINGLE)
    name = rng.choice([n for n in header if n != "__metadata__"])
    entry = header[name]
    how = rng.randrange(6)
    if how == 0:
        entry["dtype"] = rng.choice(DTYPES)
    elif how == 1:
        entry["shape"] = rng.choice(
            [entry["shape"][::-1], [], [0], [2**62, 4], [-1], [*entry["shape"], 1], None, ["a"]]
        )
    elif how == 2:
        entry["data_offsets"] = [v + rng.choice([-2, 0, 2, 2**40]) for v in entry["data_offsets"]]
    elif how == 3:
        header[name + rng.choice(["x", ".5.weight", "_packed", "_scale", "é", "/../y"])] = header.pop(name)
    elif how == 4:
        del header[name]
    else:
        header[name] = rng.choice(ODD)
    write_parts(path / SINGLE, header, body)


def damage_config(path: Path, rng: random.Random) -> None:
    """A word of config.json changed, dropped, added, or the text cut."""
    config = json.loads((path / "config.json").read_text())
    how = rng.randrange(8)
    if how == 0:
        text = json.dumps(config)
        (path / "config.json").write_text(text[: rng.randrange(len(text))])
        return
    if how == 1:
        del config[rng.choice(list(config))]
    elif how == 2:
        config[rng.choice(["quantization_config", "text_config", "auto_map", "tie_word_embeddings"])] = rng.choice(ODD)
    else:
        config[rng.choice(list(config))] = rng.choice(ODD)
    (path / "config.json").write_text(json.dumps(config))


def damage_index(path: Path, rng: random.Random) -> None:
    """Two shards and an index that says something else."""
    tensors = load_file(path / SINGLE)
    (path / SINGLE).unlink()
    names = sorted(tensors)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    parts = [names[::2], names[1::2]]
    if rng.random() < 0.3:
        parts[1].append(rng.choice(parts[0]))  # twice
    for file, part in zip(files, parts, strict=True):
        save_file({n: tensors[n] for n in part}, path / file, {"format": "pt"})
    weight_map: dict[str, Any] = {n: f for f, part in zip(files, parts, strict=True) for n in part}
    weight_map[rng.choice([*names, "other"])] = rng.choice([*files, "../" + files[0], "no.safetensors", "", 3, None])
    text = json.dumps({"weight_map": weight_map})
    (path / INDEX).write_text(text if rng.random() < 0.8 else text[: rng.randrange(len(text))])


@pytest.fixture(scope="module")
def least(make_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    path = make_llama(tmp_path_factory.mktemp("least") / "model", torch.float32, **words)
    (path / "tokenizer.json").unlink()  # not of this model; round-to-nearest needs none
    (path / "tokenizer_config.json").unlink()
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "damage", [damage_bytes, damage_length, damage_header, damage_config, damage_index], ids=lambda d: d.__name__
)
def test_damage_is_a_result_or_a_clear_error(least: Path, tmp_path: Path, damage: Any) -> None:
    outcomes = {"result": 0, "refused": 0}
    for n in range(ROUNDS):
        model, out = tmp_path / f"{n}", tmp_path / f"{n}-out"
        shutil.copytree(least, model)
        damage(model, random.Random(n))
        try:
            lowbit.quantize(model, out, scheme="w4a16-g32", method="rtn")
            assert read_manifest(out)["fingerprint"]["logits"], n
            outcomes["result"] += 1
        except InputError as refusal:
            message = str(refusal)
            assert 20 < len(message) < 1500, n
            assert not out.exists(), n
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(f"round {n} of {damage.__name__}: {type(error).__name__}: {error}") from error
        shutil.rmtree(model)
    assert outcomes["refused"] > ROUNDS / 10


def test_the_undamaged_one_is_a_result(least: Path, tmp_path: Path) -> None:
    assert lowbit.quantize(least, tmp_path / "out", scheme="w4a16-g32", method="rtn")["layers"]


def test_an_expert_of_no_rows_is_refused_and_one_of_zeros_is_not(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        hidden_size=32, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2, vocab_size=64,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / SINGLE)
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    save_file(tensors | {name: torch.zeros(32, 32)}, tmp_path / "model" / SINGLE)
    document = lowbit.quantize(tmp_path / "model", tmp_path / "out", scheme="w4a16-g32", method="rtn")
    assert name.removesuffix(".weight") in {r["name"] for r in document["layers"]}
    save_file(tensors | {name: torch.zeros(0, 32)}, tmp_path / "model" / SINGLE)
    with pytest.raises(InputError, match=r"experts\.2\.up_proj\.weight' is \[0, 32\]"):
        lowbit.quantize(tmp_path / "model", tmp_path / "none", scheme="w4a16-g32", method="rtn")
    del tensors[name]
    save_file(tensors, tmp_path / "model" / SINGLE)
    with pytest.raises(InputError, match=r"in no shard, the first is 'model\.layers\.0\.mlp\.experts\.2\.up_proj"):
        lowbit.quantize(tmp_path / "model", tmp_path / "none", scheme="w4a16-g32", method="rtn")
