"""Softmax over cosines to class prototypes, with a margin that the own class must win by."""

import math

import torch
from torch import Tensor

from stages.losses.loss import ClassificationLoss, Task

MANY_CLASSES = 1000
SCALE, SCALE_FOR_MANY_CLASSES = 16.0, 30.0


class ArcFace(ClassificationLoss):
    """Additive angular margin (Deng et al. 2019, equation 3): the own class scores cos(theta + margin).

    Args:
        scale: factor of all cosines; None: 16, or 30 above 1,000 classes.
        margin: radians, 0 to pi / 2, ramped linearly from 0.
        margin_ramp: share of the steps after which the margin is whole.
    """

    def __init__(self, task: Task, scale: float | None, margin: float, margin_ramp: float):
        super().__init__(task, "prototypes")
        many = len(task.class_counts) > MANY_CLASSES
        self.scale = scale if scale is not None else SCALE_FOR_MANY_CLASSES if many else SCALE
        self.margin, self.margin_ramp = margin, margin_ramp

    def logits(self, scores: Tensor, labels: Tensor, progress: float) -> Tensor:
        ramped = self.margin * min(1.0, progress / self.margin_ramp) if self.margin_ramp else self.margin
        own = labels[:, None]
        return self.scale * scores.scatter(1, own, add_angle(scores.gather(1, own), ramped))


def add_angle(cosines: Tensor, margin: float) -> Tensor:
    """cos(theta + margin) of cos(theta), with finite derivatives from -1 to 1.

    Where theta + margin would pass pi, and the cosine rise again, it goes on as cos(theta) - (1 - cos(margin)), which
    meets it there at -1: the result falls with theta everywhere, and an embedding opposite to its prototype is still
    pulled. There is no easy margin: the margin counts at every angle, above a right one as well.
    """
    # (1 - c) (1 + c) does not cancel as 1 - c^2 does. Below rounding the sine stands still: its slope has no bound.
    squared_sines = ((1 - cosines) * (1 + cosines)).clamp_min(4 * torch.finfo(cosines.dtype).eps)
    shifted = cosines * math.cos(margin) - squared_sines.sqrt() * math.sin(margin)
    return torch.where(cosines > -math.cos(margin), shifted, cosines - (1 - math.cos(margin)))
