"""Thresholds of confidence, against plain loops."""

import numpy as np
import pytest

from stages.evaluation import choose_confidence, confidence_curve, precision_from
from stages.evaluation.confidence import CURVE_POINTS


def answers(seed: int, count: int, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Confidences, many of them equal, and answers that are right about as often as those say."""
    random = np.random.default_rng(seed)
    confidences = random.integers(1, levels + 1, count) / levels
    return confidences, random.random(count) < confidences


def precision_and_coverage(confidences: np.ndarray, right: np.ndarray, threshold: float) -> tuple[float, float]:
    kept = [is_right for one, is_right in zip(confidences, right, strict=True) if one >= threshold]
    return sum(kept) / len(kept), len(kept) / len(confidences)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("count", "levels"), [(1, 1), (7, 3), (40, 8), (60, 1000)])
@pytest.mark.parametrize("precision", [0.5, 0.8, 0.95, 1.0])
def test_the_lowest_threshold_that_reaches_the_precision(seed: int, count: int, levels: int, precision: float) -> None:
    confidences, right = answers(seed, count, levels)
    found = [
        threshold
        for threshold in set(confidences.tolist())
        if precision_and_coverage(confidences, right, threshold)[0] >= precision
    ]
    assert choose_confidence(confidences, right, precision) == min(found, default=None)


def test_a_precision_of_exactly_so_many_is_reached() -> None:
    confidences = np.linspace(1, 0.5, 20)
    right = np.arange(20) != 3
    assert choose_confidence(confidences, right, 0.95) == 0.5
    assert choose_confidence(confidences, right, 1.0) == confidences[2]
    assert choose_confidence(confidences, ~right, 0.95) is None


@pytest.mark.parametrize(("count", "levels"), [(40, 8), (500, 10**9)])
def test_the_curve_is_precision_and_coverage_at_its_thresholds(count: int, levels: int) -> None:
    confidences, right = answers(1, count, levels)
    curve = confidence_curve(confidences, right)
    assert len(curve) == min(len(set(confidences.tolist())), CURVE_POINTS)
    thresholds = [point["threshold"] for point in curve]
    assert thresholds == sorted(thresholds, reverse=True)
    assert (thresholds[0], thresholds[-1]) == (confidences.max(), confidences.min())
    for point in curve:
        wanted = precision_and_coverage(confidences, right, point["threshold"])
        assert (point["precision"], point["coverage"]) == pytest.approx(wanted)
        assert precision_from(confidences, right, point["threshold"]) == pytest.approx(wanted)


def test_above_all_of_them_nothing_is_known_of_the_precision() -> None:
    assert precision_from(np.array([0.2, 0.4]), np.array([True, False]), 0.5) == (None, 0.0)
    assert confidence_curve(np.zeros(0), np.zeros(0, dtype=bool)) == []
