"""What a supervised training learns of each image: its label or labels, or the value of an attribute."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.images.shards import Shards
from stages.labels.sets import multi_hot, name_rows, rarest_labels


@dataclass(frozen=True)
class Targets:
    """The class of each image, or its classes.

    Attributes:
        labels: int64 [n], positions in `classes`, -1 where nothing is known; or, where images have several labels, bool
            [n, classes].
    """

    labels: np.ndarray
    classes: Sequence[str]

    @property
    def are_several(self) -> bool:
        """Whether an image has several labels."""
        return self.labels.ndim > 1

    @property
    def known(self) -> np.ndarray:
        """Which images have a label, bool [n]."""
        return np.asarray(self.labels.any(axis=1)) if self.are_several else self.labels >= 0

    def strata(self, positions: np.ndarray) -> np.ndarray:
        """One class of each of some labelled images, to draw shares of all classes by: of several the rarest."""
        labels = self.labels[positions]
        return rarest_labels(labels) if self.are_several else labels

    def present(self, positions: np.ndarray) -> np.ndarray:
        """The classes that some labelled images have, ascending."""
        labels = self.labels[positions]
        return np.flatnonzero(labels.any(axis=0)) if self.are_several else np.unique(labels)

    def names(self, positions: np.ndarray) -> list[str]:
        """The classes of labelled images; of several `a|b`."""
        labels = self.labels[positions]
        if not self.are_several:
            return [self.classes[label] for label in labels]
        return [name or "" for name in name_rows(map(np.flatnonzero, labels), self.classes)]


def targets_of(shards: Shards, attribute: str | None) -> Targets:
    """The labels of a split, or the different values of an attribute as classes.

    Raises:
        NoSuchAttribute: lists those that there are.
    """
    if attribute is None:
        if any(len(labels) > 1 for labels in shards.label_lists):
            return Targets(multi_hot(shards.label_lists, len(shards.classes)), shards.classes)
        return Targets(shards.labels.numpy(), shards.classes)
    values = shards.attribute(attribute)
    classes = sorted({value for value in values if value is not None})
    numbers = {name: number for number, name in enumerate(classes)}
    return Targets(np.array([-1 if value is None else numbers[value] for value in values], dtype=np.int64), classes)
