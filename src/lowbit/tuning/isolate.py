"""A job in a process of its own, within limits of time and memory: whatever happens to it, the caller goes on.

The job is a request to tuning/worker.py. Memory is watched from outside (resident set of the process and its
children), because a limit on address space would count what torch maps and never touches.
"""

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from lowbit.errors import LowbitError

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class JobLimits:
    """Seconds and bytes that one job may take."""

    seconds: float = 4 * 3600.0
    memory: int | None = None  # None: nine tenths of the machine's

    @property
    def memory_bytes(self) -> int:
        return self.memory if self.memory is not None else int(0.9 * psutil.virtual_memory().total)


class JobError(LowbitError):
    """The job's own error, or what stopped it, as one sentence."""


def run_job(request: dict[str, Any], limits: JobLimits) -> Any:
    """The job's result. Raises JobError with the reason if it fails, dies, or exceeds a limit."""
    with tempfile.TemporaryDirectory() as folder:
        reply = Path(folder) / "reply.json"
        process = subprocess.Popen(
            [sys.executable, "-m", "lowbit.tuning.worker", str(reply)], stdin=subprocess.PIPE, text=True
        )
        assert process.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it died at once: the wait below says how
                process.stdin.write(json.dumps(request))
                process.stdin.close()
            _watch(process, limits)
        finally:
            if process.poll() is None:
                _kill(process)
        if not reply.exists():
            raise JobError(_ending(process.returncode))
        answer = json.loads(reply.read_text(encoding="utf-8"))
    if "error" in answer:
        raise JobError(answer["error"])
    return answer["result"]


def _watch(process: subprocess.Popen[str], limits: JobLimits) -> None:
    end = time.monotonic() + limits.seconds
    most = limits.memory_bytes
    while process.poll() is None:
        if time.monotonic() > end:
            raise JobError(f"took longer than the time limit of {limits.seconds:g} s: stopped")
        used = _resident(process.pid)
        if used > most:
            raise JobError(f"used {used / 1e6:.0f} MB, over the memory limit of {most / 1e6:.0f} MB: stopped")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_POLL_SECONDS)


def _resident(pid: int) -> int:
    total = 0
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += member.memory_info().rss
    return total


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()


def _ending(status: int) -> str:
    if status >= 0:
        return f"its process ended with status {status} and no result"
    name = signal.Signals(-status).name
    hint = ", most likely for want of memory" if name == "SIGKILL" else ""
    return f"its process was killed by {name}{hint}"
