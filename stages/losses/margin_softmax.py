"""Softmax over cosines to class prototypes, with a margin that the own class must win by."""

import math
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.losses.classification import ClassificationLoss
from stages.losses.loss import SOFTPLUS_FROM, Task
from stages.losses.prototype_softmax import sums_over_classes

MANY_CLASSES = 1000
SCALE, SCALE_FOR_MANY_CLASSES = 16.0, 30.0


class MarginSoftmax(ClassificationLoss):
    """Cross-entropy of scaled cosines, of which the own one is made smaller first.

    Args:
        scale: factor of all cosines; None: 16, or 30 above 1,000 classes.
        margin_ramp: share of the steps after which the margin, which grows linearly, is whole.
        centres: prototypes of each class, of which the nearest counts.
    """

    def __init__(self, task: Task, scale: float | None, margin_ramp: float, centres: int = 1):
        super().__init__(task, "prototypes", centres)
        many = len(task.class_counts) > MANY_CLASSES
        self.scale = scale if scale is not None else SCALE_FOR_MANY_CLASSES if many else SCALE
        self.margin_ramp = margin_ramp

    def losses_of_rows(
        self, embeddings: Tensor, labels: Tensor, known: Tensor, progress: float
    ) -> tuple[Tensor, Tensor]:
        ramped = min(1.0, progress / self.margin_ramp) if self.margin_ramp else 1.0
        if self.head.centres == 1:
            weight = self.head.get_parameter("weight").to(embeddings.dtype)
            others, own, nearest = sums_over_classes(embeddings, weight, labels, self.scale)
        else:
            cosines = self.head(embeddings)
            own = cosines.gather(1, labels[:, None])[:, 0]
            rest = cosines.scatter(1, labels[:, None], -torch.inf)
            others, nearest = (self.scale * rest).logsumexp(dim=1), rest.detach().amax(dim=1)
        losses = F.softplus(others - self.scale * self.with_margin(own, ramped), threshold=SOFTPLUS_FROM)
        return losses, own.detach() > nearest

    @abstractmethod
    def with_margin(self, cosines: Tensor, ramped: float) -> Tensor:
        """Own cosines [N] -> smaller ones; ramped: the share of the margin that holds, 0 to 1."""


class ArcFace(MarginSoftmax):
    """Additive angular margin (Deng et al. 2019, equation 3): the own class scores cos(theta + margin).

    With `centres` above 1 it is sub-centre ArcFace (Deng et al. 2020, "Sub-center ArcFace", equation 3): the angle is
    that to the nearest of them, so that a noisy part of a class may gather around a centre of its own.

    Args:
        margin: radians, 0 to pi / 2.
    """

    def __init__(self, task: Task, scale: float | None, margin: float, margin_ramp: float, centres: int = 1):
        super().__init__(task, scale, margin_ramp, centres)
        self.margin = margin

    def with_margin(self, cosines: Tensor, ramped: float) -> Tensor:
        return add_angle(cosines, self.margin * ramped)


class CosFace(MarginSoftmax):
    """Additive cosine margin (Wang et al. 2018, "CosFace", equation 4): the own class scores cos(theta) - margin."""

    def __init__(self, task: Task, scale: float | None, margin: float, margin_ramp: float):
        super().__init__(task, scale, margin_ramp)
        self.margin = margin

    def with_margin(self, cosines: Tensor, ramped: float) -> Tensor:
        return cosines - self.margin * ramped


class SphereFace(MarginSoftmax):
    """Multiplicative angular margin on unit vectors: the own class scores cos(margin x theta).

    The original one (Liu et al. 2017) keeps the lengths of the embeddings; normalised, as ArcFace's framework has it
    (Deng et al. 2019, equation 4, m1). Beyond pi / margin, where the cosine would rise again, it goes on falling
    (`multiply_angle`).

    Args:
        margin: m1, 1 or more; ramped from 1.
    """

    def __init__(self, task: Task, scale: float | None, margin: float, margin_ramp: float):
        super().__init__(task, scale, margin_ramp)
        self.margin = margin

    def with_margin(self, cosines: Tensor, ramped: float) -> Tensor:
        return multiply_angle(cosines, 1 + (self.margin - 1) * ramped)


class OriginalSphereFace(ClassificationLoss):
    """SphereFace as published (Liu et al. 2017, equations 7 and 8): logits are lengths of embeddings times cosines.

    The own class scores |x| psi(theta), annealed: (lambda |x| cos(theta) + |x| psi(theta)) / (1 + lambda), with lambda
    falling from `anneal_from` to `anneal_to` geometrically (the paper's code has one rule for steps of Caffe).

    Args:
        margin: m, a whole number.
        anneal_from, anneal_to: lambda at the start and at the end.
        annealing: share of the steps after which lambda is `anneal_to`.
    """

    def __init__(self, task: Task, margin: int, anneal_from: float, anneal_to: float, annealing: float):
        super().__init__(task, "prototypes")
        self.margin, self.anneal_from, self.anneal_to, self.annealing = margin, anneal_from, anneal_to, annealing

    def losses_of_rows(
        self, embeddings: Tensor, labels: Tensor, known: Tensor, progress: float
    ) -> tuple[Tensor, Tensor]:
        done = min(1.0, progress / self.annealing) if self.annealing else 1.0
        plain = self.anneal_from * (self.anneal_to / self.anneal_from) ** done
        cosines = self.head(embeddings)
        own = cosines.gather(1, labels[:, None])
        mixed = (plain * own + multiply_angle(own, self.margin)) / (1 + plain)
        lengths = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True)
        logits = lengths * cosines.scatter(1, labels[:, None], mixed)
        return F.cross_entropy(logits, labels, reduction="none"), cosines.argmax(dim=1) == labels


def add_angle(cosines: Tensor, margin: float) -> Tensor:
    """cos(theta + margin) of cos(theta), with finite derivatives from -1 to 1.

    Where theta + margin would pass pi, and the cosine rise again, it goes on as cos(theta) - (1 - cos(margin)), which
    meets it there at -1: the result falls with theta everywhere, and an embedding opposite to its prototype is still
    pulled. There is no easy margin: the margin counts at every angle, above a right one as well.
    """
    shifted = cosines * math.cos(margin) - _sines(cosines) * math.sin(margin)
    return torch.where(cosines > -math.cos(margin), shifted, cosines - (1 - math.cos(margin)))


def multiply_angle(cosines: Tensor, margin: float) -> Tensor:
    """psi(theta) = (-1)^k cos(margin x theta) - 2 k with k = floor(margin x theta / pi) (Liu et al. 2017, equation 7).

    It falls with theta everywhere, from 1 at 0, for any margin of 1 or more.
    """
    angles = torch.atan2(_sines(cosines), cosines)
    turns = (margin * angles.detach() / math.pi).floor()
    return (1 - 2 * (turns % 2)) * (margin * angles).cos() - 2 * turns


def _sines(cosines: Tensor) -> Tensor:
    """Of angles from 0 to pi."""
    # (1 - c) (1 + c) does not cancel as 1 - c^2 does. Below rounding the sine stands still: its slope has no bound.
    return ((1 - cosines) * (1 + cosines)).clamp_min(4 * torch.finfo(cosines.dtype).eps).sqrt()
