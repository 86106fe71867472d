"""Standard errors and intervals agree with other libraries, and hold what they promise."""

import math

import numpy as np
import pytest

from evaluation import statistics


def difference(values, seed=0):
    """The interval of column 1 minus column 0."""
    samples = statistics.bootstrap(values, np.ones_like(values), seed)
    return statistics.interval(samples[:, 1] - samples[:, 0])


def test_the_error_of_a_mean():
    values = np.random.default_rng(0).random(50)
    mean, error = statistics.ratio(values.tolist(), [1] * 50)
    assert mean == pytest.approx(values.mean(), rel=1e-12)
    assert error == pytest.approx(values.std(ddof=1) / math.sqrt(50), rel=1e-12)


def test_of_one_example_there_is_no_error_and_of_none_no_score():
    assert statistics.ratio([0.5], [1]) == (0.5, None)
    with pytest.raises(ValueError):
        statistics.ratio([], [])


def test_the_error_of_a_ratio_is_that_of_the_bootstrap():
    chance = np.random.default_rng(1)
    weights = chance.integers(1, 30, (400, 1)).astype(float)
    values = weights * chance.normal(2, 0.5, (400, 1))
    _, error = statistics.ratio(values[:, 0].tolist(), weights[:, 0].tolist())
    assert statistics.bootstrap(values, weights).std() == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize("kind", ["binary", "numbers"])
def test_intervals_are_those_of_scipy(kind):
    scipy = pytest.importorskip("scipy.stats")
    chance = np.random.default_rng(2)
    values = chance.random((300, 2)) if kind == "numbers" else (chance.random((300, 2)) < 0.7).astype(float)
    theirs = scipy.bootstrap((values[:, 1] - values[:, 0],), np.mean, n_resamples=10_000, method="percentile",
                             random_state=0).confidence_interval  # fmt: skip
    assert difference(values) == pytest.approx((theirs.low, theirs.high), abs=0.004)


def test_nineteen_of_twenty_intervals_hold_the_truth():
    chance, n, hits = np.random.default_rng(3), 150, 0
    for seed in range(150):
        # Both models are right where a question is easy; the second one is 10 points better elsewhere.
        easy = chance.random(n) < 0.5
        right = chance.random((n, 2)) < np.array([0.4, 0.6])
        low, high = difference((right | easy[:, None]).astype(float), seed)
        hits += low <= 0.1 <= high
    assert 0.9 <= hits / 150 <= 0.99


def test_pairs_stay_together():
    """Two models that answer alike are level, however hard the examples; unpaired, they would not be."""
    values = np.repeat((np.arange(100) % 3 == 0).astype(float)[:, None], 2, axis=1)
    assert difference(values) == (0, 0)
    values[0, 1] = 1 - values[0, 1]
    low, high = difference(values)
    assert -0.05 < low <= high <= 0


def test_the_seed_decides():
    values = np.random.default_rng(4).random((50, 1))
    first, again, other = (statistics.bootstrap(values, np.ones_like(values), seed) for seed in (1, 1, 2))
    assert first.shape == (statistics.N_RESAMPLES, 1)
    assert np.array_equal(first, again) and not np.array_equal(first, other)
