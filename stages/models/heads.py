"""What a loss puts on top of an encoder: embeddings -> one score a class, or one for each pair."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HeadKind = Literal["linear", "prototypes", "concatenated", "difference"]
LINEAR_DEVIATION = 0.01  # of the weights at the start, as google-research/simclr


class Head(nn.Module, ABC):
    """[N, D] -> [N, classes]; of pairs, see `PairHead`.

    Attributes:
        classes: 0 of a head of pairs.
        centres: directions of each class.
        scale: length that embeddings are brought to; None: they keep theirs.
    """

    kind: ClassVar[HeadKind]
    classes: int = 0
    centres: int = 1
    scale: float | None = None


class Linear(Head):
    """A weight for each class and dimension, a bias for each class; of unit vectors times `scale` where it is given."""

    kind = "linear"

    def __init__(self, embedding_size: int, classes: int, scale: float | None = None):
        super().__init__()
        self.classes, self.scale = classes, scale
        self.weight = nn.Parameter(LINEAR_DEVIATION * torch.randn(classes, embedding_size))
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, embeddings: Tensor) -> Tensor:
        """[N, D] -> [N, classes]"""
        if self.scale is not None:
            embeddings = self.scale * F.normalize(embeddings, dim=1)
        return F.linear(embeddings, self.weight, self.bias)


class Prototypes(Head):
    """Directions for each class; the score is the cosine to the nearest. weight: [classes x centres, D], any length."""

    kind = "prototypes"

    def __init__(self, embedding_size: int, classes: int, centres: int = 1):
        super().__init__()
        self.classes, self.centres = classes, centres
        self.weight = nn.Parameter(torch.randn(classes * centres, embedding_size) / embedding_size**0.5)

    def forward(self, embeddings: Tensor) -> Tensor:
        """[N, D] of any length -> [N, classes], cosines"""
        cosines = F.normalize(embeddings, dim=1) @ F.normalize(self.weight, dim=1).T
        return cosines if self.centres == 1 else cosines.unflatten(1, (self.classes, self.centres)).max(dim=2).values


class PairHead(Head):
    """[N, D], [N, D] -> one score a pair [N]: above 0, both are of one class."""

    @abstractmethod
    def forward(self, left: Tensor, right: Tensor) -> Tensor: ...

    def probability(self, left: Tensor, right: Tensor) -> Tensor:
        """That both are of one class, [N]: the mean over both orders, so that it does not matter which comes first."""
        return (self(left, right).sigmoid() + self(right, left).sigmoid()) / 2

    @abstractmethod
    def parts(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """What each embedding adds to scores as the first of a pair, and as the second: [N, D] -> [N, H] twice.

        Of many pairs of few embeddings, this is done once for each embedding and only `score_parts` for each pair.
        """

    @abstractmethod
    def score_parts(self, first: Tensor, second: Tensor) -> Tensor:
        """[P, H], [P, H] -> the score of each pair, [P]: of `parts` that of `forward`, but for rounding."""


class Concatenated(PairHead):
    """Two embeddings side by side, a hidden layer, a score; which one comes first matters."""

    kind = "concatenated"

    def __init__(self, embedding_size: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 * embedding_size, embedding_size), nn.ReLU(), nn.Linear(embedding_size, 1)
        )

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.layers(torch.cat([left, right], dim=1))[:, 0]

    def parts(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        hidden, *_ = self.layers
        assert isinstance(hidden, nn.Linear)
        left, right = hidden.weight.chunk(2, dim=1)
        return F.linear(embeddings, left, hidden.bias), F.linear(embeddings, right)

    def score_parts(self, first: Tensor, second: Tensor) -> Tensor:
        return self.layers[1:](first + second)[:, 0]


class Difference(PairHead):
    """A weight for each dimension of |a - b|, and a bias."""

    kind = "difference"

    def __init__(self, embedding_size: int):
        super().__init__()
        self.linear = nn.Linear(embedding_size, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.linear((left - right).abs())[:, 0]

    def parts(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        return embeddings, embeddings

    def score_parts(self, first: Tensor, second: Tensor) -> Tensor:
        return self(first, second)


def build_head(
    kind: HeadKind, embedding_size: int, classes: int = 0, centres: int = 1, scale: float | None = None
) -> Head:
    """A new head; its weights are drawn from torch's global generator."""
    match kind:
        case "linear":
            return Linear(embedding_size, classes, scale)
        case "prototypes":
            return Prototypes(embedding_size, classes, centres)
        case "concatenated":
            return Concatenated(embedding_size)
    return Difference(embedding_size)
