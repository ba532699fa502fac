"""Large matrices wait on disk while another one is at work.

The Hessian H of a wide input and the factor U made of it are of one size (256 MiB each for 8192 inputs), and a method
needs first U, then H. `Parked` writes H to a file, gives its memory back, hands out its rows in any order to make U
from, and reads it back into the same tensor. Plain reads and writes: what is mapped counts as the process's memory.

The folder is the process's setting, as the number of workers is; without one, and below WIDE columns, nothing moves.
The values are the same either way.
"""

import contextlib
import ctypes
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

WIDE = 4096  # inputs from which on a Hessian is large: 64 MiB
_ROWS = 256  # read at once
_setting: dict[str, Path | None] = {"folder": None}


@contextlib.contextmanager
def parking_in(folder: Path | None) -> Iterator[None]:
    """Wide matrices may wait in files of `folder` within; None: they stay in memory."""
    before, _setting["folder"] = _setting["folder"], folder
    try:
        yield
    finally:
        _setting["folder"] = before


class Parked:
    """A square matrix (n, n) that may be on disk until `back()`. Nobody may look at it in between.

    Raises OSError if it cannot be written; then it is still in memory.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.diagonal = matrix.diagonal().clone()
        self._file: IO[bytes] | None = None
        folder = _setting["folder"]
        if folder is None or len(matrix) < WIDE or not matrix.is_contiguous():
            return
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(tempfile.TemporaryFile(dir=folder, buffering=0))  # gone when this process is
            os.posix_fallocate(file.fileno(), 0, matrix.nbytes)  # full now or never
            for rows in matrix.split(_ROWS):
                _write(file, rows)
            self._file = file
            stack.pop_all()
        self._bytes = matrix.untyped_storage().nbytes()
        matrix.untyped_storage().resize_(0)

    def permuted(self, order: Tensor) -> Tensor:
        """A copy with rows and columns in `order`."""
        if self._file is None:
            return self.matrix[order[:, None], order]
        width = len(order)
        copy = torch.empty(width, width, dtype=self.matrix.dtype)
        some = torch.empty(_ROWS, width, dtype=self.matrix.dtype)
        for start in range(0, width, _ROWS):
            chosen = order[start : start + _ROWS].tolist()
            for i, row in enumerate(chosen):
                _read(self._file, some[i], row * some[i].nbytes)
            torch.index_select(some[: len(chosen)], 1, order, out=copy[start : start + len(chosen)])
        return copy

    def back(self) -> Tensor:
        """The matrix, in memory again."""
        if self._file is not None:
            self.matrix.untyped_storage().resize_(self._bytes)
            for i, rows in enumerate(self.matrix.split(_ROWS)):
                _read(self._file, rows, i * _ROWS * self.matrix.shape[1] * self.matrix.itemsize)
            self._file.close()
            self._file = None
        return self.matrix


def _view(values: Tensor) -> memoryview:
    """The bytes of a contiguous tensor. (A tensor that was seen as a NumPy array can give no memory back.)"""
    return memoryview((ctypes.c_char * values.nbytes).from_address(values.data_ptr())).cast("B")


def _write(file: IO[bytes], values: Tensor) -> None:
    view = _view(values)
    while view:
        view = view[file.write(view) :]


def _read(file: IO[bytes], values: Tensor, start: int) -> None:
    view = _view(values)
    while view:
        got = os.preadv(file.fileno(), [view], start)
        if not got:
            raise OSError("a file of the job's was cut short while it was in use")
        view, start = view[got:], start + got
