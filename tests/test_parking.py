"""Wide inputs: one Hessian for all threads, on disk while its factor is used, and rows in place of the held-out one."""

import contextlib
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
from lowbit import job, losses, parking, pipeline
from lowbit.algorithms import METHODS
from lowbit.algorithms.gptq import GPTQSettings, gptq
from lowbit.losses import Statistics
from lowbit.model.lockstep import Walk
from lowbit.model.walk import Entry, InputGroup
from lowbit.parking import Parked, parking_in
from lowbit.recipe import Recipe
from lowbit.rounding import WORSE, round_linears
from lowbit.scheme import Scheme
from lowbit.shards import read_tensor
from lowbit.stats import Hessian, Rows, quadratic_loss

WIDE = 64


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs count as wide from 64 on."""
    monkeypatch.setattr(parking, "WIDE", WIDE)
    monkeypatch.setattr(losses, "WIDE", WIDE)
    monkeypatch.setattr(job, "WIDE", WIDE)


def inputs(rows: int, width: int = WIDE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, width, generator=generator) @ torch.randn(width, width, generator=generator)


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    hessian = Hessian(x.shape[1])
    hessian.update(x)
    return hessian.mean()


# --- a matrix that waits on disk


def test_what_is_set_aside_takes_no_memory_and_comes_back(tmp_path: Path) -> None:
    """Even past an error; a part of a larger tensor stays where it is."""
    whole, part = torch.randn(30, 50), torch.randn(30, 50)[:10]
    originals = [whole.clone(), part.clone()]
    with parking_in(tmp_path), contextlib.suppress(ZeroDivisionError), parking.aside([whole, part]):
        assert whole.untyped_storage().nbytes() == 0
        assert torch.equal(part, originals[1])
        raise ZeroDivisionError
    assert torch.equal(whole, originals[0])
    assert torch.equal(part, originals[1])
    with parking.aside([whole]):
        assert torch.equal(whole, originals[0])


def test_memory_that_is_not_torchs_stays_where_it_is(tmp_path: Path) -> None:
    """NumPy has looked at it, and may again. What is read from shards can be given back."""
    seen = torch.randn(30, 50)
    seen.numpy()
    file = tmp_path / "values"
    file.write_bytes(bytes(range(200)))
    read = read_tensor(file, 8, "BF16", (8, 12))
    original = read.clone()
    with parking_in(tmp_path), parking.aside([seen, read]):
        assert seen.untyped_storage().nbytes() == seen.nbytes
        assert read.untyped_storage().nbytes() == 0
    assert torch.equal(read, original)


def test_a_full_disk_leaves_everything_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.randn(10), torch.randn(20)]
    write = parking._write

    def full(file: Any, values: torch.Tensor) -> None:
        if len(values) == 20:
            raise OSError(28, "No space left on device")
        write(file, values)

    monkeypatch.setattr(parking, "_write", full)
    with parking_in(tmp_path), parking.aside(tensors):
        assert [len(t) for t in tensors] == [10, 20]
        assert all(t.untyped_storage().nbytes() for t in tensors)


@pytest.mark.usefixtures("wide")
def test_a_parked_matrix_takes_no_memory_and_comes_back(tmp_path: Path) -> None:
    matrix = hessian_of(inputs(100, 300))
    original, order = matrix.clone(), torch.randperm(300)
    with parking_in(tmp_path / "new"):
        parked = Parked(matrix)
    assert matrix.untyped_storage().nbytes() == 0
    assert torch.equal(parked.permuted(order), original[order[:, None], order])
    assert torch.equal(parked.diagonal, original.diagonal())
    assert parked.back() is matrix
    assert torch.equal(matrix, original)
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.usefixtures("wide")
def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = hessian_of(inputs(100))
    original = matrix.clone()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with parking_in(tmp_path), pytest.raises(OSError, match="No space left"):
        Parked(matrix)
    assert torch.equal(matrix, original)


def test_without_a_folder_and_below_the_limit_nothing_moves(tmp_path: Path) -> None:
    matrix = hessian_of(inputs(100))
    assert Parked(matrix).back() is matrix
    with parking_in(tmp_path):
        parked = Parked(matrix)
    assert matrix.untyped_storage().nbytes() == matrix.nbytes
    order = torch.arange(WIDE).flip(0)
    assert torch.equal(parked.permuted(order), matrix.flip(0, 1))


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("damping", [0.01, 0.0])  # the second fails at first, and reads the Hessian again
def test_gptq_makes_the_same_of_it(tmp_path: Path, damping: float) -> None:
    H = hessian_of(inputs(40 if damping == 0 else 200))
    weight = torch.randn(48, WIDE)
    words: tuple[Any, ...] = (Scheme.parse("w3a16-g32").weight, GPTQSettings(dampening_frac=damping), torch.bfloat16)
    plain, used = gptq(weight, H, *words)
    with parking_in(tmp_path):
        parked, again = gptq(weight, H, *words)
    assert used == again
    assert (used > damping) == (damping == 0)
    assert torch.equal(plain.codes, parked.codes)
    assert torch.equal(plain.scale, parked.scale)


# --- rows in place of a Hessian


def test_rows_give_the_loss_of_their_hessian() -> None:
    x, error = inputs(30), torch.randn(7, WIDE)
    x[3, 5] = torch.inf
    rows, more = Rows(WIDE), Rows(WIDE)
    rows.update(x[:10].reshape(2, 5, WIDE))
    more.update(x[10:])
    rows.merge(more)
    assert (rows.rows, rows.bad_rows) == (29, 1)
    assert rows.loss(error) == pytest.approx(quadratic_loss(error, hessian_of(x)), rel=1e-5)


def test_no_more_rows_are_kept_than_a_hessian_is_worth() -> None:
    x = inputs(100)
    rows = Rows(WIDE)
    for part in x.split(24):
        rows.update(part)
    assert rows.rows == 100
    error = torch.randn(3, WIDE)
    assert rows.loss(error) == pytest.approx(quadratic_loss(error, hessian_of(x[: WIDE // 2])), rel=1e-5)


@pytest.mark.usefixtures("wide")
def test_the_guard_judges_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that does well on what it saw and badly on held-out windows is not kept."""
    recipe, weight = Recipe(scheme="w4a16-g32", method="gptq"), torch.randn(32, WIDE)
    every = inputs(220)
    every[:200, :32] *= 1e-3  # the method learns next to nothing of half of the inputs
    statistics = Statistics.empty(WIDE)
    statistics.train.update(every[:200])
    statistics.held_out.update(every[200:])
    assert isinstance(statistics.held_out, Rows)
    method = METHODS["gptq"]

    def reckless(weight: torch.Tensor, *rest: Any) -> Any:
        quantized, notes = method.rounding(weight, *rest)
        quantized.codes[:, :32] = 0  # free on the training rows
        return quantized, notes

    scheme = Scheme.parse(recipe.scheme)
    monkeypatch.setitem(METHODS, "gptq", type(method)(reckless, method.settings, needs_calibration=True))
    bad = round_linears({"a": weight}, scheme, statistics, recipe, torch.bfloat16)["a"]
    assert WORSE in bad.report["fallback"]
    error = weight - bad.quantized.dequantize()
    assert bad.report["loss"] == pytest.approx(quadratic_loss(error, hessian_of(every)), rel=1e-3)


# --- threads that add to one sum


class Wait(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(random.random() / 200)
        return self.linear(x)


@pytest.mark.parametrize("recompute", [False, True])
def test_turns_are_in_one_order_whatever_the_timing(recompute: bool) -> None:
    entries = [Entry(torch.full((1, 2, 4), float(i)), [((), {})]) for i in range(8)]
    orders = []
    for _ in range(3):
        walk = Walk(Wait(), 0, entries, [InputGroup(("linear",))], {}, threads=3, recompute=recompute)
        order: list[float] = []
        walk.in_turn(0, lambda _entry, x, order=order: order.append(float(x[0, 0, 0])))
        walk.finish()
        orders.append(order)
    assert orders == [[0, 3, 6, 1, 4, 7, 2, 5]] * 3  # shares of 3, 3 and 2


def test_a_thread_that_fails_does_not_stop_the_others() -> None:
    entries = [Entry(torch.full((1, 2, 4), float(i)), [((), {})]) for i in range(8)]
    walk = Walk(Wait(), 0, entries, [InputGroup(("linear",))], {}, threads=3)

    def use(_entry: Entry, x: torch.Tensor) -> None:
        if float(x[0, 0, 0]) == 3:
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        walk.in_turn(0, use)
    walk.finish()


# --- all of it


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("wide", "two_threads")
@pytest.mark.parametrize("stored", ["tiny", "tiny_float32"])
def test_a_model_of_wide_inputs_is_the_same_either_way(
    stored: str, request: pytest.FixtureRequest, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads; with everything in memory, and with activations, Hessians and the block's weights on disk. The
    model is stored in the dtype it is computed in, or in another."""
    tiny = request.getfixturevalue(stored)
    words: dict[str, Any] = {"scheme": "w4a16-g32", "samples": 24, "seq_len": 64, "calibration": str(text_file)}
    documents = []
    for place, frugal in (("memory", False), ("disk", True)):
        monkeypatch.setattr(pipeline, "choose_frugal", lambda *_, frugal=frugal: frugal)
        documents.append(lowbit.quantize(tiny, tmp_path / place, **words))
    for file in (tmp_path / "memory").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "disk" / file.name).read_bytes()
    reports = documents[0]["layers"]
    assert sum(r["loss"] for r in reports) < 0.9 * sum(r["loss_rtn"] for r in reports)
    assert [r["loss"] for r in reports] == [r["loss"] for r in documents[1]["layers"]]
