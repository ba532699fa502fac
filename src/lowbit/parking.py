"""What waits on disk while something else is at work.

The Hessian H of a wide input and the factor U made of it are of one size (256 MiB each for 8192 inputs), and a method
needs first U, then H. `Parked` writes H to a file, gives its memory back, hands out its rows in any order to make U
from, and reads it back into the same tensor. What is set `aside` is not looked at for a while. A `Shelf` keeps values
that would take longer to compute again than to read. Plain reads and writes: what is mapped counts as memory.

The folder is the process's setting, as the number of workers is; without one, and below WIDE columns, nothing moves.
The values are the same either way. Files are used again, block after block: the system fills the pages of an old one
ten times as fast as it finds new ones.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from lowbit.shards import bytes_of

WIDE = 4096  # inputs from which on a Hessian is large: 64 MiB
_ROWS = 256  # read at once


class _Files:
    """Files without a name in one folder, gone when this process is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._idle: list[IO[bytes]] | None = []

    def take(self) -> IO[bytes]:
        """One at its beginning, with whatever it held before. Raises OSError if there is no room for another."""
        if self._idle:
            file = self._idle.pop()
            file.seek(0)
            return file
        self.folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=self.folder, buffering=0)

    def put_back(self, file: IO[bytes]) -> None:
        if self._idle is None:
            file.close()
        else:
            self._idle.append(file)

    def close(self) -> None:
        for file in self._idle or []:
            file.close()
        self._idle = None


_setting: dict[str, _Files | None] = {"files": None}


@contextlib.contextmanager
def parking_in(folder: Path | None) -> Iterator[None]:
    """Wide matrices may wait in files of `folder` within; None: they stay in memory."""
    files = None if folder is None else _Files(folder)
    before, _setting["files"] = _setting["files"], files
    try:
        yield
    finally:
        _setting["files"] = before
        if files is not None:
            files.close()


@contextlib.contextmanager
def aside(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Tensors that nobody looks at within are in a file of the folder meanwhile. Without one, or with a full disk, they
    stay in memory. Raises OSError if they cannot be read again."""
    files, memory, places = _setting["files"], [t for t in tensors if _whole(t)], list[int]()
    with contextlib.ExitStack() as stack:
        if files is not None:
            with contextlib.suppress(OSError):
                file = files.take()
                stack.callback(files.put_back, file)
                for tensor in memory:
                    start = file.tell()
                    _write(file, tensor)
                    places.append(start)
        gone = memory if files is not None and len(places) == len(memory) else []
        for tensor in gone:
            tensor.untyped_storage().resize_(0)
        try:
            yield
        finally:
            for tensor, start in zip(gone, places, strict=False):
                tensor.untyped_storage().resize_(tensor.nbytes)
                _read(file, tensor, start)


def _whole(tensor: Tensor) -> bool:
    """Whether a tensor is all that there is in its memory, in order, and the memory is torch's to give back."""
    storage = tensor.untyped_storage()
    return tensor.is_contiguous() and storage.nbytes() == tensor.nbytes > 0 and storage.resizable()


class Shelf:
    """Tensors in a file of the folder, for one thread. It takes up to `share` of what is free on that disk at the
    beginning, and nothing without a folder or when the disk fills: whoever puts a value here can make it again."""

    def __init__(self, share: float) -> None:
        self._places: dict[Hashable, tuple[int, torch.Size, torch.dtype]] = {}
        self._file: IO[bytes] | None = None
        self._files: _Files | None = None
        self._share, self._used = share, 0
        self._room: int | None = None  # not known before the first value comes

    def __contains__(self, key: Hashable) -> bool:
        return key in self._places

    def put(self, key: Hashable, values: Tensor) -> None:
        """Keep a copy, if there is room."""
        if self._room is None:
            with contextlib.suppress(OSError):
                self._open()
        if self._file is None or self._used + values.nbytes > (self._room or 0):
            return
        try:
            self._file.seek(self._used)
            _write(self._file, values.contiguous())
        except OSError:
            self._room = 0
            return
        self._places[key] = (self._used, values.shape, values.dtype)
        self._used += values.nbytes

    def _open(self) -> None:
        self._files, self._room = _setting["files"], 0
        if self._files is not None:
            self._file = self._files.take()
            taken = os.fstat(self._file.fileno()).st_blocks * 512
            self._room = int(self._share * (shutil.disk_usage(self._files.folder).free + taken))

    def get(self, key: Hashable) -> Tensor:
        assert self._file is not None
        start, shape, dtype = self._places[key]
        values = torch.empty(shape, dtype=dtype)
        _read(self._file, values, start)
        return values

    def close(self) -> None:
        self._places = {}
        if self._file is not None and self._files is not None:
            self._files.put_back(self._file)
        self._file = None


class Parked:
    """A square matrix (n, n) that may be on disk until `back()`. Nobody may look at it in between.

    Raises OSError if it cannot be written; then it is still in memory.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.diagonal = matrix.diagonal().clone()
        self._file: IO[bytes] | None = None
        self._files = files = _setting["files"]
        if files is None or len(matrix) < WIDE or not matrix.is_contiguous():
            return
        with contextlib.ExitStack() as stack:
            file = files.take()
            stack.callback(files.put_back, file)
            os.posix_fallocate(file.fileno(), 0, matrix.nbytes)  # full now or never
            for rows in matrix.split(_ROWS):
                _write(file, rows)
            self._file = file
            stack.pop_all()
        self._bytes = matrix.untyped_storage().nbytes()
        matrix.untyped_storage().resize_(0)

    @property
    def away(self) -> bool:
        return self._file is not None

    def permuted(self, order: Tensor) -> Tensor:
        """A copy with rows and columns in `order`."""
        if self._file is None:
            return self.matrix[order[:, None], order]
        width = len(order)
        copy = torch.empty(width, width, dtype=self.matrix.dtype)
        some = torch.empty(_ROWS, width, dtype=self.matrix.dtype)
        row, rows = some[0].nbytes, bytes_of(some)
        for start in range(0, width, _ROWS):
            chosen = order[start : start + _ROWS].tolist()
            for i, k in enumerate(chosen):
                _fill(rows[i * row : (i + 1) * row], self._file, k * row)
            torch.index_select(some[: len(chosen)], 1, order, out=copy[start : start + len(chosen)])
        return copy

    def back(self) -> Tensor:
        """The matrix, in memory again."""
        if self._file is not None and self._files is not None:
            self.matrix.untyped_storage().resize_(self._bytes)
            for i, rows in enumerate(self.matrix.split(_ROWS)):
                _read(self._file, rows, i * _ROWS * self.matrix.shape[1] * self.matrix.itemsize)
            self._files.put_back(self._file)
            self._file = None
        return self.matrix


def _write(file: IO[bytes], values: Tensor) -> None:
    view = bytes_of(values)
    while view:
        view = view[file.write(view) :]


def _read(file: IO[bytes], values: Tensor, start: int) -> None:
    _fill(bytes_of(values), file, start)


def _fill(view: memoryview, file: IO[bytes], start: int) -> None:
    while view:
        got = os.preadv(file.fileno(), [view], start)
        if not got:
            raise OSError("a file of the job's was cut short while it was in use")
        view, start = view[got:], start + got
