"""Triplet loss with the hardest positive and the hardest negative of the batch for every anchor."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.losses.gather import gather_rows, mean_over_processes, world
from stages.losses.loss import Loss, Measured, Task

CHUNK_ROWS = 1024


class Mined(NamedTuple):
    """What was found for each anchor.

    Attributes:
        positive, negative: int64 [N], rows of the global batch.
        usable: bool [N], whether the anchor has a positive and a negative at all.
        sums: [4], over all pairs of an anchor and a positive: their distances, their number; and with a negative.
    """

    positive: Tensor
    negative: Tensor
    usable: Tensor
    sums: Tensor


class Triplet(Loss):
    """Batch-hard triplet loss (Hermans et al. 2017, equation 5) on unit vectors, by unsquared Euclidean distance.

    Every row of the global batch is an anchor. Rows without a positive or without a negative do not count.

    Args:
        margin: that the hardest negative is to be farther away than the hardest positive; `soft` puts
            log(1 + exp(x)) in place of max(0, margin + x).
    """

    def __init__(self, task: Task, margin: float | Literal["soft"]):
        super().__init__()
        self.margin = margin

    def measure(self, embeddings: Tensor, labels: Tensor, progress: float) -> Measured:
        rows = F.normalize(embeddings, dim=1)
        columns, column_labels = gather_rows(rows), gather_rows(labels)
        mined = mine_hardest(rows.detach(), labels, columns.detach(), column_labels)
        # Only what was mined is measured with a gradient, and by differences: exact where two rows are close.
        to_positive = _distances(rows, columns[mined.positive])
        to_negative = _distances(rows, columns[mined.negative])
        violation = to_positive - to_negative
        losses = F.softplus(violation) if self.margin == "soft" else (self.margin + violation).clamp_min(0)
        usable = mined.usable.to(rows.dtype)
        threshold = 0.0 if self.margin == "soft" else -self.margin
        active = (violation.detach() > threshold).to(rows.dtype)
        sums = torch.cat([torch.stack([usable.sum(), (active * usable).sum()]), mined.sums])
        # Of each process, on average; at least one in all.
        usable_rows, active_rows, positive_sum, positives, negative_sum, negatives = mean_over_processes(sums)
        usable_rows = usable_rows.clamp_min(1 / world()[1])
        loss = mean_over_processes((losses * usable).sum() / usable_rows)
        figures = {
            "active_triplets": active_rows / usable_rows,
            "positive_distance": positive_sum / positives.clamp_min(1 / world()[1]),
            "negative_distance": negative_sum / negatives.clamp_min(1 / world()[1]),
        }
        return loss, figures


@torch.no_grad()
def mine_hardest(rows: Tensor, labels: Tensor, columns: Tensor, column_labels: Tensor) -> Mined:
    """For each row the farthest column of its class, itself apart, and the nearest of another class.

    Args:
        rows, columns: unit vectors [N, D] and [processes x N, D], the rows being this process's share of the columns.
    """
    own = world()[0] * len(rows) + torch.arange(len(rows), device=rows.device)
    places, sums = [], rows.new_zeros(4)
    for part, part_labels, part_own in zip(
        rows.split(CHUNK_ROWS), labels.split(CHUNK_ROWS), own.split(CHUNK_ROWS), strict=True
    ):
        similarities = part @ columns.T  # [chunk, processes x N]
        same = part_labels[:, None] == column_labels
        positives = same.scatter(1, part_own[:, None], False)
        farthest = similarities.masked_fill(~positives, torch.inf).min(dim=1)
        nearest = similarities.masked_fill(same, -torch.inf).max(dim=1)
        usable = farthest.values.isfinite() & nearest.values.isfinite()
        places.append((farthest.indices, nearest.indices, usable))
        distances = similarities.mul_(-2).add_(2).clamp_min_(0).sqrt_()
        sums += torch.stack(
            [
                distances.masked_fill(~positives, 0).sum(),
                positives.sum(),
                distances.masked_fill(same, 0).sum(),
                (~same).sum(),
            ]
        )
    positive, negative, usable = (torch.cat(parts) for parts in zip(*places, strict=True))
    return Mined(positive, negative, usable, sums)


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    """[N, D], [N, D] -> Euclidean distances [N]; where two rows are one, the derivative is 0."""
    return torch.linalg.vector_norm(rows - others, dim=1)
