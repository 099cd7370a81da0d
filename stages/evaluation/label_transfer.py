"""Labels of the nearest training image in place of a classifier's, where the two images are nearly the same.

So did the winner of the Human Protein Atlas image classification challenge (bestfitting, 2019): above a cosine
threshold, here one that is chosen on training images, out of fold.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.evaluation.label_scores import Counts, count, difference_interval


@dataclass(frozen=True)
class Nearest:
    """Of each image its nearest training image: cosine [N], and the labels of that one, bool [N, C]."""

    similarity: np.ndarray
    labels: np.ndarray

    def overwrite(self, predicted: np.ndarray, threshold: float) -> np.ndarray:
        """Predictions, bool [N, C], with the neighbour's labels where the cosine is at least the threshold."""
        return np.where(self.similarity[:, None] >= threshold, self.labels, predicted)


def choose_cosine(nearest: Nearest, predicted: np.ndarray, targets: np.ndarray) -> float:
    """The cosine threshold of the highest macro F1, the largest of equals; infinite where overwriting never helps.

    Args:
        nearest, predicted: of training images, out of fold: neighbours of other folds, labels bool [N, C] that models
            fitted on other folds gave.
        targets: bool [N, C].
    """
    order = np.argsort(-nearest.similarity, kind="stable")
    ranked = nearest.similarity[order].astype(np.float64)
    truth, before, after = targets[order], predicted[order], nearest.labels[order]
    named = np.cumsum(after.astype(np.int32) - before, axis=0) + before.sum(0)
    hits = np.cumsum((after & truth).astype(np.int32) - (before & truth), axis=0) + (before & truth).sum(0)
    macro = np.asarray(Counts(np.broadcast_to(truth.sum(0), hits.shape), named, hits).macro_f1)  # [N]
    macro[:-1][ranked[:-1] == ranked[1:]] = -1
    if macro.max() <= float(count(before, truth).macro_f1) + 1e-12:
        return float("inf")
    last = int(np.argmax(macro >= macro.max() - 1e-12))
    if last == len(ranked) - 1:
        return float(ranked[last])
    middle = (ranked[last] + ranked[last + 1]) / 2
    return float(middle if middle > ranked[last + 1] else ranked[last])


def transfer_figures(
    nearest: Nearest,
    predicted: np.ndarray,
    targets: np.ndarray,
    threshold: float,
    bootstrap_samples: int,
    seed: int,
    groups: np.ndarray | None = None,
) -> dict[str, Any]:
    """What overwriting did to test predictions: how many samples, and the scores before and after.

    A sample is right where exactly its labels were named.
    """
    overwritten = nearest.overwrite(predicted, threshold)
    right, right_after = ((one == targets).all(1) for one in (predicted, overwritten))
    before, after = count(predicted, targets), count(overwritten, targets)
    return {
        "threshold": threshold if np.isfinite(threshold) else None,
        "above_threshold": int((nearest.similarity >= threshold).sum()),
        "changed": int((overwritten != predicted).any(1).sum()),
        "right_to_wrong": int((right & ~right_after).sum()),
        "wrong_to_right": int((~right & right_after).sum()),
        "before": {
            "macro_f1": float(before.macro_f1),
            "micro_f1": float(before.micro_f1),
            "right": float(right.mean()),
        },
        "after": {
            "macro_f1": float(after.macro_f1),
            "micro_f1": float(after.micro_f1),
            "right": float(right_after.mean()),
        },
        "macro_f1_gain_ci95": list(
            difference_interval(predicted, overwritten, targets, bootstrap_samples, seed, groups)
        ),
    }
