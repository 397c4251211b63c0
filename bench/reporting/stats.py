"""What the tables and comparisons compute from samples. Nothing here knows where the samples come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Samples = Sequence[float] | np.ndarray
# A bootstrap of fewer rounds than this is as narrow as luck makes it.
MIN_ROUNDS = 5


def quantile(samples: Sequence[float], q: float) -> float:
    """Linear between the order statistics."""
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def median(samples: Sequence[float]) -> float:
    return quantile(samples, 0.5)


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


@dataclass(frozen=True)
class Interval:
    """A confidence interval of a ratio."""

    low: float
    high: float

    def verdict(self, noise: float) -> int:
        """-1: the ratio is below 1; 1: above; 0: that cannot be said, or it is within the noise band around 1."""
        if self.low <= 1 <= self.high or (self.low >= 1 / (1 + noise) and self.high <= 1 + noise):
            return 0
        return -1 if self.high < 1 else 1


UNKNOWN = Interval(0.0, math.inf)


def median_interval(samples: Sequence[float], confidence: float) -> Interval:
    """Of the median of what the samples were drawn from: two order statistics, whose ranks are binomial.

    Exact for any distribution and free of randomness, so that pages generated from it are the same everywhere.
    """
    n, tail, rank = len(samples), 0.0, 0
    while (tail := tail + math.comb(n, rank) / 2**n) <= (1 - confidence) / 2:
        rank += 1
    if rank == 0:
        return UNKNOWN
    ordered = sorted(samples)
    return Interval(ordered[rank - 1], ordered[n - rank])


def _resampled(rounds: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of rounds, [resamples, rounds]: circular blocks, since neighbouring rounds share the machine's mood."""
    block = max(1, round(rounds ** (1 / 3)))
    starts = rng.integers(0, rounds, (resamples, -(-rounds // block)))
    return ((starts[:, :, None] + np.arange(block)) % rounds).reshape(resamples, -1)[:, :rounds]


def bootstrap(
    above: Samples, below: Samples, *, paired: bool, rng: np.random.Generator, resamples: int = 2000
) -> np.ndarray:
    """Resampled ratios of two sets of times.

    Paired samples belong to the same rounds: rounds are resampled, and the statistic is the median of their ratios.
    Samples of two runs share nothing: each is resampled by itself, and the statistic is the ratio of their medians.
    """
    a, b = np.asarray(above), np.asarray(below)
    if paired:
        return np.median((a / b)[_resampled(len(a), resamples, rng)], axis=1)
    first, second = (np.median(x[_resampled(len(x), resamples, rng)], axis=1) for x in (a, b))
    return first / second


def percentile_interval(resampled: np.ndarray, confidence: float) -> Interval:
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))
