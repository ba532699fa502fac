import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.errors import InputError
from lowbit.model.checkpoint import INDEX, SINGLE, open_checkpoint

Q = "model.layers.1.self_attn.q_proj.weight"


def shard_in_two(path: Path) -> tuple[Path, Path]:
    """Replace model.safetensors by two shards and an index; returns the shards."""
    tensors = load_file(path / SINGLE)
    (path / SINGLE).unlink()
    names = sorted(tensors)
    files = path / "model-00001-of-00002.safetensors", path / "model-00002-of-00002.safetensors"
    half = len(names) // 2
    weight_map = {}
    for file, part in zip(files, (names[:half], names[half:]), strict=True):
        save_file({n: tensors[n] for n in part}, file)
        weight_map |= dict.fromkeys(part, file.name)
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return files


def refuse(path: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as info:
        open_checkpoint(path)
    assert "\n" not in str(info.value)  # one paragraph


def test_headers_and_tensors(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    stored = load_file(tiny / SINGLE)
    assert checkpoint.tensors.keys() == stored.keys()
    assert checkpoint.dtype == torch.bfloat16
    assert checkpoint.nbytes == sum(t.nbytes for t in stored.values())
    for name, tensor in stored.items():
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
        assert torch.equal(checkpoint.get(name), tensor)
    checkpoint.check_finite()


def test_shards_are_the_same_model(broken: Path, tiny: Path) -> None:
    shard_in_two(broken)
    one, two = open_checkpoint(tiny), open_checkpoint(broken)
    assert one.tensors.keys() == two.tensors.keys()
    assert len(two.shards) == 2
    assert torch.equal(one.get(Q), two.get(Q))


def test_digest_is_of_the_content(tiny: Path, broken: Path) -> None:
    assert open_checkpoint(tiny).digest == open_checkpoint(broken).digest
    tensors = load_file(broken / SINGLE)
    tensors[Q][0, 0] += 1
    save_file(tensors, broken / SINGLE)
    assert open_checkpoint(tiny).digest != open_checkpoint(broken).digest


def test_demo_is_a_checkpoint() -> None:
    assert open_checkpoint("demo").config["model_type"] == "llama"


def test_missing_path(tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", "nowhere: no such directory")


def test_a_file_instead_of_a_directory(tiny: Path) -> None:
    refuse(tiny / "config.json", "this is a file. A model is a directory")


def test_no_config(broken: Path) -> None:
    (broken / "config.json").unlink()
    refuse(broken, r"there is no config\.json")


@pytest.mark.parametrize("text", ["{", "", "[" * 100_000, '{"a": ' + "1" * 5000 + "}"])
def test_config_that_is_not_json(broken: Path, text: str) -> None:
    (broken / "config.json").write_text(text)
    refuse(broken, r"config\.json: not readable as JSON")


def test_config_in_another_encoding(broken: Path) -> None:
    (broken / "config.json").write_bytes('{"name": "café"}'.encode("latin-1"))
    refuse(broken, r"config\.json: not readable as JSON")


def test_config_that_is_no_object(broken: Path) -> None:
    (broken / "config.json").write_text("[1]")
    refuse(broken, r"config\.json: expected a JSON object, got list")


def test_empty_shard(broken: Path) -> None:
    (broken / SINGLE).write_bytes(b"")
    refuse(broken, r"model\.safetensors: the file is empty \(0 bytes\)")


@pytest.mark.parametrize("keep", [1, 7, 8, 100, 0.5, -1])
def test_truncated_shard(broken: Path, keep: float) -> None:
    data = (broken / SINGLE).read_bytes()
    keep = int(len(data) * keep) if isinstance(keep, float) else keep
    (broken / SINGLE).write_bytes(data[:keep])
    refuse(broken, r"model\.safetensors: not a whole safetensors file \(\d+ bytes\).*fetch it again")


def test_header_length_that_lies(broken: Path) -> None:
    data = (broken / SINGLE).read_bytes()
    (broken / SINGLE).write_bytes((2**63).to_bytes(8, "little") + data[8:])
    refuse(broken, "not a whole safetensors file")


def test_shard_cut_short_after_opening(broken: Path) -> None:
    checkpoint = open_checkpoint(broken)
    data = (broken / SINGLE).read_bytes()
    (broken / SINGLE).write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=f"cannot read tensor '{Q}'"):
        checkpoint.get(Q)


def test_shard_missing(broken: Path) -> None:
    _, second = shard_in_two(broken)
    second.unlink()
    refuse(broken, "shard model-00002-of-00002.safetensors is named in the index but missing")


def test_tensor_of_the_index_in_no_shard(broken: Path) -> None:
    shard_in_two(broken)
    index = json.loads((broken / INDEX).read_text())
    index["weight_map"]["model.extra.weight"] = "model-00001-of-00002.safetensors"
    (broken / INDEX).write_text(json.dumps(index))
    refuse(broken, r"lists 1 tensors that no shard holds, the first is 'model\.extra\.weight'")


def test_tensor_in_two_shards(broken: Path) -> None:
    first, second = shard_in_two(broken)
    tensors = load_file(second)
    name = sorted(tensors)[0]
    save_file(load_file(first) | {name: tensors[name]}, first)
    refuse(broken, f"tensor '{name}' is in both {first.name} and {second.name}")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "../..", "."])
def test_shard_names_that_leave_the_directory(broken: Path, name: str) -> None:
    shard_in_two(broken)
    index = json.loads((broken / INDEX).read_text())
    index["weight_map"][Q] = name
    (broken / INDEX).write_text(json.dumps(index))
    shutil.copyfile(broken / "model-00001-of-00002.safetensors", broken.parent / "secret.safetensors")
    refuse(broken, rf"shard name {name!r} leaves the directory")


@pytest.mark.parametrize("name", ["..", "", "no\0name", "tokenizer.json"])
def test_shard_names_that_are_no_shard(broken: Path, name: str) -> None:
    shard_in_two(broken)
    index = json.loads((broken / INDEX).read_text())
    index["weight_map"][Q] = name
    (broken / INDEX).write_text(json.dumps(index))
    refuse(broken, "leaves the directory|not a whole safetensors file|named in the index but missing")


@pytest.mark.parametrize("text", ["not json", "{", ""])
def test_index_that_is_not_json(broken: Path, text: str) -> None:
    shard_in_two(broken)
    (broken / INDEX).write_text(text)
    refuse(broken, r"model\.safetensors\.index\.json: not readable as JSON")


@pytest.mark.parametrize("value", [[], {}, {"weight_map": {}}, {"weight_map": {"a": 1}}, {"weight_map": ["a"]}, 3])
def test_index_without_a_weight_map(broken: Path, value: object) -> None:
    shard_in_two(broken)
    (broken / INDEX).write_text(json.dumps(value))
    refuse(broken, "expected an object 'weight_map'")


def test_only_pickles(broken: Path) -> None:
    (broken / SINGLE).rename(broken / "pytorch_model.bin")
    refuse(broken, r"only pickle files \(pytorch_model\.bin\)")
    (broken / "pytorch_model.bin").rename(broken / "model.pt")
    refuse(broken, r"only pickle files \(.*model\.pt\)")


def test_no_weights_at_all(broken: Path) -> None:
    (broken / SINGLE).unlink()
    refuse(broken, "there are no weights here")


def test_file_without_tensors(broken: Path) -> None:
    save_file({}, broken / SINGLE)
    refuse(broken, "hold no tensors")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite(broken: Path, value: float) -> None:
    tensors = load_file(broken / SINGLE)
    tensors[Q][3, 5] = value
    tensors[Q][4, 5] = -value
    save_file(tensors, broken / SINGLE)
    checkpoint = open_checkpoint(broken)
    with pytest.raises(InputError, match=rf"tensor '{Q}' has 2 NaN or infinite values among 4096"):
        checkpoint.check_finite()


def test_large_finite_weights_are_not_called_infinite(broken: Path) -> None:
    tensors = load_file(broken / SINGLE)
    tensors[Q][:] = 1e37  # the sum overflows, no entry does
    save_file(tensors, broken / SINGLE)
    open_checkpoint(broken).check_finite()


def test_unknown_hub_id_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(InputError, match=r"some-org/some-model: .*could not be fetched.*no route to host"):
        open_checkpoint("some-org/some-model")


def test_numbers_of_another_type_are_named(broken: Path, edit_json: Callable[..., None]) -> None:
    edit_json(broken / "config.json", vocab_size="many")
    open_checkpoint(broken)  # opening judges files; the skeleton judges the config (test_load.py)
