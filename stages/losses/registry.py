"""Every supervised loss by its name in a recipe. A new one is a file here, its settings, and a line."""

from collections.abc import Callable, Mapping
from typing import Any

from stages.losses.classification import CrossEntropy
from stages.losses.loss import Loss, Task
from stages.losses.margin_softmax import ArcFace
from stages.losses.triplet import Triplet

LOSSES: dict[str, Callable[..., Loss]] = {
    "cross_entropy": CrossEntropy,
    "triplet": Triplet,
    "arcface": ArcFace,
}


def build_loss(name: str, options: Mapping[str, Any], task: Task) -> Loss:
    """A loss, and its new head where it has one (drawn from torch's global generator).

    Args:
        options: the settings of the loss, by name.
    """
    return LOSSES[name](task, **options)
