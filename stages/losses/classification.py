"""Losses on one score a class: softmax, logistic and focal, with weights for unequal classes."""

from abc import abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.labels import is_labelled
from stages.losses.gather import mean_over_processes, world
from stages.losses.loss import Loss, Measured, Task
from stages.models.heads import Head, HeadKind, build_head

ClassWeights = Literal["none", "effective_number"]


class ClassificationLoss(Loss):
    """A loss on the scores of a head. Images without a class do not count, unless the loss says otherwise."""

    def __init__(self, task: Task, head_kind: HeadKind, centres: int = 1, scale: float | None = None):
        super().__init__()
        self.head = build_head(head_kind, task.embedding_size, len(task.class_counts), centres, scale)

    @property
    def trained_head(self) -> Head:
        return self.head

    def measure(self, embeddings: Tensor, labels: Tensor, progress: float) -> Measured:
        is_known = is_labelled(labels)
        losses, right = self.losses_of_rows(
            embeddings, labels if labels.ndim > 1 else labels.clamp_min(0), is_known, progress
        )
        known = is_known.to(losses.dtype)
        counted = torch.ones_like(known) if self.counts_unknown else known
        rows, known_rows = mean_over_processes(torch.stack([counted.sum(), known.sum()])).clamp_min(1 / world()[1])
        loss = mean_over_processes((losses * counted).sum()) / rows
        return loss, {"accuracy": mean_over_processes((right.to(losses.dtype) * known).sum()) / known_rows}

    counts_unknown = False
    """Whether a row without a class has a loss: where each class is asked for by itself, it is none of them."""

    @abstractmethod
    def losses_of_rows(
        self, embeddings: Tensor, labels: Tensor, known: Tensor, progress: float
    ) -> tuple[Tensor, Tensor]:
        """[N, D], labels from 0 [N], whether they are known [N] -> losses [N], and whether the head was right [N]: the
        class with the highest score is the row's own, or of several labels one of them.

        Labels are bool [N, classes] where there are several, of losses that take them.
        """


class CrossEntropy(ClassificationLoss):
    """Softmax cross-entropy with smoothed labels (Szegedy et al. 2016, section 7).

    Args:
        class_weights: see `weights_of_classes`; a row counts as its class weighs.
        label_smoothing: share of the target that is spread over all classes.
    """

    def __init__(self, task: Task, class_weights: ClassWeights, label_smoothing: float):
        super().__init__(task, "linear")
        self.label_smoothing = label_smoothing
        self.register_buffer("weights", weights_of_classes(class_weights, task.class_counts), persistent=False)

    def losses_of_rows(
        self, embeddings: Tensor, labels: Tensor, known: Tensor, progress: float
    ) -> tuple[Tensor, Tensor]:
        scores = self.head(embeddings)
        losses = F.cross_entropy(scores, labels, reduction="none", label_smoothing=self.label_smoothing)
        return losses * self.get_buffer("weights").to(losses.dtype)[labels], scores.argmax(dim=1) == labels


class BinaryCrossEntropy(ClassificationLoss):
    """Logistic loss of each class by itself, summed over the classes: none of them is an answer too.

    Args:
        class_weights: see `weights_of_classes`; a class's loss counts as it weighs.
        scale: length that embeddings are brought to, 16 in the winning solution of the Humpback Whale competition;
            None: they keep theirs.
    """

    counts_unknown = True
    takes_several_labels = True

    def __init__(self, task: Task, class_weights: ClassWeights, scale: float | None = None):
        super().__init__(task, "linear", scale=scale)
        # Each class begins as likely as it is (Lin et al. 2017, section 4.1): of very many classes nearly all are wrong
        # for an image, and from one half down to there their sum would drown everything else for the first steps.
        counts = torch.tensor(task.class_counts, dtype=torch.float32).clamp_min(1)
        images = counts.sum() if task.samples is None else task.samples
        with torch.no_grad():
            self.head.get_parameter("bias").copy_((counts / (images + 1)).logit())
        self.register_buffer("weights", weights_of_classes(class_weights, task.class_counts), persistent=False)

    def losses_of_rows(
        self, embeddings: Tensor, labels: Tensor, known: Tensor, progress: float
    ) -> tuple[Tensor, Tensor]:
        scores = self.head(embeddings)
        best = scores.argmax(dim=1)
        if labels.ndim > 1:
            targets, right = labels.to(scores.dtype), labels.gather(1, best[:, None])[:, 0]
        else:
            targets, right = one_hot(scores, labels, known), best == labels
        losses = self.losses_of_scores(scores, targets)  # [N, classes]
        return (losses * self.get_buffer("weights").to(losses.dtype)).sum(dim=1), right

    def losses_of_scores(self, scores: Tensor, targets: Tensor) -> Tensor:
        """[N, classes], 0 or 1 [N, classes] -> [N, classes]"""
        return F.binary_cross_entropy_with_logits(scores, targets, reduction="none")


class Focal(BinaryCrossEntropy):
    """Focal loss (Lin et al. 2017, equations 4 and 5): the logistic loss of a class times (1 - p_t) ** gamma.

    p_t is the probability that the model gives to what is true of the class; easy classes hardly count.

    Args:
        class_weights: see `weights_of_classes`.
        gamma: 0 is the logistic loss.
        alpha: weight of classes that are true; 1 - alpha of those that are not. None: both count alike.
    """

    def __init__(self, task: Task, class_weights: ClassWeights, gamma: float, alpha: float | None):
        super().__init__(task, class_weights)
        self.gamma, self.alpha = gamma, alpha

    def losses_of_scores(self, scores: Tensor, targets: Tensor) -> Tensor:
        logistic = F.binary_cross_entropy_with_logits(scores, targets, reduction="none")  # -log p_t
        # log(1 - p_t) from the score itself: where p_t is nearly 1, 1 - p_t would be rounded.
        losses = (self.gamma * F.logsigmoid(torch.where(targets > 0, -scores, scores))).exp() * logistic
        if self.alpha is None:
            return losses
        return losses * torch.where(targets > 0, self.alpha, 1 - self.alpha)


def one_hot(scores: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """1 where a class is the row's own, 0 elsewhere and in rows without a class: [N, classes]."""
    return torch.zeros_like(scores).scatter_(1, labels[:, None], known[:, None].to(scores.dtype))


def weights_of_classes(kind: ClassWeights, class_counts: tuple[int, ...], beta: float = 0.999) -> Tensor:
    """A weight for each class, 1 on average; float64 [classes].

    `effective_number`: (1 - beta) / (1 - beta ** n) of a class of n images (Cui et al. 2019, "Class-balanced loss based
    on effective number of samples", equation 4); a class without images counts as one of one image.
    """
    if kind == "none":
        return torch.ones(len(class_counts), dtype=torch.float64)
    counts = torch.tensor(class_counts, dtype=torch.float64).clamp_min(1)
    weights = (1 - beta) / (1 - beta**counts)
    return weights / weights.mean()
