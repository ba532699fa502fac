"""The papers' claims on planted inputs, and that no search is ever worse than doing nothing."""

import math

import pytest
import torch
from torch import Tensor

from lowbit.algorithms.awq import AWQSettings, awq, clipped_rtn, relative_magnitude
from lowbit.algorithms.equalize import ChannelScale, channel_max, output_error, search
from lowbit.algorithms.rtn import rtn
from lowbit.algorithms.smoothquant import SmoothQuantSettings, smooth_scale, smoothquant
from lowbit.scheme import Scheme

BF16 = torch.bfloat16


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(factor: float) -> tuple[Tensor, Tensor]:
    """x (256, 64) with channels 3 and 40 `factor` times as large; w (32, 64) with those columns divided by it."""
    x, w = normal(256, 64), normal(32, 64, seed=1)
    for channel in (3, 40):
        x[:, channel] *= factor
        w[:, channel] /= factor
    return x, w


def run_smoothquant(x: Tensor, w: Tensor, scheme: str, **settings: str) -> ChannelScale:
    loss = output_error(x, {"w": w}, {"w": Scheme.parse(scheme)}, BF16)
    return smoothquant(x.abs().amax(0), channel_max([w]), loss, SmoothQuantSettings(**settings))  # type: ignore[arg-type]


def run_awq(x: Tensor, w: Tensor, scheme: str) -> ChannelScale:
    parsed = Scheme.parse(scheme)
    assert parsed.weight is not None
    loss = output_error(x, {"w": w}, {"w": parsed}, BF16)
    return awq(x.abs().mean(0), relative_magnitude([w], parsed.weight.group_size), loss, AWQSettings())


def test_smoothquant_undoes_planted_outliers() -> None:
    """With outliers of 64x, W8A8's error falls by more than a hundred, to what it is without any outliers."""
    x, w = planted(64)
    result = run_smoothquant(x, w, "w8a8")
    without = run_smoothquant(*planted(1), "w8a8")
    assert result.loss < 0.01 * result.loss_identity
    assert result.loss == pytest.approx(without.loss, rel=0.05)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.85, 1.0])
def test_any_alpha_follows_an_outlier_exactly(alpha: float) -> None:
    """Multiplying a channel by c and dividing its weights by c multiplies s by c, relative to the other channels."""
    scales = []
    for factor in (1, 32):
        x, w = planted(factor)
        scales.append(smooth_scale(x.abs().amax(0), channel_max([w]), alpha))
    ratio = scales[1] / scales[0]
    assert torch.allclose(ratio[[3, 40]] / ratio[0], torch.tensor(32.0), rtol=1e-4)
    assert torch.allclose(ratio[1:3], ratio[:1], rtol=1e-4)


def test_the_formula_of_the_paper() -> None:
    x_max, w_max = torch.tensor([1.0, 8.0, 2.0]), torch.tensor([0.5, 0.1, 4.0])
    scale = smooth_scale(x_max, w_max, 0.5)
    expected = (x_max / w_max).sqrt()
    assert torch.allclose(scale / scale[0], expected / expected[0])
    ones = smooth_scale(x_max, w_max, 1.0)
    assert torch.allclose(x_max / ones, (x_max / ones)[:1].expand(3))  # alpha 1: all channels equally large


def test_auto_is_no_worse_than_any_fixed_alpha_of_its_grid() -> None:
    x, w = normal(256, 64) * torch.linspace(0.05, 3, 64), normal(32, 64, seed=1)
    auto = run_smoothquant(x, w, "w8a8")
    for alpha in ("0.25", "0.5", "0.8"):
        assert auto.loss <= run_smoothquant(x, w, "w8a8", alpha=alpha).loss


def test_channels_that_are_never_active_get_a_usable_scale() -> None:
    x, w = planted(16)
    x[:, 5] = 0
    w[:, 6] = 0
    result = run_smoothquant(x, w, "w8a8")
    assert result.scale is not None
    assert bool(torch.isfinite(result.scale).all())
    assert result.loss < result.loss_identity


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w3a16-g32", "w4a16-g32-asym"])
def test_awq_protects_salient_channels(scheme: str) -> None:
    """Two channels with activations 20 times as large carry the error; scaling them up takes most of it away."""
    x, w = normal(256, 64), normal(32, 64, seed=1)
    x[:, [3, 40]] *= 20
    result = run_awq(x, w, scheme)
    assert result.loss < 0.6 * result.loss_identity
    assert result.scale is not None
    assert float(result.scale[[3, 40]].min()) > 2 * float(result.scale.median())


def test_awq_finds_planted_pairs() -> None:
    """Large activations on small columns: a group's scale is not wasted on them."""
    x, w = planted(32)
    result = run_awq(x, w, "w4a16-g32")
    assert result.loss < 0.3 * result.loss_identity
    assert result.loss <= 1.1 * run_awq(*planted(1), "w4a16-g32").loss


@pytest.mark.parametrize("seed", range(5))
def test_no_search_is_worse_than_identity(seed: int) -> None:
    x, w = normal(64, 64, seed=seed), normal(16, 64, seed=seed + 10)
    for result in (run_awq(x, w, "w4a16-g32"), run_smoothquant(x, w, "w8a8"), run_smoothquant(x, w, "w4a16-g32")):
        assert result.loss <= result.loss_identity
        assert (result.scale is None) == (result.label == "identity")


def test_losses_that_are_not_numbers_lose() -> None:
    candidates = [("nan", torch.full((4,), 2.0)), ("good", torch.full((4,), 3.0)), ("zero", torch.zeros(4))]
    losses = {2.0: math.nan, 3.0: 0.5, 1.0: 1.0, 0.0: 0.0}
    assert search(candidates, lambda s: losses[float(s[0])], 4).label == "good"
    assert search(candidates[:1], lambda s: losses[float(s[0])], 4).label == "identity"
    assert search(candidates, lambda _: math.nan, 4).scale is None
    losses[1.0] = math.nan
    assert search(candidates, lambda s: losses[float(s[0])], 4).label == "good"


def test_a_linear_that_stays_as_it_is_costs_nothing() -> None:
    x, w = planted(8)
    loss = output_error(x, {"w": w}, {"w": Scheme(None)}, BF16)
    assert loss(torch.linspace(0.5, 2, 64)) < 1e-10


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w3a16-g32-asym", "w4a16-channel"])
def test_clipping_lowers_each_groups_own_output_error(scheme: str) -> None:
    grid = Scheme.parse(scheme).weight
    assert grid is not None
    x, w = normal(512, 64) * torch.linspace(0.1, 2, 64), normal(16, 64, seed=1)
    w[:, 7] *= 5  # one wide column in a group of small activations: cutting it pays
    H = x.T @ x / len(x)
    plain, clipped = rtn(w, grid, BF16), clipped_rtn(w, H, grid, BF16)
    size = grid.group_size or 64
    worse = 0
    for start in range(0, 64, size):
        columns = slice(start, start + size)

        def cost(q: Tensor, columns: slice = columns) -> Tensor:
            error = (w - q)[:, columns] @ x[:, columns].T
            return error.square().sum(1)

        a, b = cost(plain.dequantize()), cost(clipped.dequantize())
        worse += int((b > a * 1.001).sum())
        assert b.sum() < a.sum()
    assert worse == 0
