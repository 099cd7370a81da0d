"""Losses of given pairs: rows 2 i and 2 i + 1 of a process are a pair (`stages/images/pairs.py` draws them)."""

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.losses.figures import distance_figures
from stages.losses.gather import mean_over_processes
from stages.losses.loss import Loss, Measured, Task
from stages.models.heads import Head, HeadKind, PairHead, build_head


class PairLoss(Loss):
    """A loss of pairs.

    What it is told are labels, int64 [2 P]: the target of a pair is then 1 for two of one class, 0 for others. Or it is
    told the targets themselves, floats [P] from 0 to 1.

    The figure `pair_accuracy` is the share of pairs that are on the same side of one half as their targets.
    """

    def measure(self, embeddings: Tensor, labels: Tensor, progress: float) -> Measured:
        is_graded = labels.is_floating_point()
        targets = labels if is_graded else pair_targets(labels)
        loss, figures = self.measure_pairs(embeddings[0::2], embeddings[1::2], targets.to(embeddings.dtype))
        return loss, figures if is_graded else figures | distance_figures(embeddings, labels)

    @abstractmethod
    def measure_pairs(self, left: Tensor, right: Tensor, targets: Tensor) -> Measured:
        """[P, D], [P, D], [P] -> the loss and figures."""


class PairClassifier(PairLoss):
    """Binary cross-entropy of a head that is shown two embeddings (Siamese networks: Bromley et al. 1993, Koch et al.
    2015): are they of one class? A graded target is taken for the probability that they are, and the least loss is then
    the entropy of the targets.

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

    def measure_pairs(self, left: Tensor, right: Tensor, targets: Tensor) -> Measured:
        assert isinstance(self.head, PairHead)
        scores = self.head(left, right)
        loss = mean_over_processes(F.binary_cross_entropy_with_logits(scores, targets))
        with torch.no_grad():
            is_right = ((scores > 0) == (targets > 0.5)).to(scores.dtype).mean()
            asymmetry = (scores.sigmoid() - self.head(right, left).sigmoid()).abs().mean()
            figures = mean_over_processes(torch.stack([is_right, asymmetry]))
        return loss, {"pair_accuracy": figures[0], "asymmetry": figures[1]}


class PairsConcatenated(PairClassifier):
    """The head sees both embeddings side by side; f(a, b) is not f(b, a)."""

    def __init__(self, task: Task):
        super().__init__(task, "concatenated")


class PairsDifference(PairClassifier):
    """The head sees |a - b|."""

    def __init__(self, task: Task):
        super().__init__(task, "difference")


class PairsCosine(PairLoss):
    """Mean square of cosine minus target: 1 for two of one class, 0 for others, or graded (as in sentence-transformers'
    CosineSimilarityLoss; Reimers and Gurevych 2019, section 3)."""

    def __init__(self, task: Task):
        super().__init__()

    def measure_pairs(self, left: Tensor, right: Tensor, targets: Tensor) -> Measured:
        cosines = F.cosine_similarity(left, right, dim=1)
        loss = mean_over_processes(F.mse_loss(cosines, targets))
        is_right = ((cosines.detach() > 0.5) == (targets > 0.5)).to(cosines.dtype).mean()
        return loss, {"pair_accuracy": mean_over_processes(is_right)}


def pair_targets(labels: Tensor) -> Tensor:
    """Whether the two of each pair are of one class: int64 [2 P] -> bool [P]"""
    return (labels[0::2] == labels[1::2]) & (labels[0::2] >= 0)
