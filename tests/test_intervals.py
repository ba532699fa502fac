"""Intervals hold the truth as often as they say, and pairing is what makes them narrow."""

import numpy as np
import pytest
from scipy import stats

from lowbit.intervals import kl_difference, mcnemar, mean_interval, median_interval, perplexity_ratio


def test_bootstrap_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        interval = mean_interval(rng.gamma(4.0, size=40), seed)
        hits += interval.low <= 4.0 <= interval.high
    assert 0.90 <= hits / 200 <= 0.99


def test_pairing_sees_a_difference_that_separate_intervals_cannot() -> None:
    """Windows differ far more than the two models do: only the paired difference is clear of 0."""
    rng = np.random.default_rng(1)
    hard = rng.gamma(2.0, size=60)
    a, b = 0.010 * hard, 0.011 * hard + rng.normal(0, 1e-4, 60)
    paired, alone_a, alone_b = kl_difference(a, b), mean_interval(a), mean_interval(b)
    assert paired.high < 0
    assert paired.excludes(0)
    assert alone_a.high > alone_b.low
    assert paired.estimate == pytest.approx(a.mean() - b.mean())


def test_a_seed_gives_the_same_interval_again() -> None:
    values = np.random.default_rng(2).normal(size=30)
    assert mean_interval(values, 5) == mean_interval(values, 5)
    assert mean_interval(values, 5) != mean_interval(values, 6)


def test_perplexity_ratio_is_the_ratio_of_perplexities() -> None:
    rng = np.random.default_rng(3)
    own, other = rng.normal(2.1, 0.1, 50), rng.normal(2.0, 0.1, 50)
    ratio = perplexity_ratio(own, other)
    assert ratio.estimate == pytest.approx(np.exp(own.mean()) / np.exp(other.mean()))
    assert ratio.low < ratio.estimate < ratio.high


def test_one_window_says_nothing() -> None:
    assert not mean_interval(np.array([0.3])).excludes(0)


def test_median_interval_covers_the_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(4)
    intervals = [median_interval(rng.exponential(size=15)) for _ in range(1000)]
    hits = sum(i.low <= np.log(2) <= i.high for i in intervals)
    assert intervals[0].confidence >= 0.95
    assert hits / 1000 == pytest.approx(intervals[0].confidence, abs=0.025)


def test_five_values_cannot_say_95_percent_and_six_can() -> None:
    five, six = median_interval(np.arange(5.0)), median_interval(np.arange(6.0))
    assert (five.low, five.high, five.confidence) == (0, 4, pytest.approx(0.9375))
    assert (six.low, six.high, six.confidence) == (0, 5, pytest.approx(0.96875))
    assert median_interval(np.array([2.0])).confidence == 0


def test_mcnemar_is_the_coin_test_on_disagreements() -> None:
    own = np.array([True] * 9 + [False] * 1 + [True] * 500)
    other = np.array([False] * 9 + [True] * 1 + [True] * 500)
    result = mcnemar(own, other)
    assert (result["only_own"], result["only_other"]) == (9, 1)
    assert result["p_value"] == pytest.approx(2 * (stats.binom.pmf(0, 10, 0.5) + stats.binom.pmf(1, 10, 0.5)))
    assert mcnemar(own, own)["p_value"] == 1
    with pytest.raises(ValueError, match="same items"):
        mcnemar(own, other[:5])
