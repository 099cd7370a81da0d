"""Several losses at once, and the bottleneck between those that compare embeddings and those that classify them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stages.losses.loss import Loss, Measured
from stages.models.heads import Head


class Part(NamedTuple):
    """One of several losses.

    Attributes:
        name: in a recipe.
        weight: what it counts.
        classifies: whether it works behind the bottleneck, where there is one.
    """

    name: str
    loss: Loss
    weight: float
    classifies: bool


class Combined(Loss):
    """A weighted sum of losses of the same rows.

    With a bottleneck (BN-neck: Luo et al. 2019, "Bag of tricks and a strong baseline for deep person
    re-identification", section 3.5) losses that classify see the embeddings through it, and those that compare see
    them in front of it.

    Of two figures of one name the second has its loss's name before it; `idle` is of any of them.
    """

    def __init__(self, parts: Sequence[Part], bottleneck: nn.Module | None):
        super().__init__()
        self.bottleneck = bottleneck
        self.losses = nn.ModuleDict({part.name: part.loss for part in parts})
        self._weights = {part.name: part.weight for part in parts}
        self.takes_several_labels = all(part.loss.takes_several_labels for part in parts)
        self._classifies = {part.name: part.classifies for part in parts}
        if len(parts) == 1:
            value = parts[0].loss.value_at_a_point
            self.value_at_a_point = None if value is None else parts[0].weight * value

    @property
    def trained_head(self) -> Head | None:
        """That of the first loss that has one."""
        heads = (loss.trained_head for loss in self.losses.values() if isinstance(loss, Loss))
        return next((head for head in heads if head is not None), None)

    def measure(self, embeddings: Tensor, labels: Tensor, progress: float) -> Measured:
        behind = embeddings if self.bottleneck is None else self.bottleneck(embeddings)
        total = embeddings.new_zeros(())
        figures: dict[str, Tensor] = {}
        for name, loss in self.losses.items():
            value, own = loss(behind if self._classifies[name] else embeddings, labels, progress)
            total = total + self._weights[name] * value
            if len(self.losses) > 1:
                figures[f"{name}_loss"] = value.detach()
            if "idle" in own and "idle" in figures:
                own["idle"] = torch.maximum(own["idle"], figures["idle"])
            taken = figures.keys() - {"idle", "positive_distance", "negative_distance"}
            figures |= {f"{name}_{figure}" if figure in taken else figure: found for figure, found in own.items()}
        return total, figures
