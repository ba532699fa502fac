"""The ladder: taken only where the target is missed, never worse, on record, and the same after a resume."""

import json
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit.artifact import Work
from lowbit.errors import InputError
from lowbit.inspect import inspect, verify
from lowbit.recipe import Recipe

WORDS = {"scheme": "w3a16-g32", "samples": 12, "seq_len": 32}


def test_lossy_linears_are_repaired_and_the_files_say_so(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    words = WORDS | {"calibration": str(text_file)}
    plain = lowbit.quantize(tiny, tmp_path / "plain", **words)["layers"]
    target = sorted(r["relative_error"] for r in plain)[len(plain) // 2]
    document = lowbit.quantize(tiny, tmp_path / "out", repair=target, **words)
    repaired = {r["name"]: r for r in document["layers"] if r.get("repair")}
    first = plain[0]
    again = next(r for r in document["layers"] if r["name"] == first["name"])
    assert again["relative_error"] <= first["relative_error"]  # the same input: the first linears of the first block
    assert repaired
    for report in document["layers"]:
        assert report["relative_error"] <= target, report  # six bits meet what three met half of the time
    assert {r["repair"] for r in repaired.values()} <= {"dampening_frac 0.1", "zero points", "6 bits"}
    assert any(r["scheme"] == "w6a16-g32" for r in repaired.values())
    assert verify(tmp_path / "out")["ok"]
    shown = inspect(tmp_path / "out")
    assert set(shown["schemes"]) == {r["scheme"] for r in document["layers"]}
    errors = [r["relative_error"] for r in shown["layers"]]
    assert errors == sorted(errors, reverse=True)


def test_the_relative_error_is_of_the_outputs(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    """loss / relative² is the mean squared output of the original linear: the same for every scheme of the first."""
    signal = []
    for scheme in ("w3a16-g32", "w8a16-channel"):
        words = WORDS | {"scheme": scheme, "calibration": str(text_file)}
        report = lowbit.quantize(tiny, tmp_path / scheme, **words)["layers"][0]
        signal.append(report["loss"] / report["relative_error"] ** 2)
    assert signal[0] == pytest.approx(signal[1], rel=1e-3)


def test_a_repaired_run_resumes_to_the_same_bytes(
    tiny: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = WORDS | {"calibration": str(text_file), "repair": 0.1}
    lowbit.quantize(tiny, tmp_path / "whole", **words)
    original = Work.write_report

    def interrupted(self: Work, name: str, report: object) -> None:
        original(self, name, report)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Work, "write_report", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lowbit.quantize(tiny, tmp_path / "out", **words)
    with pytest.raises(InputError, match=r"repair: was 0\.1, is 0\.2"):
        lowbit.quantize(tiny, tmp_path / "out", resume=True, **(words | {"repair": 0.2}))
    lowbit.quantize(tiny, tmp_path / "out", resume=True, **words)
    for file in [*(tmp_path / "whole").glob("*.safetensors"), tmp_path / "whole" / "config.json"]:
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    assert json.loads((tmp_path / "out" / "lowbit.json").read_text())["recipe"]["repair"] == 0.1
    assert torch.get_num_threads() == 1


def test_a_target_that_is_no_share_is_refused() -> None:
    with pytest.raises(InputError, match="repair is a relative error"):
        Recipe(repair=1.5)
