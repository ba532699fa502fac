"""A process that ends another project's server when lowbit ends, however lowbit ends.

`python -m lowbit.runtime.guard COMMAND...` runs the command in a process group of its own and keeps its standard input
open. That input is a pipe from lowbit: when it closes (lowbit is done, was interrupted, or was killed), or when the
guard is told to end, the whole group gets SIGTERM and, a few seconds later, SIGKILL.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
from types import FrameType

PATIENCE_SECONDS = 5.0
_POLL_SECONDS = 0.1


def main() -> int:
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGHUP, _leave)
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        while child.poll() is None and not _input_closed():
            pass
    finally:
        _end(child)
    return child.returncode


def _leave(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(1)


def _input_closed() -> bool:
    """Whether the pipe was closed; waits a moment for it. Nobody ever writes to it."""
    return bool(select.select([0], [], [], _POLL_SECONDS)[0])


def _end(child: subprocess.Popen[bytes]) -> None:
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):  # the group is empty: done
            os.killpg(child.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(PATIENCE_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
