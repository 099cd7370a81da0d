"""Which samples make the batch of each step: a pure function of the step, whatever the number of processes."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from stages.images.order import hashed, order, orders


class Schedule(Protocol):
    """The global batch of any step."""

    @property
    def steps_per_epoch(self) -> int: ...

    def positions(self, step: int) -> np.ndarray:
        """Positions in the split, int64 [global batch], of a step counted from 0 over all epochs."""
        ...


class Shuffled:
    """Every sample at most once an epoch, in an order of its own for each: floor(n / batch) batches.

    What is left over is another part each epoch.
    """

    def __init__(self, seed: int, length: int, batch_size: int):
        if not 1 <= batch_size <= length:
            raise ValueError(f"batch_size must be 1 to {length}, the number of images, not {batch_size}")
        self._seed, self._length, self._batch_size = seed, length, batch_size

    @property
    def steps_per_epoch(self) -> int:
        return self._length // self._batch_size

    def positions(self, step: int) -> np.ndarray:
        epoch, place = divmod(step, self.steps_per_epoch)
        first = place * self._batch_size
        return order(self._seed, epoch, self._length)[first : first + self._batch_size]


class OnePerGroup:
    """One image of every group an epoch: those of one group do not serve as each other's negatives in a batch.

    An epoch is floor(groups / batch) batches of a keyed permutation of the groups. Which image stands for a group is a
    keyed draw, another one in other epochs; groups of one image are always there as they are.

    Args:
        groups: int64 [n], equal numbers for images of a group, as `Shards.groups`.
    """

    def __init__(self, seed: int, groups: np.ndarray, batch_size: int):
        _, numbers = np.unique(groups, return_inverse=True)
        self._sizes = np.bincount(numbers)
        self._members = np.argsort(numbers, kind="stable")  # group after group, each in the order of the index
        self._first = np.cumsum(self._sizes) - self._sizes
        if not 1 <= batch_size <= len(self._sizes):
            raise ValueError(f"batch_size must be 1 to {len(self._sizes)}, the number of groups, not {batch_size}")
        self._seed, self._batch_size = seed, batch_size

    @property
    def steps_per_epoch(self) -> int:
        return len(self._sizes) // self._batch_size

    def positions(self, step: int) -> np.ndarray:
        epoch, place = divmod(step, self.steps_per_epoch)
        first = place * self._batch_size
        chosen = order(self._seed, epoch, len(self._sizes))[first : first + self._batch_size]
        return self._members[self._first[chosen] + hashed(self._seed, epoch, chosen) % self._sizes[chosen]]


class Among:
    """A schedule over some samples of the split only.

    Args:
        positions: int64 [n], where each of them stands in the split.
        schedule: over range(n).
    """

    def __init__(self, positions: np.ndarray, schedule: Schedule):
        self._positions, self._schedule = positions, schedule

    @property
    def steps_per_epoch(self) -> int:
        return self._schedule.steps_per_epoch

    def positions(self, step: int) -> np.ndarray:
        return self._positions[self._schedule.positions(step)]


class Epochs:
    """All batches of an epoch, drawn when they are first asked for; the last two epochs asked for are kept: at the end
    of one, who reads ahead is in the next already.
    """

    def __init__(self, draw: Callable[[int], np.ndarray]):
        """draw: an epoch's batches, int64 [steps, batch]."""
        self._draw = draw
        self._known: tuple[tuple[int, np.ndarray], ...] = ()

    def __getitem__(self, epoch: int) -> np.ndarray:
        """Any number of threads may ask at once; then it may be drawn twice."""
        known = self._known
        for number, batches in known:
            if number == epoch:
                return batches
        batches = self._draw(epoch)
        self._known = ((epoch, batches), *known[:1])
        return batches


class ClassBalanced:
    """Batches of P classes with K images each, the images of a class side by side (Hermans et al. 2017, section 2).

    Classes come equally often in an epoch, within one, and so do the images of a class. An epoch is
    floor(n / (P K)) batches, at least one. A class of fewer than K images repeats them until there are K.

    Args:
        labels: int64 [n], 0 or more.
        classes_per_batch: P, at most the classes that there are.
        images_per_class: K.
        samples: what an epoch is counted by in place of n, where a sample stands under several labels.
    """

    def __init__(
        self,
        seed: int,
        labels: np.ndarray,
        classes_per_batch: int,
        images_per_class: int,
        samples: int | None = None,
    ):
        sizes = np.bincount(labels)
        self._sizes = sizes[sizes > 0]  # of the classes that there are
        self._members = np.argsort(labels, kind="stable")  # class after class, each in the order of the index
        if not 1 <= classes_per_batch <= len(self._sizes):
            raise ValueError(f"classes_per_batch must be 1 to {len(self._sizes)}, not {classes_per_batch}")
        self._seed, self._classes, self._images = seed, classes_per_batch, images_per_class
        count = len(labels) if samples is None else samples
        self._steps_per_epoch = max(1, count // (classes_per_batch * images_per_class))
        self._epochs = Epochs(self._draw)

    @property
    def steps_per_epoch(self) -> int:
        return self._steps_per_epoch

    def positions(self, step: int) -> np.ndarray:
        epoch, place = divmod(step, self._steps_per_epoch)
        return self._epochs[epoch][place]

    def _draw(self, epoch: int) -> np.ndarray:
        """All batches of an epoch, int64 [steps, P K]."""
        sizes, count = self._sizes, np.array([len(self._sizes)])
        there, steps = np.array([self._classes]), np.array([self._steps_per_epoch])
        classes = _windows([class_key(self._seed, epoch, -1)], count, there, steps)
        visits, images = np.bincount(classes, minlength=len(sizes)), np.minimum(self._images, sizes)
        keys = [class_key(self._seed, epoch, number) for number in range(len(sizes))]
        drawn = _windows(keys, sizes, images, visits)
        # A row for each visit, class after class: its window, again and again until there are K.
        whose = np.repeat(np.arange(len(sizes)), visits)
        length = images[whose][:, None]
        places = drawn[_starts(length[:, 0])[:, None] + np.arange(self._images) % length]
        batches = np.empty((len(classes), self._images), dtype=np.int64)
        batches[np.argsort(classes, kind="stable")] = self._members[_starts(sizes)[whose][:, None] + places]
        return batches.reshape(self._steps_per_epoch, -1)


def places_of_values(values: np.ndarray, count: int) -> list[np.ndarray]:
    """For each of 0 ... count - 1: where it stands in `values`, ascending."""
    return np.split(np.argsort(values, kind="stable"), np.cumsum(np.bincount(values, minlength=count))[:-1])


def _windows(keys: Sequence[int], lengths: np.ndarray, windows: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """For every key: `count` windows of `window` different things out of `length`, cut from one permutation after
    another.

    Over all windows of a key the things come equally often, within one. Where a window spans two permutations, what it
    has already is put off in the second.

    Args:
        lengths, windows, counts: int64 [C]; a window is at most the length.

    Returns:
        int64 [sum of counts times windows], key after key, window after window.
    """
    wanted = counts * windows
    first, drawn = _starts(wanted), np.empty(wanted.sum(), dtype=np.int64)
    turn = 0
    while (active := np.flatnonzero(turn * lengths < wanted)).size:
        size, made = lengths[active], turn * lengths[active]
        fresh = orders([keys[one] for one in active.tolist()], turn, size)
        whose, begin = np.repeat(np.arange(len(active)), size), _starts(size)
        # What a window has that is not full yet, and how much it lacks.
        has = made % windows[active]
        lacks = np.where(has > 0, windows[active] - has, 0)
        is_there = np.zeros(len(fresh), dtype=bool)
        held = drawn[_ranges(first[active] + made - has, has)]
        is_there[np.repeat(begin, has) + held] = True
        free = ~is_there[begin[whose] + fresh]
        # These fill it up, and come before the others.
        fills = free & (_ranks(free, begin, whose) < lacks[whose])
        ranks = _ranks(fills, begin, whose)
        place = made[whose] + np.where(fills, ranks, lacks[whose] + np.arange(len(fresh)) - begin[whose] - ranks)
        kept = place < wanted[active][whose]
        drawn[first[active][whose][kept] + place[kept]] = fresh[kept]
        turn += 1
    return drawn


def _ranks(chosen: np.ndarray, begin: np.ndarray, whose: np.ndarray) -> np.ndarray:
    """How many are chosen before each, of its own key: int64 [n]."""
    before = np.cumsum(chosen) - chosen
    return before - before[begin][whose]


def _starts(sizes: np.ndarray) -> np.ndarray:
    """Where each of consecutive parts begins."""
    return np.cumsum(sizes) - sizes


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of each, one after another."""
    return np.repeat(starts - _starts(sizes), sizes) + np.arange(sizes.sum())


def class_key(seed: int, epoch: int, number: int) -> int:
    """A seed of its own for each class of each epoch."""
    return int.from_bytes(hashlib.blake2b(f"balanced/{seed}/{epoch}/{number}".encode(), digest_size=8).digest())
