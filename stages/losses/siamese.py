"""Losses of given pairs: rows 2 i and 2 i + 1 of a process are a pair (`stages/images/pairs.py` draws them)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.losses.figures import distance_figures
from stages.losses.gather import mean_over_processes
from stages.losses.loss import Loss, Measured, Task
from stages.models.heads import Head, HeadKind, PairHead, build_head


class PairClassifier(Loss):
    """Binary cross-entropy of a head that is shown two embeddings (Siamese networks: Bromley et al. 1993, Koch et al.
    2015): are they of one class?

    The figure `asymmetry` is the mean of |f(a, b) - f(b, a)|, f being a probability.

    Args:
        head: `concatenated` (Chopra-style joint classifier on both) or `difference` (on |a - b|, Koch et al. 2015).
    """

    def __init__(self, task: Task, head: HeadKind):
        super().__init__()
        self.head = build_head(head, task.embedding_size)

    @property
    def trained_head(self) -> Head:
        return self.head

    def measure(self, embeddings: Tensor, labels: Tensor, progress: float) -> Measured:
        assert isinstance(self.head, PairHead)
        (left, right), target = _pairs(embeddings), pair_targets(labels)
        scores = self.head(left, right)
        loss = mean_over_processes(F.binary_cross_entropy_with_logits(scores, target.to(scores.dtype)))
        with torch.no_grad():
            is_right = ((scores > 0) == target).to(scores.dtype).mean()
            asymmetry = (scores.sigmoid() - self.head(right, left).sigmoid()).abs().mean()
            figures = mean_over_processes(torch.stack([is_right, asymmetry]))
        return loss, {"pair_accuracy": figures[0], "asymmetry": figures[1]} | distance_figures(embeddings, labels)


class PairsConcatenated(PairClassifier):
    """The head sees both embeddings side by side; f(a, b) is not f(b, a)."""

    def __init__(self, task: Task):
        super().__init__(task, "concatenated")


class PairsDifference(PairClassifier):
    """The head sees |a - b|."""

    def __init__(self, task: Task):
        super().__init__(task, "difference")


class PairsCosine(Loss):
    """Mean square of cosine minus target: 1 for two of one class, 0 for others (as in sentence-transformers'
    CosineSimilarityLoss; Reimers and Gurevych 2019, section 3)."""

    def __init__(self, task: Task):
        super().__init__()

    def measure(self, embeddings: Tensor, labels: Tensor, progress: float) -> Measured:
        (left, right), target = _pairs(embeddings), pair_targets(labels)
        cosines = F.cosine_similarity(left, right, dim=1)
        loss = mean_over_processes(F.mse_loss(cosines, target.to(cosines.dtype)))
        is_right = mean_over_processes(((cosines.detach() > 0.5) == target).to(cosines.dtype).mean())
        return loss, {"pair_accuracy": is_right} | distance_figures(embeddings, labels)


def pair_targets(labels: Tensor) -> Tensor:
    """Whether the two of each pair are of one class: int64 [2 P] -> bool [P]"""
    return (labels[0::2] == labels[1::2]) & (labels[0::2] >= 0)


def _pairs(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    return embeddings[0::2], embeddings[1::2]
