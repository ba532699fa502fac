"""Another project's server: started on a free local port, asked for its health, and ended for certain.

Between lowbit and the server stands guard.py, so that the server ends with lowbit even if lowbit is killed.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from lowbit.client import get_text
from lowbit.errors import InputError, LowbitError

START_SECONDS = 1800.0  # vLLM compiles a model when it sees it for the first time
_POLL_SECONDS = 0.1
_LOG_BYTES = 2000


@dataclass(frozen=True)
class Serving:
    """What a server is started for: tokens a sequence, sequences at once, and its program if it is not on PATH."""

    context: int | None = None
    sequences: int = 1
    program: str | None = None


class Server:
    """`command(port)` running and healthy. `address` is its URL; `stop` ends it with everything that it started.

    Raises InputError if the command is not there, ends, or does not get healthy within `timeout` seconds; what it
    said last is part of the message.
    """

    def __init__(
        self,
        name: str,
        command: Callable[[int], list[str]],
        health: str = "/health",
        timeout: float = START_SECONDS,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        port = _free_port()
        self.name, self.address = name, f"http://127.0.0.1:{port}"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by stop)
        self._guard = subprocess.Popen(
            [sys.executable, "-m", "lowbit.runtime.guard", *command(port)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # Ctrl-C is for lowbit, which then closes the pipe
        )
        try:
            self._wait(self.address + health, timeout)
        except BaseException:
            self.stop()
            raise

    def _wait(self, url: str, timeout: float) -> None:
        end = time.monotonic() + timeout
        while self._guard.poll() is None:
            try:
                if get_text(url, 5.0)[0] == 200:
                    return
            except InputError:
                pass  # not listening yet
            if time.monotonic() > end:
                raise InputError(f"{self.name} was not ready after {timeout:g} s. It last said:\n{self.log()}")
            time.sleep(_POLL_SECONDS)
        raise InputError(f"{self.name} ended with status {self._guard.returncode}. It last said:\n{self.log()}")

    def log(self) -> str:
        """The last of what the server printed."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), _LOG_BYTES, max(0, size - _LOG_BYTES)).decode("utf-8", "replace").strip()

    def processes(self) -> list[psutil.Process]:
        try:
            return list(psutil.Process(self._guard.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return []

    def peak_memory(self) -> int:
        """Peak resident set of the server's processes so far, in bytes."""
        return sum(_peak(process) for process in self.processes())

    def stop(self) -> None:
        """End the server. Harmless when it has ended."""
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        try:
            self._guard.wait(timeout=20)
        except subprocess.TimeoutExpired as error:
            for process in [*self.processes(), psutil.Process(self._guard.pid)]:
                process.kill()
            raise LowbitError(f"{self.name} did not end when asked and was killed.") from error
        finally:
            self._log.close()


def find_program(name: str, given: str | None, how: str) -> str:
    """The path of a server's program: the one given, or `name` on PATH. Raises InputError that says how to get it."""
    found = shutil.which(given or name)
    if found is None:
        raise InputError(f"no program {given or name!r}: {how}, or say where it is with --program PATH.")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _peak(process: psutil.Process) -> int:
    try:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        return int(process.memory_info().rss) if process.is_running() else 0
