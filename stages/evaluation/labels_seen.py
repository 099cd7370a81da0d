"""Which subsets of the labels a probe may measure on features of an encoder that saw labels itself.

A probe at a share of the labels says what these labels are worth. An encoder that was fine-tuned on labels beyond
them would bring along what it should not know: its score would flatter. So it is measured where everything that it saw
lies inside the probe's own subset, and nowhere else. Subsets of one index are nested (`label_subset`), hence:

- at the share that it was fine-tuned on: the one subset that it saw, and no spread over subsets;
- at larger shares: the subset of the same index, which holds what it saw;
- at smaller shares, or if its subset was of another seed or of other data: nothing, apart from all labels, which hold
  every subset.

What it saw is known by a digest of keys and classes, so that labels of other data are not taken for the probe's own;
whether the probe's test images were among those is not known (`saw_others`).
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from stages.evaluation.subsets import label_subset


def labels_digest(keys: Iterable[str], classes: Iterable[str]) -> str:
    """Of labelled images, in any order: sha256 over their keys with the names of their classes."""
    lines = sorted(f"{key}\t{name}" for key, name in zip(keys, classes, strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


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


class ProbeLabels:
    """The labelled training images of a probe, and what an encoder saw of their labels.

    Args:
        labels, ids: int64 [N].
        keys: str [N].
        classes: names by label.
        seed: of the probe's subsets.
        seen: `labels_seen` of features.json: fraction, subset, samples and digest of each fine-tuning.
    """

    def __init__(
        self,
        labels: np.ndarray,
        ids: np.ndarray,
        keys: np.ndarray,
        classes: Sequence[str],
        seed: int,
        seen: Sequence[Mapping[str, Any]],
    ):
        self.labels, self.ids, self.seen = labels, ids, seen
        self._keys, self._names, self._seed = keys, np.asarray(classes, dtype=str)[labels], seed
        self._digests: dict[tuple[float, int, int], str] = {}

    def rows(self, fraction: float, index: int) -> np.ndarray:
        """Positions of a subset, int64, ascending."""
        return label_subset(self.labels, self.ids, fraction, self._seed, index)

    def fair(self, fraction: float, subsets: int) -> Fair:
        """The subsets that are fair at `fraction`; the first `subsets` where the encoder saw no label."""
        if not self.seen:
            return Fair(tuple(range(subsets)), 0.0, True)
        saw = share_seen(self.seen)
        if fraction == 1:
            return Fair((0,), saw, self._saw_exactly(1, 0))
        indices = {int(one["subset"]) for one in self.seen}
        index = min(indices)
        # Equal sizes of one index are equal subsets: with many classes even the smallest shares hold one of each.
        largest = len(self.rows(fraction, index))
        inside = all(self._is_own(one) and one["samples"] <= largest for one in self.seen)
        if not inside or len(indices) > 1:
            return Fair((), saw, False)
        return Fair((index,), saw, self._saw_exactly(fraction, index))

    @cached_property
    def known(self) -> np.ndarray:
        """Which of the labels the encoder is known to have learned from, bool [N]."""
        known = np.zeros(len(self.labels), dtype=bool)
        for one in self.seen:
            if self._is_among_these(one):
                known[label_subset(self.labels, self.ids, one["fraction"], one["seed"], one["subset"])] = True
        return known

    @property
    def saw_others(self) -> bool:
        """Whether the encoder learned from labels that are not among these: those of other data, or of another split
        of the same images, which may hold test images of this one."""
        return not all(self._is_among_these(one) for one in self.seen)

    def _is_among_these(self, one: Mapping[str, Any]) -> bool:
        """Whether what a fine-tuning saw is a subset of these labels, of any seed."""
        return one["digest"] == self._digest(one["fraction"], one["subset"], one["seed"])

    def _is_own(self, one: Mapping[str, Any]) -> bool:
        """Whether what a fine-tuning saw is one of the probe's own subsets."""
        return one["digest"] == self._digest(one["fraction"], one["subset"], self._seed)

    def _saw_exactly(self, fraction: float, index: int) -> bool:
        return any(one["digest"] == self._digest(fraction, index, self._seed) for one in self.seen)

    def _digest(self, fraction: float, index: int, seed: int) -> str:
        """Of a subset of these labels; each is hashed once."""
        subset = (fraction, index, seed)
        if subset not in self._digests:
            rows = label_subset(self.labels, self.ids, fraction, seed, index)
            self._digests[subset] = labels_digest(self._keys[rows], self._names[rows])
        return self._digests[subset]


def share_seen(seen: Sequence[Mapping[str, Any]]) -> float:
    """The share of the labels that was seen in all: the largest of nested subsets, at most the sum of others."""
    largest: dict[tuple[int, int], float] = {}
    for one in seen:
        subset = (one["seed"], one["subset"])
        largest[subset] = max(largest.get(subset, 0.0), one["fraction"])
    return min(1.0, sum(largest.values()))


TEST_IMAGES_SEEN = "the encoder was trained on test images with pseudo-labels: transductive, scores on test flatter"
"""What is said wherever scores are made of such an encoder."""


def pseudo_labelled_test_images(seen: Sequence[Mapping[str, Any]]) -> int:
    """Test images at least that trainings learned with pseudo-labels; from 1 on their scores on test are transductive.

    Args:
        seen: `labels_seen` of features.json.
    """
    return max((one["pseudo"]["test"] for one in seen if "pseudo" in one), default=0)
