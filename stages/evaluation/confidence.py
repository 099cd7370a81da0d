"""From which confidence on a classifier is to be believed: precision and coverage out of fold."""

import numpy as np

CURVE_POINTS = 50


def choose_confidence(confidences: np.ndarray, right: np.ndarray, precision: float) -> float | None:
    """The lowest confidence from which on at least `precision` of the answers are right; None: there is none.

    Of all that reach the precision it is the one that covers the most. It is one of `confidences`; answers of equal
    confidence are taken together.

    Args:
        confidences: float64 [N], of each answer.
        right: bool [N], whether the answer is right.
        precision: above 0, up to 1.
    """
    counts, hits, levels = _levels(confidences, right)
    reached = np.flatnonzero(hits / counts >= precision)
    return float(levels[reached[-1]]) if len(reached) else None


def confidence_curve(confidences: np.ndarray, right: np.ndarray) -> list[dict[str, float]]:
    """Precision and coverage (share of the answers) by threshold, the highest threshold first; at most CURVE_POINTS."""
    counts, hits, levels = _levels(confidences, right)
    picked = np.unique(np.linspace(0, len(levels) - 1, min(CURVE_POINTS, len(levels))).round().astype(np.int64))
    return [
        {"threshold": float(levels[at]), "precision": hits[at] / counts[at], "coverage": counts[at] / len(confidences)}
        for at in picked.tolist()
    ]


def precision_from(confidences: np.ndarray, right: np.ndarray, threshold: float) -> tuple[float | None, float]:
    """Of the answers of at least this confidence: the share that is right (None of none), and their share of all."""
    kept = confidences >= threshold
    return (float(right[kept].mean()) if kept.any() else None), float(kept.mean())


def _levels(confidences: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each different confidence, the highest first: answers from it on, how many are right, and itself."""
    order = np.argsort(-confidences, kind="stable")
    ordered = confidences[order]
    last = np.flatnonzero(np.append(ordered[1:] < ordered[:-1], True)) if len(ordered) else np.zeros(0, np.int64)
    return last + 1, np.cumsum(right[order])[last], ordered[last]
