"""All pairs of images: counted exactly, drawn without repetition, never listed. And pairs that are given."""

import numpy as np

from stages.images.order import hashed, order
from stages.images.schedule import Shuffled


class PairSet:
    """The N (N - 1) / 2 pairs of N images, each with its number: first the positives (both of one class), then the
    negatives.

    Memory is that of the labels. An image without a class (a label below 0) is in negative pairs only, with images
    that have one.

    Args:
        labels: int64 [N].

    Attributes:
        positives, negatives: how many there are of each.
    """

    def __init__(self, labels: np.ndarray):
        # Class after class, those without one last: the partners of an image that come after its class are negatives.
        keys = np.where(labels < 0, np.iinfo(np.int64).max, labels)
        self._members = np.argsort(keys, kind="stable")
        labelled = int((labels >= 0).sum())
        ordered = keys[self._members[:labelled]]
        self._starts = np.flatnonzero(np.concatenate([np.ones(min(labelled, 1), bool), ordered[1:] != ordered[:-1]]))
        sizes = np.diff(np.append(self._starts, labelled))
        self._positives_before = np.concatenate([[0], np.cumsum(sizes * (sizes - 1) // 2)])
        after = len(labels) - np.repeat(self._starts + sizes, sizes)  # of each labelled image: those of later classes
        self._negatives_before = np.concatenate([[0], np.cumsum(after)])
        self._ends = np.repeat(self._starts + sizes, sizes)
        self.positives, self.negatives = int(self._positives_before[-1]), int(self._negatives_before[-1])

    def __len__(self) -> int:
        return self.positives + self.negatives

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        """The images of pairs: int64 [n] -> positions int64 [n, 2].

        Raises:
            IndexError: a number lies outside.
        """
        if numbers.size and (numbers.min() < 0 or numbers.max() >= len(self)):
            raise IndexError(f"pairs are numbered from 0 to {len(self) - 1}")
        is_positive = numbers < self.positives
        pairs = np.empty((len(numbers), 2), dtype=np.int64)
        pairs[is_positive] = self._positive(numbers[is_positive])
        pairs[~is_positive] = self._negative(numbers[~is_positive] - self.positives)
        return self._members[pairs]

    def _positive(self, numbers: np.ndarray) -> np.ndarray:
        """Of a class: pair 0 is (1, 0), 1 and 2 are (2, 0) and (2, 1), and so on, as in a triangle's rows."""
        group = np.searchsorted(self._positives_before, numbers, side="right") - 1
        inside = numbers - self._positives_before[group]
        row = ((1 + np.sqrt(1 + 8 * inside.astype(np.float64))) / 2).astype(np.int64)
        row -= row * (row - 1) // 2 > inside  # the root may have been rounded either way
        row += row * (row + 1) // 2 <= inside
        return self._starts[group][:, None] + np.stack([row, inside - row * (row - 1) // 2], axis=1)

    def _negative(self, numbers: np.ndarray) -> np.ndarray:
        """Each labelled image with all that come after its class."""
        first = np.searchsorted(self._negatives_before, numbers, side="right") - 1
        return np.stack([first, self._ends[first] + numbers - self._negatives_before[first]], axis=1)


class Pairs:
    """Batches of pairs, the two of a pair side by side, in an order drawn for each.

    No pair comes again before all of its kind have come. An epoch shows as many images as there are, at least one
    batch.

    Args:
        labels: int64 [n].
        pairs_per_batch: at least 1.
        positive_share: of each batch, rounded to whole pairs; 0 to 1.

    Raises:
        ValueError: there are no pairs of a kind that is asked for.
    """

    def __init__(self, seed: int, labels: np.ndarray, pairs_per_batch: int, positive_share: float):
        self._pairs, self._seed = PairSet(labels), seed
        self._positives = round(positive_share * pairs_per_batch)
        self._negatives = pairs_per_batch - self._positives
        for kind, wanted, there in (
            ("positive", self._positives, self._pairs.positives),
            ("negative", self._negatives, self._pairs.negatives),
        ):
            if wanted and not there:
                raise ValueError(f"there are no {kind} pairs among {len(labels)} images")
        self._steps_per_epoch = max(1, len(labels) // (2 * pairs_per_batch))

    @property
    def positives(self) -> int:
        """Pairs of one class that there are."""
        return self._pairs.positives

    @property
    def negatives(self) -> int:
        """Pairs of two classes that there are."""
        return self._pairs.negatives

    @property
    def steps_per_epoch(self) -> int:
        return self._steps_per_epoch

    def positions(self, step: int) -> np.ndarray:
        positive = self._numbers(0, self._pairs.positives, self._positives, step)
        negative = self._pairs.positives + self._numbers(1, self._pairs.negatives, self._negatives, step)
        pairs = self._pairs[np.concatenate([positive, negative])]
        # Which comes first, and where in the batch a pair stands, says nothing of its kind.
        swapped = hashed(self._seed, step, np.arange(len(pairs))) % 2 == 1
        pairs[swapped] = pairs[swapped, ::-1]
        return pairs[order(self._seed, step, len(pairs))[:]].ravel()

    def _numbers(self, kind: int, there: int, wanted: int, step: int) -> np.ndarray:
        """The next `wanted` of a kind in a keyed permutation of all of them, after the last in another one."""
        if not wanted:
            return np.empty(0, dtype=np.int64)
        places = step * wanted + np.arange(wanted)
        turns, inside = places // there, places % there
        numbers = np.empty(wanted, dtype=np.int64)
        for turn in np.unique(turns):
            mine = turns == turn
            numbers[mine] = order(self._seed, 2 * int(turn) + kind, there)[inside[mine]]
        return numbers


class GivenPairs:
    """Batches of pairs that are given, the two of a pair side by side: every pair at most once an epoch, in an order of
    its own for each, as `Shuffled`; which of the two comes first is drawn for each pair and epoch.

    Args:
        pairs: int64 [P, 2], positions.
        targets: float32 [P], how alike the two are, 0 to 1.
        pairs_per_batch: 1 to P.
    """

    def __init__(self, seed: int, pairs: np.ndarray, targets: np.ndarray, pairs_per_batch: int):
        self._seed, self._pairs, self._targets = seed, pairs, targets
        self._numbers = Shuffled(seed, len(pairs), pairs_per_batch)

    @property
    def steps_per_epoch(self) -> int:
        return self._numbers.steps_per_epoch

    def positions(self, step: int) -> np.ndarray:
        numbers = self._numbers.positions(step)
        chosen = self._pairs[numbers]
        swapped = hashed(self._seed, step // self.steps_per_epoch, numbers) % 2 == 1
        chosen[swapped] = chosen[swapped, ::-1]
        return chosen.ravel()

    def targets(self, step: int) -> np.ndarray:
        """Of the pairs of a step: float32 [pairs_per_batch]."""
        return self._targets[self._numbers.positions(step)]
