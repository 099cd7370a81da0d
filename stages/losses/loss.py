"""What every supervised loss is."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stages.models.heads import Head

Measured = tuple[Tensor, dict[str, Tensor]]
"""The loss, and figures of this batch (scalars without gradient) that tell how the training goes."""

SOFTPLUS_FROM = 40.0
"""log(1 + exp(x)) is taken for x from here on: torch's own 20 leaves 2e-9."""


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

    A label below 0 is of an image that is like no other: it is nobody's positive, and a negative of all others where
    the loss has use for such (`uses_negatives` of its settings).

    Within a process group the N rows are this process's equal share. The value is the mean over the rows of all
    processes, the same on every one, and backward leaves `processes` times its derivative, so that the averaging of
    gradients is exact. Computed in float32 (float64 if given) under any autocast.
    """

    value_at_a_point: float | None = None
    """What the loss is while all embeddings are one: a loss that stays there has collapsed."""

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
