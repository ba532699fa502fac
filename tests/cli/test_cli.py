"""The program as a person types it: output, exit codes, JSON."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lowbit.cli.options import numbers, percent, size
from lowbit.errors import InputError


def lowbit(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lowbit", *map(str, words)], capture_output=True, text=True, check=False, cwd=cwd
    )


@pytest.mark.model
def test_quantize_evaluate_verify_inspect(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--scheme", "w4a16-g32", "--calibration", text_file, "--samples", 8, "--seq-len", 64)
    run = lowbit("quantize", tiny, "-o", out, *words, "--json", tmp_path / "q.json")
    assert run.returncode == 0, run.stderr
    document = json.loads((tmp_path / "q.json").read_text())
    assert document["command"] == "quantize"
    assert document["lowbit_version"]
    assert document["environment"]["torch"]
    assert document["seed"] == 0
    assert {"output", "scheme", "method", "seconds", "peak_memory_bytes", "bits_per_weight", "layers"} <= set(document)
    assert {"name", "bits", "loss_rtn", "loss", "seconds", "fallback"} <= set(document["layers"][0])
    assert all(layer["loss"] <= layer["loss_rtn"] for layer in document["layers"])

    run = lowbit("evaluate", out, "--text", text_file, "--seq-len", 64, "--max-kl", 1e-9, "--json", "-", "-q")
    assert run.returncode == 3
    assert "kl is" in run.stderr
    assert "above the limit 1e-09" in run.stderr
    assert json.loads(run.stdout)["results"][0]["gates"][0]["met"] is False

    assert lowbit("verify", out).returncode == 0
    assert "fallback" in lowbit("inspect", out).stdout
    again = lowbit("quantize", tiny, "-o", out, *words)
    assert again.returncode == 2
    assert "--force" in again.stderr
    recipe = lowbit("quantize", tiny, "-o", tmp_path / "again", "--recipe", out / "lowbit.json")
    assert recipe.returncode == 0, recipe.stderr
    for shard in out.glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "again" / shard.name).read_bytes()

    shard = next(out.glob("model-00001*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    broken = lowbit("verify", out)
    assert broken.returncode == 3
    assert "FAIL files are unchanged: changed: model-00001" in broken.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("quantize", "/no/such/model", "-o", "out"), "no such directory"),
        (("quantize", "demo", "-o", "out", "--scheme", "w4a61"), "Did you mean w4a16"),
        (("quantize", "demo", "-o", "out", "--method", "gtpq"), "Did you mean gptq"),
        (("quantize", "demo", "-o", "out", "--scheme", "w4a16-g96"), "does not divide"),
        (("quantize", "demo", "-o", "out", "--set", "dampening=1"), "Did you mean dampening_frac"),
        (("quantize", "demo", "-o", "out", "--set", "sweeps"), "expected KEY=VALUE"),
        (("quantize", "demo", "-o", "out", "--ignore", "nothing"), "matches no linear"),
        (("quantize", "demo", "-o", "out", "--resume", "--force"), "give one of them"),
        (("quantize", "demo", "-o", "out", "--seq-len", "4096"), "longer than the model's context of 2048"),
        (("evaluate", "demo", "--max-ppl-increase", "much"), "expected a share such as 1%"),
        (("evaluate", "demo", "--runtime", "cuda"), "unknown runtime"),
        (("bench", "demo", "--prompt-lengths", "a,b"), "whole numbers"),
        (("tune", "demo", "-o", "out", "--max-memory", "many"), "expected a size"),
        (("tune", "demo", "-o", "out", "--max-task-drop", "1%"), "say which tasks with --tasks"),
        (("tune", "demo", "-o", "out", "--optimize", "speed"), "--optimize speed: Known: tpot, ttft, throughput"),
        (("tune", "demo", "-o", "out", "--hardware", "abacus"), "Add yours with --catalog"),
        (("verify", "/no/such/model"), "no such directory"),
        (("export", "demo", "--format", "ggfu", "-o", "a.gguf"), "Did you mean gguf"),
        (("export", "demo", "--format", "gguf", "--type", "q4km", "-o", "a.gguf"), "Did you mean q4_k_m"),
        (("export", "demo", "--format", "awq", "-o", "out"), "First: lowbit quantize"),
        (("export", "demo", "--format", "gguf", "-o", "no/such/a.gguf"), "does not exist"),
        (("evaluate", "no.gguf"), "no such file"),
        (("quantize", "demo"), "Missing option"),
        (("nonsense",), "No such command"),
    ],
)
def test_bad_input_is_one_paragraph_and_exit_code_2(words: tuple[str, ...], says: str, tmp_path: Path) -> None:
    run = lowbit(*words, cwd=tmp_path)
    assert run.returncode == 2, run.stderr
    assert says in " ".join(run.stderr.split())
    assert "Traceback" not in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_doctor_and_version() -> None:
    run = lowbit("doctor", "--json", "-")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["peak_bandwidth_bytes_per_s"] > 1e8
    assert lowbit("--version").stdout.strip() == "0.1.0"


def test_values_as_people_write_them() -> None:
    assert percent("1%", "x") == percent("0.01", "x") == 0.01
    assert numbers("1,2", "x") == [1, 2]
    assert size("4GB", "x") == 4_000_000_000
    assert size("2GiB", "x") == 2**31
    assert size("100", "x") == 100
    for text in ("", "GB", "4TB", "-1GB"):
        with pytest.raises(InputError):
            size(text, "x")
