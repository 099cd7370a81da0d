"""Which samples make the batch of each step: a pure function of the step, whatever the number of processes."""

from typing import Protocol

import numpy as np

from stages.images.order import order


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
