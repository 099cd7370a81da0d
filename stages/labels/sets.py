"""Labels of samples that have several each, as rows of bool; without torch."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


def multi_hot(label_lists: Sequence[Sequence[int]], classes: int) -> NDArray[np.bool_]:
    """Which labels each sample has: bool [n, classes]."""
    sets = np.zeros((len(label_lists), classes), dtype=bool)
    rows = np.repeat(np.arange(len(label_lists)), [len(labels) for labels in label_lists])
    sets[rows, np.array([label for labels in label_lists for label in labels], dtype=np.int64)] = True
    return sets


def name_rows(label_lists: Iterable[Iterable[int]], classes: Sequence[str]) -> list[str | None]:
    """The labels of each sample in words, in the order of the classes: `a`, of several `a|b`; None without a label."""
    names = ([classes[label] for label in sorted(set(labels))] for labels in label_lists)
    return ["|".join(one) if one else None for one in names]


def rarest_labels(sets: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Of each sample the label that the fewest samples have, the first of equals; -1 where it has none: int64 [n].

    One class a sample, to stratify by: shares of the rare labels are the ones that a draw would miss.
    """
    counts = sets.sum(axis=0)
    order = np.lexsort((np.arange(len(counts)), counts))  # the rarest first
    return np.where(sets.any(axis=1), order[sets[:, order].argmax(axis=1)], -1)


def set_numbers(sets: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Numbers from 0 for equal sets of labels; -1 where there is none: int64 [n]."""
    numbers = np.full(len(sets), -1, dtype=np.int64)
    labelled = sets.any(axis=1)
    packed = np.packbits(sets[labelled], axis=1)
    numbers[labelled] = np.unique(packed, axis=0, return_inverse=True)[1].ravel()
    return numbers
