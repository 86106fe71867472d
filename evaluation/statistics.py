"""Standard errors and confidence intervals of scores.

A score is a ratio of two sums over examples, sum(values) / sum(weights). For accuracy all weights are 1, so
it is a mean; for the nats per token of a text, values are nats and weights tokens.
"""

import math
from collections.abc import Sequence


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
