"""What a classification loss puts on top of an encoder: embeddings -> one score a class."""

from abc import ABC
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HeadKind = Literal["linear", "prototypes"]
LINEAR_DEVIATION = 0.01  # of the weights at the start, as google-research/simclr


class Head(nn.Module, ABC):
    """[N, D] -> [N, classes]"""

    kind: ClassVar[HeadKind]
    classes: int


class Linear(Head):
    """A weight for each class and dimension, and a bias for each class."""

    kind = "linear"

    def __init__(self, embedding_size: int, classes: int):
        super().__init__()
        self.classes = classes
        self.weight = nn.Parameter(LINEAR_DEVIATION * torch.randn(classes, embedding_size))
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, embeddings: Tensor) -> Tensor:
        """[N, D] -> [N, classes]"""
        return F.linear(embeddings, self.weight, self.bias)


class Prototypes(Head):
    """A direction for each class; the score is the cosine. weight: [classes, D], of any length."""

    kind = "prototypes"

    def __init__(self, embedding_size: int, classes: int):
        super().__init__()
        self.classes = classes
        self.weight = nn.Parameter(torch.randn(classes, embedding_size) / embedding_size**0.5)

    def forward(self, embeddings: Tensor) -> Tensor:
        """[N, D] of any length -> [N, classes], cosines"""
        return F.normalize(embeddings, dim=1) @ F.normalize(self.weight, dim=1).T


HEADS: dict[HeadKind, type[Linear] | type[Prototypes]] = {"linear": Linear, "prototypes": Prototypes}


def build_head(kind: HeadKind, embedding_size: int, classes: int) -> Head:
    """A new head; its weights are drawn from torch's global generator."""
    return HEADS[kind](embedding_size, classes)
