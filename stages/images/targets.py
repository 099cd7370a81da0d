"""What a supervised training learns of each image: its label, or the value of an attribute."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.images.shards import Shards


@dataclass(frozen=True)
class Targets:
    """One class an image.

    Attributes:
        labels: int64 [n], positions in `classes`; -1 where nothing is known, or several labels.
    """

    labels: np.ndarray
    classes: Sequence[str]

    def names(self, positions: np.ndarray) -> list[str]:
        """The classes of labelled images."""
        return [self.classes[label] for label in self.labels[positions]]


def targets_of(shards: Shards, attribute: str | None) -> Targets:
    """The labels of a split, or the different values of an attribute as classes.

    Raises:
        NoSuchAttribute: lists those that there are.
    """
    if attribute is None:
        return Targets(shards.labels.numpy(), shards.classes)
    values = shards.attribute(attribute)
    classes = sorted({value for value in values if value is not None})
    numbers = {name: number for number, name in enumerate(classes)}
    return Targets(np.array([-1 if value is None else numbers[value] for value in values], dtype=np.int64), classes)
