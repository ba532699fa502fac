"""Worker processes: the same bytes whatever their number, and clear ends."""

import faulthandler
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import lowbit
from lowbit import cli, tensor, workers
from lowbit.errors import InputError
from lowbit.workers import WorkerError, side_by_side, using

WORDS: dict[str, Any] = {"scheme": "w4a16-g32", "samples": 16, "seq_len": 32}


GPTQ = importlib.import_module("lowbit.algorithms.gptq")  # the package has a function of that name


def cut_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices are cut into several pieces, and given to workers."""
    monkeypatch.setattr(tensor, "ROWS", 16)
    monkeypatch.setattr(GPTQ, "WORTH_FORKING", 0)


@pytest.fixture
def quantize(tiny: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """quantize(OUT, ...): the tiny model, its matrices cut into several pieces."""
    cut_small(monkeypatch)
    return lambda output, **words: lowbit.quantize(tiny, output, **(WORDS | {"calibration": str(text_file)} | words))


def files(path: Path) -> dict[str, bytes]:
    names = sorted(f.name for f in path.iterdir() if f.suffix in (".safetensors", ".json") and f.name != "lowbit.json")
    return {name: (path / name).read_bytes() for name in names}


# --- the pieces themselves


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_results_come_in_order_and_from_other_processes(workers: int) -> None:
    with using(workers):
        results = side_by_side([lambda i=i: (i, torch.full((2,), i), os.getpid()) for i in range(5)])
    assert [i for i, _, _ in results] == list(range(5))
    assert all(torch.equal(x, torch.full((2,), i)) for i, x, _ in results)
    pids = {pid for _, _, pid in results}
    assert len(pids) == min(workers, 5)
    assert (os.getpid() in pids) == (workers == 1)
    assert not psutil.Process().children()


def test_more_than_a_pipe_holds_comes_through() -> None:
    with using(2):
        results = side_by_side([partial(torch.full, (1_000_000,), float(i)) for i in range(4)])
    assert [float(x.mean()) for x in results] == [0, 1, 2, 3]


def fail() -> None:
    raise ValueError("the Hessian is hopeless")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_pieces_error_is_raised_as_it_is(workers: int) -> None:
    with using(workers), pytest.raises(ValueError, match="the Hessian is hopeless"):
        side_by_side([lambda: None, fail, lambda: None])
    assert not psutil.Process().children()


def crash() -> None:
    faulthandler.disable()  # pytest's, which would print all that it knows
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.parametrize(
    ("end", "says"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "worker process 2 of 2 was killed by SIGKILL, most likely for"),
        (crash, "worker process 2 of 2 was killed by SIGSEGV"),
        (lambda: os._exit(0), "worker process 2 of 2 ended with status 0"),
    ],
    ids=["killed", "crashed", "left"],
)
def test_a_worker_that_dies_is_an_error_and_stops_the_others(end: Callable[[], None], says: str) -> None:
    start = time.monotonic()
    with using(2), pytest.raises(WorkerError, match=says):
        side_by_side([lambda: time.sleep(600), end])
    assert time.monotonic() - start < 300
    assert not psutil.Process().children()


def test_numbers_of_workers_that_are_refused(quantize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="workers must be at least 1, got 0"):
        quantize(tmp_path / "out", workers=0)
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(InputError, match="worker processes need Linux"):
        quantize(tmp_path / "out", workers=2)
    assert not list(tmp_path.iterdir())


def test_small_pieces_stay_at_home() -> None:
    with using(2):
        assert side_by_side([os.getpid, os.getpid], worth_it=False) == [os.getpid()] * 2


# --- a whole quantization


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"scheme": "w3a16-g32", "method": "quip"},
        {"scheme": "w4a16-g32", "method": "awq", "samples": 8},
    ],
    ids=["rows of a matrix", "linears of an input", "clipped ranges"],
)
def test_the_bytes_do_not_depend_on_the_number_of_workers(quantize: Any, tmp_path: Path, words: Any) -> None:
    reports = []
    for count in (1, 2, 3):
        document = quantize(tmp_path / f"{count}", workers=count, **words)
        reports.append([{k: v for k, v in r.items() if k != "seconds"} for r in document["layers"]])
    assert files(tmp_path / "1") == files(tmp_path / "2") == files(tmp_path / "3")
    assert reports[0] == reports[1] == reports[2]


def in_a_worker(monkeypatch: pytest.MonkeyPatch, at: int, do: Callable[[], Any]) -> None:
    """In worker processes, from the at-th refinement of the whole run on (shared memory counts), `do` instead."""
    parent, original, count = os.getpid(), GPTQ.refine, torch.zeros(1, dtype=torch.int64).share_memory_()

    def refine(*args: Any) -> Any:
        count.add_(1)
        if os.getpid() != parent and int(count) >= at:
            do()
        return original(*args)

    monkeypatch.setattr(GPTQ, "refine", refine)


def test_a_killed_worker_leaves_no_output_and_the_run_is_resumed(
    quantize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(tmp_path / "whole")
    with monkeypatch.context() as patch:
        in_a_worker(patch, 35, lambda: os.kill(os.getpid(), signal.SIGKILL))  # in the second block: 32 are the first's
        with pytest.raises(WorkerError, match="killed by SIGKILL"):
            quantize(tmp_path / "out", workers=2)
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / "out.partial").glob("*.safetensors"))) == 1
    quantize(tmp_path / "out", workers=3, resume=True)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert {p.name for p in tmp_path.iterdir()} == {"out", "whole"}


def command(words: list[str]) -> int:
    """Start the command line in a forked process of its own group; its process id."""
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            os.setpgid(0, 0)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
            sys.argv = ["lowbit", *words]
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            os._exit(status)
    return pid


def test_an_interrupt_while_workers_start_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python forgets what is raised in the functions that it calls after a fork."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    start, started = workers._start, []

    def interrupted(pieces: Any) -> Any:
        started.append(start(pieces))
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)  # the handler runs here
        return started[-1]

    monkeypatch.setattr(workers, "_start", interrupted)
    try:
        with workers.using(2), pytest.raises(KeyboardInterrupt):
            workers.side_by_side([lambda: time.sleep(60), lambda: time.sleep(60)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(started) == 2
    assert all(child.status == -signal.SIGKILL for child in started)


def inside(directory: Path) -> None:
    """Say that this process has come here, and stay."""
    (directory / f"inside-{os.getpid()}").touch()
    time.sleep(600)


def those_inside(directory: Path, count: int) -> list[psutil.Process]:
    """The processes that are `inside`, once there are `count` of them."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        found = list(directory.glob("inside-*"))
        if len(found) >= count:
            return [psutil.Process(int(path.name.split("-")[1])) for path in found]
        time.sleep(0.05)
    raise AssertionError("no workers came to the refinement")


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, 1)], ids=["ctrl-c", "kill worker"])
def test_the_command_ends_with_its_workers(
    tiny: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals, status: int
) -> None:
    cut_small(monkeypatch)
    in_a_worker(monkeypatch, 1, lambda: inside(tmp_path))
    words = ["quantize", str(tiny), "-o", str(tmp_path / "out"), "--scheme", "w4a16-g32", "--samples", "16"]
    pid = command([*words, "--seq-len", "32", "--calibration", str(text_file), "--workers", "2", "--quiet"])
    workers = those_inside(tmp_path, 2)
    if sent == signal.SIGINT:
        os.killpg(pid, sent)  # as a terminal does: to all of them
    else:
        workers[0].kill()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status
    assert not any(worker.is_running() for worker in workers)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists()
