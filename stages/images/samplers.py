"""Schedules for labels: classes that come equally often, classes of classes, images in two ways, one after another."""

import numpy as np

from stages.images.order import order
from stages.images.schedule import ClassBalanced, Epochs, Schedule, class_key, places_of_values


class Balanced:
    """Batches in which every class is drawn equally often, whatever its size.

    Over an epoch of floor(n / batch) batches, at least one, classes come equally often, within one; so do the images of
    a class, none of which comes again before all of them have.

    Args:
        labels: int64 [n], 0 or more.
        samples: what an epoch is counted by in place of n, where a sample stands under several labels.
    """

    def __init__(self, seed: int, labels: np.ndarray, batch_size: int, samples: int | None = None):
        self._members = [places for places in places_of_values(labels, int(labels.max()) + 1) if len(places)]
        self._seed, self._batch_size = seed, batch_size
        self._steps_per_epoch = max(1, (len(labels) if samples is None else samples) // batch_size)
        self._epochs = Epochs(self._draw)

    @property
    def steps_per_epoch(self) -> int:
        return self._steps_per_epoch

    def positions(self, step: int) -> np.ndarray:
        epoch, place = divmod(step, self._steps_per_epoch)
        return self._epochs[epoch][place]

    def _draw(self, epoch: int) -> np.ndarray:
        """All batches of an epoch, int64 [steps, batch]."""
        draws = self._steps_per_epoch * self._batch_size
        # A permutation of places, taken modulo the classes: each equally often, in no order.
        classes = order(class_key(self._seed, epoch, -1), 0, draws)[:] % len(self._members)
        positions = np.empty(draws, dtype=np.int64)
        for number, (members, visits) in enumerate(
            zip(self._members, places_of_values(classes, len(self._members)), strict=True)
        ):
            chosen = order(class_key(self._seed, epoch, number), 0, len(members))
            positions[visits] = members[chosen[np.arange(len(visits)) % len(members)]]
        return positions.reshape(self._steps_per_epoch, -1)


class Hierarchical:
    """Batches of P classes with K images each, in which all P belong to few classes of classes (as the samplers of
    hierarchical sets do): negatives are alike.

    Args:
        labels: int64 [n], 0 or more.
        parents: int64 [n], the class above; images of one label have one parent.
        classes_per_batch: P; images_per_class: K.
        parents_per_batch: classes above, of which each gives floor(P / parents) of its own; those with fewer are left
            out.

    Attributes:
        parents: classes above that have enough classes.

    Raises:
        ValueError: there are too few of them.
    """

    def __init__(
        self,
        seed: int,
        labels: np.ndarray,
        parents: np.ndarray,
        classes_per_batch: int,
        images_per_class: int,
        parents_per_batch: int,
    ):
        self._seed, self._places = seed, []
        self._schedules: list[ClassBalanced] = []
        share = classes_per_batch // parents_per_batch
        if share < 1:
            raise ValueError(f"{classes_per_batch} classes a batch are fewer than {parents_per_batch} classes above")
        for number, parent in enumerate(np.unique(parents)):
            places = np.flatnonzero(parents == parent)
            there = len(np.unique(labels[places]))
            if there < share:
                continue
            self._places.append(places)
            # With one key for all, the same classes of two parents would meet again and again.
            key = class_key(seed, -1, number)
            self._schedules.append(ClassBalanced(key, labels[places], share, images_per_class))
        if len(self._schedules) < parents_per_batch:
            raise ValueError(
                f"only {len(self._schedules)} of the classes above have {share} classes or more; "
                f"{parents_per_batch} are needed"
            )
        self._parents, self.parents = parents_per_batch, len(self._schedules)
        self.batch_size = share * parents_per_batch * images_per_class
        self._steps_per_epoch = max(1, sum(map(len, self._places)) // self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        return self._steps_per_epoch

    def positions(self, step: int) -> np.ndarray:
        # Parents take turns: each comes once in a permutation, but for what is left over, which is another part each.
        turn, place = divmod(step, len(self._schedules) // self._parents)
        drawn = order(self._seed, turn, len(self._schedules))[place * self._parents : (place + 1) * self._parents]
        return np.concatenate([self._places[one][self._schedules[one].positions(turn)] for one in drawn.tolist()])


class Then:
    """One schedule for the first steps, then another (a curriculum).

    `steps_per_epoch` is that of the second.
    """

    def __init__(self, first: Schedule, steps: int, second: Schedule):
        self._first, self._steps, self._second = first, steps, second

    @property
    def steps_per_epoch(self) -> int:
        return self._second.steps_per_epoch

    def positions(self, step: int) -> np.ndarray:
        return self._first.positions(step) if step < self._steps else self._second.positions(step - self._steps)


class WithMore:
    """Batches of one schedule, each with the batch of another at its end; epochs are those of the first."""

    def __init__(self, schedule: Schedule, more: Schedule):
        self._schedule, self._more = schedule, more

    @property
    def steps_per_epoch(self) -> int:
        return self._schedule.steps_per_epoch

    def positions(self, step: int) -> np.ndarray:
        return np.concatenate([self._schedule.positions(step), self._more.positions(step)])
