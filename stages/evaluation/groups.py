"""Parts of whole groups (a patient, a video, a burst): none is cut, and classes keep their shares as well as may be.

A group is known by the smallest id among its samples, so that neither its number nor the order of rows decides.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

Column = np.ndarray

TIE = 1e-10
"""Shares that differ by less are equal, however their sums were rounded."""


def number_groups(groups: Column) -> Column:
    """Numbers from 0 on, in the order of first appearance: int64 [N] -> int64 [N]."""
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    place = np.empty(len(first), dtype=np.int64)
    place[np.argsort(first)] = np.arange(len(first))
    return place[inverse]


def are_single(groups: Column) -> bool:
    """Whether every sample is a group of its own, so that groups change nothing."""
    return len(np.unique(groups)) == len(groups)


@dataclass(frozen=True)
class Composition:
    """Which classes G groups of N samples are made of."""

    group: Column
    """int64 [N], the group of each sample, 0 to G - 1."""
    first_ids: Column
    """int64 [G], the smallest id in each group."""
    sizes: Column
    """int64 [G], samples."""
    totals: Column
    """int64 [C], samples of each class."""
    spread: Column
    """int64 [C], groups that hold samples of a class."""
    classes: list[Column]
    """For each group the classes in it, ascending."""
    counts: list[Column]
    """For each group how many samples it holds of each of these."""


def compose(labels: Column, sample_ids: Column, groups: Column) -> Composition:
    """Count by group and class.

    Args:
        labels, sample_ids, groups: int64 [N]; equal numbers in `groups` are one group.
    """
    group = number_groups(groups)
    number, width = int(group.max()) + 1, int(labels.max()) + 1
    first_ids = np.full(number, np.iinfo(np.int64).max)
    np.minimum.at(first_ids, group, np.asarray(sample_ids, dtype=np.int64))
    cells, counts = np.unique(group * width + labels, return_counts=True)
    owners, classes = np.divmod(cells, width)
    bounds = np.searchsorted(owners, np.arange(1, number))
    return Composition(
        group,
        first_ids,
        np.bincount(group, minlength=number),
        np.bincount(labels, minlength=width),
        np.bincount(classes, minlength=width),
        np.split(classes, bounds),
        np.split(counts, bounds),
    )


def hold_out_groups(whole: Composition, places: Column, wanted: int) -> Column:
    """Groups that hold about `wanted` samples together: bool [G].

    One after another: always one whose classes have the smallest shares held out so far (Webster's rounding, were
    every group one sample), among equals the first by `places`. It is taken if the count comes nearer to `wanted` by
    it and a group of each of its classes stays outside. Where nothing can be taken so, it is the smallest group that
    no class depends on; where there is none, nothing is held out.

    Args:
        places: [G], a number drawn for each group, no two equal.
    """
    held = np.zeros(len(whole.sizes), dtype=bool)
    queues = _Queues(whole, places)
    chosen, total = np.zeros_like(whole.totals), 0
    while total < wanted and (group := queues.next()) is not None:
        classes, counts = whole.classes[group], whole.counts[group]
        nearer = whole.sizes[group] < 2 * (wanted - total)
        if nearer and (chosen[classes] + counts < whole.totals[classes]).all():
            held[group] = True
            total += int(whole.sizes[group])
            chosen[classes] += counts
            queues.take(group)
    if not held.any():
        free = [
            number
            for number, (classes, counts) in enumerate(zip(whole.classes, whole.counts, strict=True))
            if (counts < whole.totals[classes]).all()
        ]
        if free:
            held[min(free, key=lambda number: (whole.sizes[number], places[number]))] = True
    return held


class _Queues:
    """Groups waiting to be held out: those of one composition stand in one queue, by place."""

    def __init__(self, whole: Composition, places: Column):
        self._whole, self._places = whole, places
        found: dict[tuple[bytes, bytes], list[int]] = defaultdict(list)
        for group in np.argsort(places)[::-1].tolist():
            classes, shares = whole.classes[group], whole.counts[group] / whole.sizes[group]
            found[classes.tobytes(), shares.tobytes()].append(group)
        self._waiting = list(found.values())  # the next of each is its last
        self._heads = np.array([places[queue[-1]] for queue in self._waiting])
        # The share of its classes that is held out, and half of what an average group of them adds.
        halves = 0.5 / np.maximum(whole.spread, 1)
        self._shares = np.empty(len(self._waiting))
        touched: dict[int, list[tuple[int, float]]] = defaultdict(list)
        for number, queue in enumerate(self._waiting):
            classes, weights = whole.classes[queue[-1]], whole.counts[queue[-1]] / whole.sizes[queue[-1]]
            self._shares[number] = (weights * halves[classes]).sum()
            for one, weight in zip(classes.tolist(), weights.tolist(), strict=True):
                touched[one].append((number, weight))
        self._touched = {
            one: (np.array([number for number, _ in entries]), np.array([weight for _, weight in entries]))
            for one, entries in touched.items()
        }

    def next(self) -> int | None:
        """The next group, which leaves its queue; None where all queues are empty."""
        smallest = self._shares.min()
        if np.isinf(smallest):
            return None
        equal = np.flatnonzero(self._shares <= smallest + TIE)
        queue = int(equal[self._heads[equal].argmin()])
        group = self._waiting[queue].pop()
        if self._waiting[queue]:
            self._heads[queue] = self._places[self._waiting[queue][-1]]
        else:
            self._shares[queue] = np.inf
        return group

    def take(self, group: int) -> None:
        """The group was held out: its classes have a larger share of it now."""
        counts = self._whole.counts[group] / self._whole.totals[self._whole.classes[group]]
        for one, share in zip(self._whole.classes[group].tolist(), counts.tolist(), strict=True):
            queues, weights = self._touched[one]
            self._shares[queues] += weights * share


def deal_groups(whole: Composition, places: Column, folds: int) -> Column:
    """The fold of each group, int64 [G]: the largest first, always to the fold that has least of its classes.

    The last group of a class goes where not all the others are, if there is such a fold: then whatever fold is left
    out, the rest knows the class.

    Args:
        places: [G], a number drawn for each group, no two equal; decides among groups of one size.
    """
    fold = np.empty(len(whole.sizes), dtype=np.int64)
    dealt = np.zeros((folds, len(whole.totals)))  # samples by fold and class
    sizes = np.zeros(folds)
    for group in np.lexsort((places, -whole.sizes)).tolist():
        classes, counts = whole.classes[group], whole.counts[group]
        inside, totals = dealt[:, classes], whole.totals[classes]  # [K, c], [c]
        last = (inside.sum(0) + counts == totals) & (whole.spread[classes] > 1)
        lost = ((inside + counts == totals) & last).sum(1)
        cost = (inside * (counts / totals)).sum(1) + sizes * (whole.sizes[group] / len(whole.group))
        fold[group] = number = int(np.lexsort((cost, lost))[0])
        dealt[number, classes] += counts
        sizes[number] += whole.sizes[group]
    return fold
