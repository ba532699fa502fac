"""Energy, where the machine counts it: joules of the whole package or board, idle share included.

RAPL    Intel's and AMD's processors count microjoules per package and memory controller; Linux shows the counters
        under /sys/class/powercap. They wrap at max_energy_range_uj, and since 2020 only root may read them (Lipp et
        al., "PLATYPUS", 2021: power tells secrets).
NVML    NVIDIA's GPUs from Volta on count millijoules since the driver was loaded.

A counter belongs to the machine and not to a process: what else runs is counted too. Where there is none, or it may not
be read, the reason is said; no figure is made up from a processor's rated power.
"""

import ctypes
import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
NO_ENERGY: dict[str, Any] = {"joules_per_token": None, "watts": None, "counters": {}}


@dataclass(frozen=True)
class Counter:
    """Joules since some moment; starts again at 0 after `wraps` joules (0: never)."""

    name: str
    read: Callable[[], float]
    wraps: float = 0.0


@dataclass(frozen=True)
class Meter:
    """What can be counted here; `why_not` says what is missing where nothing can."""

    counters: tuple[Counter, ...]
    why_not: str | None

    def read(self) -> tuple[float, ...]:
        return tuple(c.read() for c in self.counters)

    def joules(self, before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
        """{counter: joules} between two reads; at most one wrap lies between them."""
        pairs = zip(self.counters, before, after, strict=True)
        return {c.name: b - a if b >= a else b - a + c.wraps for c, a, b in pairs}


def find_meter(powercap: Path = POWERCAP) -> Meter:
    """Every counter of this machine that this user may read."""
    found = (_rapl(powercap), _nvml())
    counters = tuple(c for own, _ in found for c in own)
    return Meter(counters, None if counters else "; ".join(why for _, why in found if why))


def _rapl(powercap: Path) -> tuple[list[Counter], str | None]:
    """Packages and memory: what lies inside a package (core, uncore) is counted with it, psys counts all again."""
    zones = [z for z in sorted(powercap.glob("*-rapl:*")) if (z / "energy_uj").exists()]
    counters: list[Counter] = []
    refused = False
    for zone in zones:
        try:
            name = (zone / "name").read_text().strip()
            if not name.startswith(("package", "dram")):
                continue
            wraps = float((zone / "max_energy_range_uj").read_text()) / 1e6
            counter = Counter(_unique(name, zone, counters), _reader(zone / "energy_uj"), wraps)
            counter.read()
        except PermissionError:
            refused = True
        except (OSError, ValueError):
            continue  # a zone that the kernel lists and the processor does not have
        else:
            counters.append(counter)
    if counters:
        return counters, None
    if refused:
        return [], f"RAPL's counters under {powercap} may be read by root only (sudo chmod a+r */energy_uj)"
    return [], f"no RAPL counters under {powercap} (a virtual machine, or a processor without them)"


def _unique(name: str, zone: Path, counters: Sequence[Counter]) -> str:
    """Every package has its 'dram': the second one gets its zone's number."""
    return f"{name} ({zone.name})" if any(c.name == name for c in counters) else name


def _reader(file: Path) -> Callable[[], float]:
    return lambda: float(file.read_text()) / 1e6


def _nvml() -> tuple[list[Counter], str | None]:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return [], "no NVIDIA driver (libnvidia-ml.so.1)"
    count = ctypes.c_uint()
    if library.nvmlInit_v2() or library.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return [], "NVIDIA's driver does not answer (NVML)"
    counters = []
    for index in range(count.value):
        device = ctypes.c_void_p()
        if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)):
            continue
        counter = Counter(f"gpu {index}", _gpu_reader(library, device))
        try:
            counter.read()
        except OSError:
            continue
        counters.append(counter)
    return counters, None if counters else "the GPU counts no energy (NVML: from Volta on)"


def _gpu_reader(library: Any, device: ctypes.c_void_p) -> Callable[[], float]:
    def read() -> float:
        millijoules = ctypes.c_ulonglong()
        if library.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(millijoules)):
            raise OSError(errno.EIO, "NVML gives no energy")
        return millijoules.value / 1e3

    return read
