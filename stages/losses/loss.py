"""What every supervised loss is."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stages.labels import LabelRelation
from stages.models.heads import Head

Measured = tuple[Tensor, dict[str, Tensor]]
"""The loss, and figures of this batch (scalars without gradient) that tell how the training goes."""

SOFTPLUS_FROM = 40.0
"""log(1 + exp(x)) is taken for x from here on: torch's own 20 leaves 2e-9."""


class OneLabelOnly(ValueError):
    """Several labels are given to a loss that learns from one."""

    exit_code = 6


@dataclass(frozen=True)
class Task:
    """What is to be learned.

    Attributes:
        embedding_size: D.
        class_counts: labelled training images of each class; a label is a position in it.
        relation: of images with several labels, which belong together; None: each has one.
        samples: labelled training images; None: as many as the counts say, with one label each.
    """

    embedding_size: int
    class_counts: tuple[int, ...]
    relation: LabelRelation | None = None
    samples: int | None = None

    @property
    def classes(self) -> int:
        return len(self.class_counts)


class Loss(nn.Module, ABC):
    """(embeddings [N, D], labels, progress) -> the loss of the global batch, and figures.

    Labels are int64 [N], one a row; or bool [N, classes], any number of labels a row, of losses that take several.

    A label below 0 (of several: no label) is of an image that is like no other: it is nobody's positive, and a negative
    of all others where the loss has use for such (`uses_negatives` of its settings).

    Within a process group the N rows are this process's equal share. The value is the mean over the rows of all
    processes, the same on every one, and backward leaves `processes` times its derivative, so that the averaging of
    gradients is exact. Computed in float32 (float64 if given) under any autocast.
    """

    takes_several_labels: bool = False
    """As `several_labels` of its settings."""
    value_at_a_point: float | None = None
    """What the loss is while all embeddings are one: a loss that stays there has collapsed."""

    @property
    def trained_head(self) -> Head | None:
        """What the loss trains along with the encoder to tell classes by, if anything."""
        return None

    def forward(self, embeddings: Tensor, labels: Tensor, progress: float) -> Measured:
        """progress: share of the training's steps that are done, 0 to 1; for what is ramped.

        Raises:
            OneLabelOnly: several labels a row, and the loss learns from one.
        """
        if labels.ndim > 1 and not self.takes_several_labels:
            raise OneLabelOnly(f"{type(self).__name__} learns from one label a sample, int64 [N], not from several")
        with torch.autocast(embeddings.device.type, enabled=False):
            return self.measure(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), labels, progress)

    @abstractmethod
    def measure(self, embeddings: Tensor, labels: Tensor, progress: float) -> Measured: ...
