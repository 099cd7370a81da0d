"""Figures of a batch that tell how the training of embeddings goes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.labels import ANY_SHARED, LabelRelation, is_labelled
from stages.losses.gather import gather_rows, mean_over_processes, world
from stages.losses.label_groups import group_numbers

ROWS_AT_ONCE = 1024
"""Whose relation to all others is in memory."""


@torch.no_grad()
def distance_figures(embeddings: Tensor, labels: Tensor, relation: LabelRelation = ANY_SHARED) -> dict[str, Tensor]:
    """Root mean square distances of unit vectors over all pairs of the global batch, of one class and of two.

    They tell order (apart) from collapse (both near 0). A sum over pairs is a product with a sum: no pair is looked at,
    unless there are several labels a row.

    Args:
        embeddings: [N, D] of this process, of any length.
        labels: int64 [N]; rows below 0 are negatives of all others, and no pairs among themselves. Or bool
            [N, classes], likewise with rows that have no label.
        relation: of several labels; pairs that belong together are those of one class.
    """
    if labels.ndim > 1:
        return _figures_of_several(embeddings, labels, relation)
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


def _figures_of_several(embeddings: Tensor, labels: Tensor, relation: LabelRelation) -> dict[str, Tensor]:
    """The same by pairs: which belong together is no matter of groups."""
    rows = F.normalize(embeddings, dim=1)
    columns, column_labels = gather_rows(rows), gather_rows(labels)
    own = world()[0] * len(rows) + torch.arange(len(rows), device=rows.device)
    sums = rows.new_zeros(4)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        together = relation.between(labels[part], column_labels)
        apart = ~together & is_labelled(labels[part])[:, None]
        together.scatter_(1, own[part, None], False)
        for place, mask in enumerate((together, apart)):
            chosen = mask.to(rows.dtype)
            sums[2 * place] += chosen.sum()
            sums[2 * place + 1] += ((chosen @ columns) * rows[part]).sum()
    positives, positive_similarity, negatives, negative_similarity = mean_over_processes(sums) * world()[1]
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
