import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowbit.artifact import Work, check_output, disk_errors, file_hashes, read_manifest, write_json
from lowbit.errors import InputError

JOB = {"model": "abc", "recipe": {"scheme": "w4a16"}}


def test_output_appears_whole_at_the_end(tmp_path: Path) -> None:
    work = Work(tmp_path / "out", JOB, resume=False, force=False)
    work.write_shard("m.safetensors", {"a": torch.arange(3)})
    work.write_report("m.safetensors", [{"name": "a"}])
    assert not (tmp_path / "out").exists()
    work.close()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["m.safetensors"]
    assert load_file(tmp_path / "out" / "m.safetensors")["a"].tolist() == [0, 1, 2]


def test_a_shard_is_finished_when_its_report_is_there(tmp_path: Path) -> None:
    work = Work(tmp_path / "out", JOB, resume=False, force=False)
    work.write_shard("m.safetensors", {"a": torch.ones(2)})
    assert work.report("m.safetensors") is None
    work.write_report("m.safetensors", {"loss": 0.1})
    again = Work(tmp_path / "out", JOB, resume=True, force=False)
    assert again.report("m.safetensors") == {"loss": 0.1}


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    work = Work(tmp_path / "out", JOB, resume=False, force=False)
    x = torch.arange(6).reshape(2, 3)
    work.write_shard("m.safetensors", {"transposed": x.T})
    assert torch.equal(load_file(work.path / "m.safetensors")["transposed"], x.T)


def test_resume_compares_the_jobs(tmp_path: Path) -> None:
    Work(tmp_path / "out", JOB, resume=False, force=False)
    Work(tmp_path / "out", JOB, resume=True, force=False)
    with pytest.raises(InputError, match=r'belongs to another job, .*\(model: was "abc", is "xyz"\)'):
        Work(tmp_path / "out", JOB | {"model": "xyz"}, resume=True, force=False)


def test_resume_without_anything_to_resume_starts(tmp_path: Path) -> None:
    assert Work(tmp_path / "deep" / "out", JOB, resume=True, force=False).path.is_dir()


def test_force_throws_the_partial_work_away(tmp_path: Path) -> None:
    Work(tmp_path / "out", JOB, resume=False, force=False).write_report("m.safetensors", {})
    assert Work(tmp_path / "out", JOB, resume=False, force=True).report("m.safetensors") is None


def test_what_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file: is a file"):
        check_output(tmp_path / "file", resume=False, force=True)
    for resume in (False, True):
        with pytest.raises(InputError, match="exists and is not empty"):
            check_output(tmp_path, resume=resume, force=False)
    check_output(tmp_path, resume=False, force=True)
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(InputError, match="--resume, or throw it away with --force"):
        check_output(tmp_path / "out", resume=False, force=False)
    check_output(tmp_path / "out", resume=True, force=False)


def test_write_bytes_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "f.json"
    write_json(file, {"version": 1})

    def fsync(_: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="input/output"):
        write_json(file, {"version": 2})
    assert json.loads(file.read_text()) == {"version": 1}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_in_one_sentence(tmp_path: Path, code: int) -> None:
    with pytest.raises(InputError, match=r"the disk is full .*kept: free some space"), disk_errors(tmp_path):
        raise OSError(code, "?")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENAMETOOLONG])
def test_a_place_that_cannot_be_written(tmp_path: Path, code: int) -> None:
    with pytest.raises(InputError, match="cannot be written"), disk_errors(tmp_path):
        raise OSError(code, "?")


def test_names_no_file_system_takes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        Work(tmp_path / ("x" * 300), JOB, resume=False, force=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        Work(tmp_path / "file" / "out", JOB, resume=False, force=False)


def test_other_errors_are_ours(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="bad") as info, disk_errors(tmp_path):
        raise OSError(errno.EBADF, "bad")
    assert not isinstance(info.value, InputError)


def test_hashes_are_of_the_models_files_alone(tmp_path: Path) -> None:
    for name in ("config.json", "m.safetensors", "tokenizer.json", "merges.txt", "chat.jinja"):
        (tmp_path / name).write_text(name)
    unhashed = ("lowbit.json", "evaluate.json", "bench.json", "README.md", "report.html")
    before = file_hashes(tmp_path)
    for name in unhashed:
        (tmp_path / name).write_text(name)
    assert file_hashes(tmp_path) == before
    assert set(before) == {"config.json", "m.safetensors", "tokenizer.json", "merges.txt", "chat.jinja"}
    (tmp_path / "config.json").write_text("changed")
    assert file_hashes(tmp_path)["config.json"] != before["config.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no lowbit.json"),
        (b"{", "not readable as JSON"),
        (b"\xff\xfe", "not readable as JSON"),
        (b"[]", "not a manifest"),
        (b'{"files": 3}', "not a manifest"),
        (b"[" * 100_000, "not readable as JSON"),
    ],
)
def test_manifests_at_fault(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "lowbit.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_manifest(tmp_path)
