"""Standard errors and confidence intervals of scores.

A score is a ratio of two sums over examples, sum(values) / sum(weights). For accuracy all weights are 1, so
it is a mean; for the nats per token of a text, values are nats and weights tokens.
"""

import math
from collections.abc import Sequence

import numpy as np


def ratio(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float | None]:
    """Returns (sum(values) / sum(weights), its standard error; None for a single example).

    The error is that of a ratio estimator (Cochran 1977, "Sampling Techniques", section 2.11); with equal
    weights it is the usual standard error of the mean. ValueError if there is nothing to divide by.
    """
    n, total = len(values), math.fsum(weights)
    if total <= 0:
        raise ValueError("a score of no examples")
    mean = math.fsum(values) / total
    if n < 2:
        return mean, None
    squares = math.fsum((v - mean * w) ** 2 for v, w in zip(values, weights, strict=True))
    return mean, math.sqrt(squares * n / (n - 1)) / total


N_RESAMPLES = 10_000


def bootstrap(values: np.ndarray, weights: np.ndarray, seed: int = 0) -> np.ndarray:
    """Scores on samples drawn from the examples with replacement: values, weights [n, k] -> [N_RESAMPLES, k].

    The k columns, such as models, are scored on the same samples, so their differences are paired (Efron &
    Tibshirani 1993, "An Introduction to the Bootstrap", chapter 6; Koehn 2004, section 3).
    """
    rows = np.concatenate([values, weights], axis=1).astype(np.float64)
    # Examples with the same numbers are drawn together: two models that are right or wrong make four kinds.
    kinds, counts = np.unique(rows, axis=0, return_counts=True)
    chance, size = np.random.default_rng(seed), max(1, (1 << 22) // len(kinds))  # at most 32 MB at once
    sums = [
        chance.multinomial(len(rows), counts / len(rows), size=min(size, N_RESAMPLES - first)) @ kinds
        for first in range(0, N_RESAMPLES, size)
    ]
    totals = np.concatenate(sums)
    return totals[:, : values.shape[1]] / totals[:, values.shape[1] :]


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The 95 % confidence interval: the range of samples without the lowest and the highest 2.5 %."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)
