"""Energy: counters of a made-up /sys/class/powercap, and what is said where there are none."""

import os
from pathlib import Path
from typing import Any

import pytest

import lowbit.speed as bench_module
from lowbit.cli.measure import speed_table
from lowbit.speed import Scenario, bench, energy
from lowbit.speed.energy import find_meter

MICRO = 1_000_000


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "_nvml", lambda: ([], "no NVIDIA driver"))


def zone(folder: Path, number: str, name: str, joules: float, wraps: float = 262143.0) -> Path:
    path = folder / f"intel-rapl:{number}"
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{int(joules * MICRO)}\n")
    (path / "max_energy_range_uj").write_text(f"{int(wraps * MICRO)}\n")
    return path


def test_packages_and_memory_count_and_what_lies_inside_does_not_count_twice(tmp_path: Path) -> None:
    zones = {
        "0": zone(tmp_path, "0", "package-0", 100), "1": zone(tmp_path, "1", "package-1", 50),
        "0:0": zone(tmp_path, "0:0", "core", 60), "0:1": zone(tmp_path, "0:1", "dram", 10),
        "1:1": zone(tmp_path, "1:1", "dram", 20), "2": zone(tmp_path, "2", "psys", 200),
    }  # fmt: skip
    (tmp_path / "intel-rapl").mkdir()  # the control type itself, which counts nothing
    meter = find_meter(tmp_path)
    assert meter.why_not is None
    before = meter.read()
    for path, more in ((zones["0"], 7), (zones["1"], 5), (zones["0:0"], 3), (zones["0:1"], 2), (zones["1:1"], 1)):
        file = path / "energy_uj"
        file.write_text(str(int(file.read_text()) + more * MICRO))
    joules = meter.joules(before, meter.read())
    assert {k.split()[0] for k in joules} == {"package-0", "package-1", "dram"}
    assert len(joules) == 4
    assert sum(joules.values()) == pytest.approx(7 + 5 + 2 + 1)


def test_a_counter_that_wraps_goes_on(tmp_path: Path) -> None:
    path = zone(tmp_path, "0", "package-0", joules=99.5, wraps=100)
    meter = find_meter(tmp_path)
    before = meter.read()
    (path / "energy_uj").write_text(str(2 * MICRO))
    assert meter.joules(before, meter.read()) == {"package-0": pytest.approx(2.5)}


def test_the_reason_is_said_where_nothing_can_be_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no RAPL counters under" in str(find_meter(tmp_path).why_not)
    assert "no NVIDIA driver" in str(find_meter(tmp_path / "none").why_not)
    path = zone(tmp_path, "0", "package-0", 1)
    read_text = Path.read_text

    def refuse(self: Path, *words: Any, **options: Any) -> str:  # root may read what no one may
        if self == path / "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read_text(self, *words, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert "may be read by root only" in str(find_meter(tmp_path).why_not)


def test_a_row_says_joules_per_token_and_watts() -> None:
    runs = [{"energy_j": {"package-0": 8.0, "dram": 2.0}, "seconds": 0.5}] * 3
    row = bench_module._energy(Scenario(16, 25, 4), runs, None)
    assert row["joules_per_token"] == pytest.approx(0.1)
    assert row["watts"] == pytest.approx(20)
    assert row["counters"] == {"package-0": pytest.approx(0.08), "dram": pytest.approx(0.02)}


def test_bench_says_energy_or_why_not(tiny: Path) -> None:
    document = bench([tiny], prompt_lengths=[4], output_lengths=[3], repeats=1)
    (row,) = document["results"]
    if row["energy"]["unavailable"] is None:
        assert row["energy"]["joules_per_token"] > 0
        assert "energy/token" in speed_table(document)
    else:
        assert not os.access("/sys/class/powercap/intel-rapl:0/energy_uj", os.R_OK)
        assert f"energy: unavailable: {row['energy']['unavailable']}" in speed_table(document)
    row["energy"] = {"joules_per_token": 0.0123, "watts": 3.0, "counters": {}, "unavailable": None}
    assert "0.0123 J" in speed_table(document)
