"""Figures of a batch that tell how the training of embeddings goes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.losses.gather import gather_rows
from stages.losses.label_groups import group_numbers


@torch.no_grad()
def distance_figures(embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Root mean square distances of unit vectors over all pairs of the global batch, of one class and of two.

    They tell order (apart) from collapse (both near 0). A sum over pairs is a product with a sum: no pair is looked at.

    Args:
        embeddings: [N, D] of this process, of any length.
        labels: int64 [N]; rows below 0 are negatives of all others, and no pairs among themselves.
    """
    rows, labels = F.normalize(gather_rows(embeddings), dim=1), gather_rows(labels)
    groups, known = group_numbers(labels), (labels >= 0).to(rows.dtype)
    squares = rows.square().sum(dim=1)  # 1, or 0 where an embedding is
    sums = torch.zeros_like(rows).index_add(0, groups, rows)
    sizes = torch.zeros_like(squares).index_add(0, groups, torch.ones_like(squares))[groups]
    positives = ((sizes - 1) * known).sum()
    positive_similarity = (((rows * sums[groups]).sum(dim=1) - squares) * known).sum()
    negatives = ((len(rows) - sizes) * known).sum()
    negative_similarity = ((rows * (rows.sum(dim=0) - sums[groups])).sum(dim=1) * known).sum()
    return {
        "positive_distance": _distance(positive_similarity, positives),
        "negative_distance": _distance(negative_similarity, negatives),
    }


@torch.no_grad()
def spread(embeddings: Tensor) -> Tensor:
    """1 - |mean of the unit vectors|^2 over the global batch: 0 where all are one, 1 where they point everywhere."""
    return 1 - F.normalize(gather_rows(embeddings).float(), dim=1).mean(dim=0).square().sum()


def _distance(similarity: Tensor, pairs: Tensor) -> Tensor:
    """Root of the mean of 2 - 2 s; 0 without pairs."""
    mean = (2 * pairs - 2 * similarity).clamp_min(0) / pairs.clamp_min(1)
    return mean.sqrt()
