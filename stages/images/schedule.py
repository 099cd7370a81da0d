"""Which samples make the batch of each step: a pure function of the step, whatever the number of processes."""

import hashlib
from collections.abc import Callable
from typing import Protocol

import numpy as np

from stages.images.order import hashed, order


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
        self._members = [places for places in places_of_values(labels, int(labels.max()) + 1) if len(places)]
        if not 1 <= classes_per_batch <= len(self._members):
            raise ValueError(f"classes_per_batch must be 1 to {len(self._members)}, not {classes_per_batch}")
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
        chosen = _windows(class_key(self._seed, epoch, -1), len(self._members), self._classes, self._steps_per_epoch)
        visits = places_of_values(chosen.ravel(), len(self._members))
        batches = np.empty((chosen.size, self._images), dtype=np.int64)
        for number, (members, visited) in enumerate(zip(self._members, visits, strict=True)):
            images = min(self._images, len(members))
            places = _windows(class_key(self._seed, epoch, number), len(members), images, len(visited))
            batches[visited] = members[places[:, np.arange(self._images) % images]]
        return batches.reshape(len(chosen), -1)


def places_of_values(values: np.ndarray, count: int) -> list[np.ndarray]:
    """For each of 0 ... count - 1: where it stands in `values`, ascending."""
    return np.split(np.argsort(values, kind="stable"), np.cumsum(np.bincount(values, minlength=count))[:-1])


def _windows(key: int, length: int, window: int, count: int) -> np.ndarray:
    """`count` windows of `window` different things out of `length`, cut from one permutation after another.

    Over all windows the things come equally often, within one. Where a window spans two permutations, what it has
    already is put off in the second.

    Returns:
        int64 [count, window]
    """
    rows = [np.empty((0, window), dtype=np.int64)]
    left = np.empty(0, dtype=np.int64)
    made = turn = 0
    while made < count:
        fresh = order(key, turn, length)[:]
        if len(left):
            added = fresh[np.isin(fresh, left, invert=True)][: window - len(left)]
            rows.append(np.concatenate([left, added])[None])
            fresh = fresh[np.isin(fresh, added, invert=True)]
            made += 1
        whole = len(fresh) // window
        rows.append(fresh[: whole * window].reshape(whole, window))
        left = fresh[whole * window :]
        made += whole
        turn += 1
    return np.concatenate(rows)[:count]


def class_key(seed: int, epoch: int, number: int) -> int:
    """A seed of its own for each class of each epoch."""
    return int.from_bytes(hashlib.blake2b(f"balanced/{seed}/{epoch}/{number}".encode(), digest_size=8).digest())
