"""What goes wrong with embeddings while they are trained: they end in one point, or nothing is left to learn from."""

from collections.abc import Mapping

import torch
from torch import Tensor

from stages.losses.figures import spread

LEAST_SPREAD = 1e-3
"""Embeddings with less are one point for all purposes: distances are some 3% of those of random ones."""
AT_A_POINT, NEARLY_A_POINT = 0.1, 0.02
"""How near, relatively, a loss is to its value at a point; with such a loss embeddings of less spread than the latter
are on their way there (those of untrained encoders have 0.07 to 0.5)."""
LOOKS = 3
"""In so many looks one after another before it is said."""


class Watch:
    """Looks at a batch now and then, and says once what seems wrong."""

    def __init__(self, loss: str, value_at_a_point: float | None):
        self._loss, self._value_at_a_point = loss, value_at_a_point
        self._collapsed = self._idle = 0
        self._said: set[str] = set()

    def look(self, embeddings: Tensor, loss: Tensor, figures: Mapping[str, Tensor]) -> Tensor:
        """The spread of the embeddings of all processes; every process must look at the same step."""
        found = spread(embeddings)
        self._value = float(loss)
        is_point = float(found) < (NEARLY_A_POINT if self._is_at_its_value else LEAST_SPREAD)
        idle = figures.get("idle", torch.zeros(()))
        self._collapsed = self._collapsed + 1 if is_point else 0
        self._idle = self._idle + 1 if float(idle) > 0 else 0
        return found

    @property
    def _is_at_its_value(self) -> bool:
        """Whether the loss is what it is at a point."""
        point = self._value_at_a_point
        return point is not None and abs(self._value - point) < AT_A_POINT * point

    def alarms(self) -> list[str]:
        """What has come up since the last time."""
        found = {}
        if self._collapsed >= LOOKS:
            where = ""
            if self._is_at_its_value:
                where = f", and the loss stays near {self._value_at_a_point:.4g}, its value there"
            found["collapsed"] = (
                f"the embeddings have collapsed to a point{where}: a lower learning rate, a longer warm-up, or easier "
                "pairs and triplets (mining: semi_hard) usually mend it"
            )
        if self._idle >= LOOKS:
            found["idle"] = (
                f"{self._loss} finds no pair or triplet to learn from in batch after batch: all are in order, or more "
                "images of each class in a batch, or another mining, would find some"
            )
        new = [alarm for kind, alarm in found.items() if kind not in self._said]
        self._said |= found.keys()
        return new
