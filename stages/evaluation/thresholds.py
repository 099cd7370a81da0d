"""From scores of labels to labels: above which score an image is said to have a label.

All are chosen on scores of training images by models that were fitted without them (out of fold). An image has a label
where its score is at least the threshold; thresholds lie halfway between two scores.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

FEW_POSITIVES = 50
"""Images with a label below which its own best threshold is trusted in part only: by their number as a share of this
one. Yang 2001 (A study on thresholding strategies for text categorization) saw such thresholds overfit; the number was
not tuned."""

Kind = Literal["global", "per_class", "prevalence"]


@dataclass(frozen=True)
class Thresholds:
    """One threshold a label.

    Attributes:
        overall: the one for all labels that gives the highest macro F1.
        values: float64 [C], those that are used; infinite for a label that no training image has.
    """

    kind: Kind
    overall: float
    values: np.ndarray

    def apply(self, scores: np.ndarray) -> np.ndarray:
        """Scores [N, C] -> which labels images have, bool [N, C]."""
        return scores >= self.values


def choose_thresholds(kind: Kind, scores: np.ndarray, targets: np.ndarray, judged: np.ndarray) -> Thresholds:
    """Thresholds by scores out of fold [N, C] of images whose labels are bool [N, C].

    Args:
        judged: bool [C], some of them true: labels that images of two folds have. Scores of any other are of models
            that never saw it: it has no say, and the threshold of all.
        kind: `global`: one for all labels. `per_class`: for each label the one of its highest F1; with fewer than
            FEW_POSITIVES images a mean of it and the global one, which weighs it by their number / FEW_POSITIVES.
            `prevalence`: for each label the one that gives it to as many images as have it.
    """
    scores = np.asarray(scores, dtype=np.float64)
    positives = targets.sum(0)
    overall = global_threshold(scores[:, judged], targets[:, judged])
    values = np.full(scores.shape[1], overall)
    if kind != "global":
        for label in np.flatnonzero(judged).tolist():
            column = np.sort(scores[:, label])[::-1]
            if kind == "prevalence":
                values[label] = _cut(column, int(positives[label]))
            else:
                trust = min(1.0, positives[label] / FEW_POSITIVES)
                own = best_threshold(scores[:, label], targets[:, label])
                values[label] = trust * own + (1 - trust) * overall
    values[positives == 0] = np.inf
    return Thresholds(kind, overall, values)


def best_threshold(scores: np.ndarray, targets: np.ndarray) -> float:
    """The threshold of the highest F1 for one label, the largest of equals: [N], bool [N], some of them true."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    f1 = 2 * np.cumsum(targets[order]) / (np.arange(1, len(ranked) + 1) + targets.sum())
    f1[:-1][ranked[:-1] == ranked[1:]] = -1  # equal scores are on one side
    return _cut(ranked, 1 + int(f1.argmax()))


def global_threshold(scores: np.ndarray, targets: np.ndarray) -> float:
    """The one threshold for all labels of the highest macro F1, the largest of equals: [N, C], bool [N, C].

    Each label is one that some image has. All scores are passed from the highest down; each changes the F1 of its own
    label only.
    """
    order = np.argsort(-scores, axis=0, kind="stable")
    ranked = np.take_along_axis(scores, order, 0)
    hits = np.cumsum(np.take_along_axis(targets, order, 0), axis=0)
    f1 = 2 * hits / (np.arange(1, len(scores) + 1)[:, None] + targets.sum(0))
    gains = np.diff(f1, axis=0, prepend=0.0)
    # Of equal scores those of a label keep their order, in which their gains add up.
    passed = np.argsort(-ranked, axis=None, kind="stable")
    everything = ranked.ravel()[passed]
    macro = np.cumsum(gains.ravel()[passed])
    macro[:-1][everything[:-1] == everything[1:]] = -1
    # Sums in another order differ by rounding, which must not choose.
    return _cut(everything, 1 + int(np.argmax(macro >= macro.max() - 1e-12)))


def _cut(ranked: np.ndarray, count: int) -> float:
    """A threshold that the first `count` of descending scores reach, and no others but their equals."""
    last = float(ranked[count - 1])
    if count == len(ranked):
        return min(last, 0.0)
    middle = (last + float(ranked[count])) / 2
    return middle if ranked[count] < middle <= last else last
