"""Supervised InfoNCE: one pair of each class, and the other classes' pairs as negatives."""

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.losses.figures import distance_figures
from stages.losses.gather import gather_rows, mean_over_processes, world
from stages.losses.label_groups import turns_in_groups
from stages.losses.loss import Loss, Measured, Task
from stages.losses.pairwise import LEAST_LOG, at_least_one


class NPairs(Loss):
    """N-pair loss (Sohn 2016, equation 6) over cosines at a temperature: each anchor is to find its positive among the
    positives of all classes of the batch.

    It is what the Keras example "Metric learning for image similarity search" trains (temperature 0.2). The first image
    of a class in the global batch is its anchor, the second its positive; the third and fourth, if there are, make a
    pair of another round, and so on. A round has one pair a class, and its own positives as negatives. An image that is
    left over does not count.
    """

    def __init__(self, task: Task, temperature: float):
        super().__init__()
        self.temperature = temperature

    def measure(self, embeddings: Tensor, labels: Tensor, progress: float) -> Measured:
        rows = F.normalize(embeddings, dim=1)
        columns, column_labels = gather_rows(rows), gather_rows(labels)
        turns = turns_in_groups(column_labels)
        mine = turns[world()[0] * len(rows) :][: len(rows)]
        positives = ((turns % 2 == 1) & (column_labels >= 0)).nonzero()[:, 0]
        anchors = (mine % 2 == 0).nonzero()[:, 0]
        same_round = mine[anchors, None] + 1 == turns[positives]  # [anchors, positives]
        own = same_round & (labels[anchors, None] == column_labels[positives])  # one at most in a row
        found, target = own.nonzero().unbind(dim=1)
        similarities = rows[anchors[found]] @ columns[positives].T / self.temperature
        similarities = similarities.masked_fill(~same_round[found], LEAST_LOG)
        losses = F.cross_entropy(similarities, target, reduction="none")
        to_own = similarities.detach().gather(1, target[:, None])
        right = (similarities.detach() >= to_own).sum(dim=1) == 1  # none but the own one
        sums = torch.stack([losses.sum(), losses.new_tensor(len(losses)), right.sum().to(losses.dtype)])
        total, pairs, right_pairs = mean_over_processes(sums)
        figures = {
            "pair_accuracy": right_pairs.detach() / at_least_one(pairs),
            "idle": (pairs.detach() == 0).to(total.dtype),
        }
        return total / at_least_one(pairs), figures | distance_figures(embeddings, labels)
