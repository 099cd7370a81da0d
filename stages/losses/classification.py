"""Losses of a linear classifier on the embeddings."""

import torch.nn.functional as F
from torch import Tensor

from stages.losses.loss import ClassificationLoss, Task


class CrossEntropy(ClassificationLoss):
    """Softmax cross-entropy with smoothed labels (Szegedy et al. 2016, section 7).

    Args:
        label_smoothing: share of the target that is spread over all classes.
    """

    def __init__(self, task: Task, label_smoothing: float):
        super().__init__(task, "linear")
        self.label_smoothing = label_smoothing

    def row_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)
