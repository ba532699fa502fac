"""Is a difference larger than the noise? Both sides saw the same windows, positions or rounds, so they are paired.

mean          bootstrap over windows: resample windows, not tokens, because tokens of one text depend on each other
              (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 13). Perplexity is compared as a
              ratio: exp(mean(nll_a - nll_b)).
right/wrong   McNemar (1947): only positions on which the two disagree say anything; under "no difference" each of
              them falls to either side like a coin.
median        order statistics: the k-th smallest and k-th largest of n values enclose the median with a probability
              that is binomial, whatever the distribution of timings (David and Nagaraja, "Order Statistics", §7.1).
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 2000
_ANYTHING = 500.0  # nats: no difference is larger, and both it and its exponential are finite numbers of JSON


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval that holds the truth with probability `confidence` (or as near as n allows)."""

    estimate: float
    low: float
    high: float
    confidence: float

    def excludes(self, value: float) -> bool:
        return self.low > value or self.high < value

    @property
    def half_width(self) -> float:
        """Half the interval's width relative to the estimate; infinite where the interval says nothing."""
        return (self.high - self.low) / 2 / abs(self.estimate) if self.estimate else float("inf")

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def mean_interval(values: np.ndarray, seed: int = 0, confidence: float = CONFIDENCE) -> Interval:
    """Bootstrap interval (percentile) of the mean of one value a window; of a single window it is all but infinite."""
    values = np.asarray(values, dtype=np.float64)
    estimate = float(values.mean())
    if len(values) < 2:
        return Interval(estimate, estimate - _ANYTHING, estimate + _ANYTHING, 1.0)
    result = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, confidence_level=confidence, method="percentile",
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    return Interval(estimate, float(result.confidence_interval.low), float(result.confidence_interval.high), confidence)


def perplexity_ratio(own: np.ndarray, other: np.ndarray, seed: int = 0) -> Interval:
    """Perplexity of `own` over that of `other`, from the mean negative log-likelihoods of the same windows."""
    log = mean_interval(np.asarray(own) - np.asarray(other), seed)
    return Interval(float(np.exp(log.estimate)), float(np.exp(log.low)), float(np.exp(log.high)), log.confidence)


def kl_difference(own: np.ndarray, other: np.ndarray, seed: int = 0) -> Interval:
    """Mean KL of `own` minus that of `other`, over the same windows: below 0, `own` is closer to the reference."""
    return mean_interval(np.asarray(own) - np.asarray(other), seed)


def mcnemar(own_right: np.ndarray, other_right: np.ndarray) -> dict[str, Any]:
    """{only_own, only_other, p_value} for two arrays of right/wrong on the same items; the exact binomial test.

    Positions of one text are not independent, so for them a small p is a hint; for task items it is a test.
    """
    own_right, other_right = np.asarray(own_right, dtype=bool).ravel(), np.asarray(other_right, dtype=bool).ravel()
    if own_right.shape != other_right.shape:
        raise ValueError(f"McNemar compares the same items: {own_right.size} against {other_right.size}.")
    only_own, only_other = int((own_right & ~other_right).sum()), int((other_right & ~own_right).sum())
    discordant = only_own + only_other
    p_value = float(stats.binomtest(only_own, discordant).pvalue) if discordant else 1.0
    return {"only_own": only_own, "only_other": only_other, "p_value": p_value}


def median_interval(values: np.ndarray, confidence: float = CONFIDENCE) -> Interval:
    """The median and the narrowest symmetric pair of order statistics with at least `confidence`.

    With fewer than 6 values no pair reaches 95 %: then it is all values, and `confidence` says what that is worth.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    n = len(ordered)
    # P(k-th smallest < median < k-th largest) = 1 - 2 P(Binomial(n, 1/2) <= k - 1)
    coverage = [1 - 2 * float(stats.binom.cdf(k - 1, n, 0.5)) for k in range(1, n // 2 + 1)] or [0.0]
    k = max([i for i, c in enumerate(coverage) if c >= confidence], default=0)
    return Interval(float(np.median(ordered)), float(ordered[k]), float(ordered[n - 1 - k]), coverage[k])
