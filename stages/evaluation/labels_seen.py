"""Which subsets of the labels a probe may measure on features of an encoder that saw labels itself.

A probe at a share of the labels says what these labels are worth. An encoder that was fine-tuned on labels beyond
them would bring along what it should not know: its score would flatter. So it is measured where everything that it saw
lies inside the probe's own subset, and nowhere else. Subsets of one index are nested (`label_subset`), hence:

- at the share that it was fine-tuned on: the one subset that it saw, and no spread over subsets;
- at larger shares: the subset of the same index, which holds what it saw;
- at smaller shares, or if its subset was of another seed or of other data: nothing, apart from all labels, which hold
  every subset.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fair:
    """What may be measured at one share of the labels.

    Attributes:
        indices: of the subsets; none: every one would be unfair.
        saw: share of the labels that the encoder saw, 0 for none.
        exact: whether the encoder saw exactly the labels that the probe sees, or none at all.
    """

    indices: tuple[int, ...]
    saw: float
    exact: bool

    @property
    def known_by_heart(self) -> bool:
        """Whether the encoder learned from all of the labels: none of them, held out, tells how it does on others."""
        return self.exact and self.saw > 0


def fair_subsets(
    seen: Sequence[Mapping[str, Any]], fraction: float, subsets: int, seed: int, size: Callable[[float], int]
) -> Fair:
    """The subsets that are fair at `fraction`.

    Args:
        seen: `labels_seen` of features.json: fraction, subset, seed and samples of each fine-tuning.
        subsets: how many are measured where the encoder saw no label.
        seed: of the probe's subsets.
        size: labels in a subset of this share of the probe's training images.
    """
    if not seen:
        return Fair(tuple(range(subsets)), 0.0, True)
    saw = share_seen(seen)
    samples = max(int(one["samples"]) for one in seen)
    if fraction == 1:
        return Fair((0,), saw, any(one["fraction"] == 1 and one["samples"] == size(1) for one in seen))
    # Equal sizes of one index are equal subsets: with many classes even the smallest shares hold one of each.
    inside = all(
        one["seed"] == seed and one["samples"] == size(one["fraction"]) and one["samples"] <= size(fraction)
        for one in seen
    )
    indices = {int(one["subset"]) for one in seen}
    if not inside or len(indices) > 1:
        return Fair((), saw, False)
    return Fair(tuple(indices), saw, samples == size(fraction))


def share_seen(seen: Sequence[Mapping[str, Any]]) -> float:
    """The share of the labels that was seen in all: the largest of nested subsets, at most the sum of others."""
    largest: dict[tuple[int, int], float] = {}
    for one in seen:
        subset = (one["seed"], one["subset"])
        largest[subset] = max(largest.get(subset, 0.0), one["fraction"])
    return min(1.0, sum(largest.values()))
