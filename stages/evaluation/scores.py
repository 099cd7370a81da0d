"""Scores of predictions on test samples."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.evaluation.intervals import bootstrap_interval

CLASSES_FOR_TOP5 = 6
MOST_MATRIX_CLASSES = 200
"""Up to so many classes the confusions are written as a matrix; above, cell by cell, without those that are 0."""


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """The share of predictions, int64 [N], that are the label."""
    return (predicted == labels).double().mean().item()


def score(
    logits: Tensor, labels: Tensor, bootstrap_samples: int, seed: int, groups: np.ndarray | None = None
) -> dict[str, Any]:
    """Scores of test logits [N, C].

    Args:
        labels: int64 [N].
        groups: int64 [N], of which the interval draws whole ones; None: it draws samples.

    Returns:
        top1, top1_ci95, mean_per_class, top5 where there are classes enough, and either `confusion`, rows of [C, C]
        counts by label, columns by prediction, or `confusion_cells`, [label, prediction, count] for all above 0.
    """
    classes = logits.shape[1]
    predicted = logits.argmax(1)
    right = predicted == labels
    present = torch.bincount(labels, minlength=classes)
    hits = torch.bincount(labels[right], minlength=classes)
    known = present > 0
    scores: dict[str, Any] = {
        "top1": accuracy(predicted, labels),
        "top1_ci95": list(bootstrap_interval(right.numpy(), bootstrap_samples, seed, groups=groups)),
        "mean_per_class": (hits[known].double() / present[known]).mean().item(),
    }
    cells, counts = (labels * classes + predicted).unique(return_counts=True)
    if classes <= MOST_MATRIX_CLASSES:
        matrix = torch.zeros(classes**2, dtype=torch.int64)
        matrix[cells] = counts
        scores["confusion"] = matrix.view(classes, classes).tolist()
    else:
        scores["confusion_cells"] = torch.stack([cells // classes, cells % classes, counts], dim=1).tolist()
    if classes >= CLASSES_FOR_TOP5:
        own = logits.gather(1, labels[:, None])
        # Equal logits take turns, first class first; a class without training images is never among the five.
        ahead = (logits > own) | ((logits == own) & (torch.arange(classes) < labels[:, None]))
        scores["top5"] = ((ahead.sum(1) < 5) & own[:, 0].isfinite()).double().mean().item()
    return scores
