"""When two samples with several labels each belong together.

Labels stand in one of two forms, in losses, samplers and retrieval alike: int64 [n], one label a sample, below 0 where
there is none; or bool [n, C], which of C labels a sample has. A sample without labels belongs to nothing.
"""

from dataclasses import dataclass
from typing import Literal

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
        if rows.ndim == 1:
            return (rows[:, None] == columns) & (rows >= 0)[:, None]
        # Whole numbers, and far below 2^24: exact in float32, on any device.
        one, other = rows.to(torch.float32), columns.to(torch.float32)
        shared = one @ other.T
        if self.kind == "any":
            return shared > 0
        sizes, other_sizes = one.sum(dim=1)[:, None], other.sum(dim=1)
        if self.kind == "all":
            return (shared == sizes) & (shared == other_sizes) & (shared > 0)
        return shared / (sizes + other_sizes - shared).clamp_min(1) >= self.threshold


ANY_SHARED = LabelRelation()
"""What is meant where nothing else is said."""


def is_labelled(labels: Tensor) -> Tensor:
    """Which samples have a label, in either form: bool [n]."""
    return labels >= 0 if labels.ndim == 1 else labels.any(dim=1)
