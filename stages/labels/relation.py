"""When two samples with several labels each belong together.

Labels stand in one of two forms, in losses, samplers and retrieval alike: int64 [n], one label a sample, below 0 where
there is none; or bool [n, C], which of C labels a sample has. A sample without labels belongs to nothing.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

RelationKind = Literal["any", "all", "jaccard"]


@dataclass(frozen=True)
class LabelRelation:
    """Of samples with one label each every kind says the same: the labels are equal.

    Attributes:
        kind: any: they share a label; all: they have the same labels; jaccard: the labels that they share are at least
            `threshold` of those that either has (Jaccard 1912).
        threshold: of jaccard, above 0, up to 1; the quotient is compared in float32.
    """

    kind: RelationKind = "any"
    threshold: float = 0.5

    @property
    def needs_equal_sets(self) -> bool:
        """Whether what belongs together has the same labels."""
        return self.kind == "all" or (self.kind == "jaccard" and self.threshold == 1)

    def between(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Which rows belong to which columns.

        Args:
            rows, columns: labels in one form, of n and of m samples.

        Returns:
            bool [n, m]
        """
        return self.against(columns).of(rows)

    def against(self, columns: Tensor) -> "Against":
        """The same for many rows, a part at a time: what is made of the columns' labels is made once."""
        if columns.ndim == 1:
            return Against(self, columns)
        # Whole numbers, and far below 2^24: exact in float32, on any device.
        return Against(self, columns.to(torch.float32))


@dataclass(frozen=True)
class Against:
    """A relation to samples whose labels are known.

    Attributes:
        columns: their labels, int64 [m], or float32 [m, C] where they have several each.
    """

    relation: LabelRelation
    columns: Tensor

    @cached_property
    def sizes(self) -> Tensor:
        """Of several labels how many each has: float32 [m]."""
        return self.columns.sum(dim=1)

    def of(self, rows: Tensor) -> Tensor:
        """Which rows belong to which of them: labels in the columns' form, of n samples -> bool [n, m]."""
        if rows.ndim == 1:
            return (rows[:, None] == self.columns) & (rows >= 0)[:, None]
        counted = rows.to(torch.float32)
        shared = counted @ self.columns.T
        if self.relation.kind == "any":
            return shared > 0
        sizes = counted.sum(dim=1)[:, None]
        if self.relation.kind == "all":
            return (shared == sizes) & (shared == self.sizes) & (shared > 0)
        return shared / (sizes + self.sizes - shared).clamp_min(1) >= self.relation.threshold


ANY_SHARED = LabelRelation()
"""What is meant where nothing else is said."""


class RelationAsked(Protocol):
    """What settings say of a relation."""

    @property
    def kind(self) -> RelationKind: ...

    @property
    def threshold(self) -> float: ...


def relation_of(asked: RelationAsked | None) -> LabelRelation:
    """The relation that settings ask for; ANY_SHARED where they say nothing."""
    return ANY_SHARED if asked is None else LabelRelation(asked.kind, asked.threshold)


def is_labelled(labels: Tensor) -> Tensor:
    """Which samples have a label, in either form: bool [n]."""
    return labels >= 0 if labels.ndim == 1 else labels.any(dim=1)
