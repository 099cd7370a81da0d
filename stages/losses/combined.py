"""Several losses at once, and the bottleneck between those that compare embeddings and those that classify them."""

from collections.abc import Sequence
from typing import NamedTuple

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
    """

    def __init__(self, parts: Sequence[Part], bottleneck: nn.Module | None):
        super().__init__()
        self.bottleneck = bottleneck
        self.losses = nn.ModuleDict({part.name: part.loss for part in parts})
        self._weights = {part.name: part.weight for part in parts}
        self._classifies = {part.name: part.classifies for part in parts}
        if len(parts) == 1:
            self.value_at_a_point = parts[0].loss.value_at_a_point

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
            figures |= own
        return total, figures
