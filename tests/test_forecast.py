"""What the forecast of time is made of: extrapolation, workers, and a model left as it was."""

from pathlib import Path

import pytest
import torch

from lowbit.algorithms import METHODS
from lowbit.calibration import load_calibration
from lowbit.forecast import _each
from lowbit.model.checkpoint import DEMO, open_checkpoint
from lowbit.model.load import load_tokenizer, open_source, skeleton
from lowbit.model.walk import find_blocks
from lowbit.pipeline import quantize
from lowbit.recipe import Recipe
from lowbit.scheme import Scheme
from lowbit.tensor import ROWS
from lowbit.trial import WIDEST, Passing, Rounding, _at, _to_try


@pytest.mark.parametrize("power", [1.0, 2.3, 3.0])
def test_a_power_law_is_continued(power: float) -> None:
    known = {width: 5e-9 * width**power for width in (1024, 2048)}
    for width in (512, 1536, 2048, 8192):
        assert _at(width, known, 1, 3) == pytest.approx(5e-9 * width**power)


def test_noise_does_not_bend_the_extrapolation_out_of_bounds() -> None:
    assert _at(4096, {1024: 1.0, 2048: 0.9}, 1, 3) == pytest.approx(0.9 * 2)
    assert _at(4096, {1024: 1.0, 2048: 100.0}, 1, 3) == pytest.approx(100 * 8)
    assert _at(4096, {1024: 0.0, 2048: 1.0}, 1, 2) == pytest.approx(4)
    assert _at(4096, {2048: 1.0}, 1, 2) == pytest.approx(4)


def test_widths_to_try() -> None:
    assert _to_try([256, 768]) == [256, 768]
    assert _to_try([2048, 8192]) == [WIDEST // 2, WIDEST]
    assert _to_try([64, 4096, 4096]) == [64, WIDEST // 2, WIDEST]


def test_workers_share_rows_but_not_what_is_done_once() -> None:
    def seconds(workers: int, rows: int = 4 * ROWS, width: int = 1024) -> float:
        values = {1024: 1.0}, {1024: 1e-3}, {1024: 0.0}
        return Rounding(*values, 0.25, workers).seconds(rows, width, 3)

    assert seconds(1) == pytest.approx(1 + 4 * ROWS * 1e-3)
    assert seconds(2) == pytest.approx(1.25 + 2 * ROWS * 1e-3)
    assert seconds(3) == pytest.approx(1.25 + 2 * ROWS * 1e-3)  # two rounds all the same
    assert seconds(8) == pytest.approx(1.25 + ROWS * 1e-3)
    assert seconds(8, rows=ROWS) == pytest.approx(1 + ROWS * 1e-3)  # one piece is for nobody else
    assert seconds(8, rows=2 * ROWS - 1) == pytest.approx(1 + (2 * ROWS - 1) * 1e-3)  # nor are small ones


def test_activations_on_disk_repeat_what_lies_between_wide_linears() -> None:
    passing = Passing(modules=10.0, products=8.0, statistics=1.0)
    wide, narrow = [(100, 512), (100, 512), (100, 512)], [(100, 64), (100, 64), (100, 64)]
    assert _each(passing, wide, frugal=False) == 11
    assert _each(passing, wide, frugal=True) == 11 + 2  # once more on average, of what is no product
    assert _each(passing, narrow, frugal=True) == 11 + 10


def test_the_trial_takes_some_time_and_leaves_no_weights_behind() -> None:
    checkpoint = open_checkpoint("demo")
    net = skeleton(checkpoint)
    source = open_source(net, checkpoint)
    text = load_calibration(str(DEMO / "calibration.txt"), load_tokenizer(checkpoint), 4, 64, 0)
    with torch.no_grad():
        passing = Passing.measured(net, find_blocks(net), source, text.tokens, 2, 2)
    assert 0 < passing.products <= passing.modules
    assert all(p.is_meta for p in net.parameters())
    assert not any(b.is_meta for b in net.buffers())


SCHEMES = {"int": "w4a16-g128", "learned": "any4", "e8p": "e8p2"}  # one for each kind of grid


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_tried(method: str) -> None:
    scheme = next(scheme for kind, scheme in SCHEMES.items() if kind in METHODS[method].grids)
    grid = Scheme.parse(scheme).weight
    assert grid is not None
    with torch.no_grad():
        rounding = Rounding.measured(grid, Recipe(scheme=scheme, method=method), [256], 1)
    assert rounding.seconds(512, 256, 3) > rounding.seconds(256, 256, 3) > 0


def test_a_recipe_that_caches_alone_has_a_forecast(tmp_path: Path) -> None:
    predicted = quantize("demo", tmp_path / "out", scheme="none", kv="int8", method="rtn", dry_run=True)["predicted"]
    assert predicted["seconds"] > 0
