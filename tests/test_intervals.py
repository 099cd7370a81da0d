"""The bootstrap interval against the normal approximation and a plain loop."""

import numpy as np
import pytest

from stages.evaluation import bootstrap_interval, intervals


def test_agrees_with_the_normal_approximation():
    right = np.arange(2000) < 1500
    low, high = bootstrap_interval(right, samples=4000, seed=0)
    half = 1.96 * np.sqrt(0.75 * 0.25 / 2000)
    assert low == pytest.approx(0.75 - half, abs=0.002)
    assert high == pytest.approx(0.75 + half, abs=0.002)


def test_equals_a_loop_with_the_same_draws(monkeypatch):
    values = np.random.default_rng(1).normal(size=31)
    random = np.random.Generator(np.random.PCG64(5))
    means = [values[random.integers(0, 31, 31)].mean() for _ in range(100)]
    expected = np.quantile(means, [0.05, 0.95])
    assert bootstrap_interval(values, 100, 5, level=0.9) == pytest.approx(tuple(expected))
    monkeypatch.setattr(intervals, "CHUNK_ELEMENTS", 100)  # several chunks draw the same
    assert bootstrap_interval(values, 100, 5, level=0.9) == pytest.approx(tuple(expected))


def test_seed_decides():
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap_interval(values, 100, seed=1) == bootstrap_interval(values, 100, seed=1)
    assert bootstrap_interval(values, 100, seed=1) != bootstrap_interval(values, 100, seed=2)


def test_certainty_has_no_width():
    assert bootstrap_interval(np.ones(10), 100) == (1.0, 1.0)


def test_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        low, high = bootstrap_interval(random.random(200) < 0.6, samples=200, seed=seed)
        covered += low <= 0.6 <= high
    assert 180 <= covered <= 198  # 190 expected


@pytest.mark.parametrize("values", [np.zeros(0), np.zeros((2, 2))])
def test_refuses_what_has_no_mean(values):
    with pytest.raises(ValueError, match="values"):
        bootstrap_interval(values)
