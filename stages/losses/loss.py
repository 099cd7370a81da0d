"""What every supervised loss is, and the arithmetic that they share."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.losses.gather import mean_over_processes
from stages.models.heads import Head, HeadKind, build_head

Measured = tuple[Tensor, dict[str, Tensor]]
"""The loss, and figures of this batch (scalars without gradient) that tell how the training goes."""


@dataclass(frozen=True)
class Task:
    """What is to be learned.

    Attributes:
        embedding_size: D.
        class_counts: labelled training images of each class; a label is a position in it.
    """

    embedding_size: int
    class_counts: tuple[int, ...]


class Loss(nn.Module, ABC):
    """(embeddings [N, D], labels [N], progress) -> the loss of the global batch, and figures.

    Within a process group the N rows are this process's equal share. The value is the mean over the rows of all
    processes, the same on every one, and backward leaves `processes` times its derivative, so that the averaging of
    gradients is exact. Computed in float32 (float64 if given) under any autocast.
    """

    @property
    def trained_head(self) -> Head | None:
        """What the loss trains along with the encoder to tell classes by, if anything."""
        return None

    def forward(self, embeddings: Tensor, labels: Tensor, progress: float) -> Measured:
        """progress: share of the training's steps that are done, 0 to 1; for what is ramped."""
        with torch.autocast(embeddings.device.type, enabled=False):
            return self.measure(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), labels, progress)

    @abstractmethod
    def measure(self, embeddings: Tensor, labels: Tensor, progress: float) -> Measured: ...


class ClassificationLoss(Loss):
    """A loss on the scores of a head."""

    def __init__(self, task: Task, head_kind: HeadKind):
        super().__init__()
        self.head = build_head(head_kind, task.embedding_size, len(task.class_counts))

    @property
    def trained_head(self) -> Head:
        return self.head

    def measure(self, embeddings: Tensor, labels: Tensor, progress: float) -> Measured:
        scores = self.head(embeddings)
        logits = self.logits(scores, labels, progress)
        loss = mean_over_processes(self.row_losses(logits, labels).mean())
        right = (scores.detach().argmax(dim=1) == labels).to(loss.dtype).mean()
        return loss, {"accuracy": mean_over_processes(right)}

    def logits(self, scores: Tensor, labels: Tensor, progress: float) -> Tensor:
        """What the softmax gets, from the scores [N, classes] that predict."""
        return scores

    def row_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """[N, classes], [N] -> [N]"""
        return F.cross_entropy(logits, labels, reduction="none")
