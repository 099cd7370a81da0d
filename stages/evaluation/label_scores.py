"""Scores of predictions on test samples that have several labels each.

A mean over labels (macro) is over those that a test sample has: others have neither precision nor recall to speak of.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from stages.evaluation.intervals import interval_of, resamplings


def average_precision(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Of each label: the sum over thresholds of the recall gained times the precision there.

    As scikit-learn's average_precision_score: nothing is interpolated, and equal scores are one threshold.

    Args:
        scores: [N, C].
        targets: bool [N, C].

    Returns:
        float64 [C]; NaN for a label that no sample has.
    """
    return _Ranked(scores, targets).average_precision(np.ones((1, len(scores)), dtype=np.int32))[0]


class _Ranked:
    """Samples in the order of their scores, label by label, to be counted again and again."""

    def __init__(self, scores: np.ndarray, targets: np.ndarray):
        self._labels = []
        for column, truth in zip(np.asarray(scores, dtype=np.float64).T, targets.T, strict=True):
            order = np.argsort(-column, kind="stable")
            ranked, positives = column[order], np.flatnonzero(truth[order])
            # The last of those whose score is that of the positive.
            last = np.searchsorted(-ranked, -ranked[positives], side="right") - 1
            self._labels.append((order, positives, last))

    def average_precision(self, times: np.ndarray) -> np.ndarray:
        """Where each sample counts `times`, int32 [B, N]: float64 [B, C]; NaN for a label that no sample has."""
        found = np.full((len(times), len(self._labels)), np.nan)
        for label, (order, positives, last) in enumerate(self._labels):
            if not len(positives):
                continue
            # Below the last positive there is nothing to gain.
            above = np.cumsum(times[:, order[: last[-1] + 1]], axis=1, dtype=np.int32)[:, last]  # [B, P]
            own = times[:, order[positives]]
            hits = np.cumsum(own, axis=1, dtype=np.int32)
            # Positives of equal score are passed together.
            hits = hits[:, np.searchsorted(last, last, side="right") - 1]
            total = own.sum(1)
            gained = (own * (hits / np.maximum(above, 1))).sum(1)
            found[total > 0, label] = gained[total > 0] / total[total > 0]
        return found


@dataclass(frozen=True)
class Counts:
    """How often labels are there, are named, and both: [..., C] each."""

    positives: np.ndarray
    predicted: np.ndarray
    hits: np.ndarray

    @cached_property
    def f1(self) -> np.ndarray:
        """Of each label; NaN for one that no sample has."""
        return np.where(self.positives > 0, _divide(2 * self.hits, self.positives + self.predicted), np.nan)

    @property
    def macro_f1(self) -> np.ndarray:
        """Mean over the labels that a sample has: [...]."""
        return _mean(self.f1)

    @property
    def micro_f1(self) -> np.ndarray:
        """Over all pairs of sample and label: [...]."""
        return _divide(2 * self.hits.sum(-1), self.positives.sum(-1) + self.predicted.sum(-1))


def count(predicted: np.ndarray, targets: np.ndarray) -> Counts:
    """Of predictions and labels, bool [N, C] each."""
    return Counts(targets.sum(0), predicted.sum(0), (predicted & targets).sum(0))


def mean_average_precision(scores: np.ndarray, targets: np.ndarray) -> float:
    """Mean of `average_precision` over the labels that a sample has."""
    return float(_mean(average_precision(scores, targets)))


def score_labels(
    scores: np.ndarray,
    predicted: np.ndarray,
    targets: np.ndarray,
    bootstrap_samples: int,
    seed: int,
    groups: np.ndarray | None = None,
) -> dict[str, Any]:
    """Scores of test samples with intervals of 95%; see `bootstrap_means` for how samples or groups are drawn.

    In each resampling the macro means are over the labels that are there. The average precision of a rare label is
    higher in most resamplings than in the sample: one that is drawn twice is found twice at its rank.

    Args:
        scores: [N, C].
        predicted, targets: bool [N, C].

    Returns:
        map, map_ci95, macro_f1, macro_f1_ci95, micro_f1, micro_f1_ci95.
    """
    ranked, now = _Ranked(scores, targets), count(predicted, targets)
    drawn: dict[str, list[np.ndarray]] = {"map": [], "macro_f1": [], "micro_f1": []}
    for times in resamplings(len(scores), bootstrap_samples, seed, groups):
        counts = _count_times(times, predicted, targets)
        drawn["map"].append(_mean(ranked.average_precision(times)))
        drawn["macro_f1"].append(counts.macro_f1)
        drawn["micro_f1"].append(counts.micro_f1)
    values = {
        "map": mean_average_precision(scores, targets),
        "macro_f1": float(now.macro_f1),
        "micro_f1": float(now.micro_f1),
    }
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= {name: value, f"{name}_ci95": list(interval_of(np.concatenate(drawn[name])))}
    return found


def difference_interval(
    before: np.ndarray,
    after: np.ndarray,
    targets: np.ndarray,
    bootstrap_samples: int,
    seed: int,
    groups: np.ndarray | None = None,
) -> tuple[float, float]:
    """Interval of 95% of how much higher the macro F1 of one prediction is than that of another, on equal draws."""
    drawn = [
        _count_times(times, after, targets).macro_f1 - _count_times(times, before, targets).macro_f1
        for times in resamplings(len(targets), bootstrap_samples, seed, groups)
    ]
    return interval_of(np.concatenate(drawn))


def _count_times(times: np.ndarray, predicted: np.ndarray, targets: np.ndarray) -> Counts:
    """Where each sample counts `times` [B, N]: counts [B, C]. Exact: the sums of float32 stay below 2^24."""
    weights = times.astype(np.float32)
    return Counts(*(weights @ one.astype(np.float32) for one in (targets, predicted, predicted & targets)))


def label_table(
    classes: list[str],
    scores: np.ndarray,
    predicted: np.ndarray,
    targets: np.ndarray,
    train_positives: np.ndarray,
    thresholds: np.ndarray,
) -> list[dict[str, Any]]:
    """A row a label, those that the fewest training images have first; None for what is not defined."""
    counts, precisions = count(predicted, targets), average_precision(scores, targets)
    recall = _divide(counts.hits, counts.positives)
    precision = _divide(counts.hits, counts.predicted)
    return [
        {
            "name": classes[label],
            "train": int(train_positives[label]),
            "test": int(counts.positives[label]),
            "predicted": int(counts.predicted[label]),
            "precision": float(precision[label]) if counts.predicted[label] else None,
            "recall": float(recall[label]) if counts.positives[label] else None,
            "f1": float(counts.f1[label]) if counts.positives[label] else None,
            "average_precision": float(precisions[label]) if counts.positives[label] else None,
            "threshold": float(thresholds[label]) if np.isfinite(thresholds[label]) else None,
        }
        for label in np.lexsort((np.arange(len(classes)), train_positives)).tolist()
    ]


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """0 where there is nothing to divide by."""
    return numerator / np.maximum(denominator, 1)


def _mean(by_label: np.ndarray) -> np.ndarray:
    """Over the labels [..., C] that are not NaN; 0 where all are."""
    known = ~np.isnan(by_label)
    return np.where(known, by_label, 0).sum(-1) / np.maximum(known.sum(-1), 1)
