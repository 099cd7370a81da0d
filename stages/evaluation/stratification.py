"""Folds of samples with several labels each: iterative stratification, of whole groups where there are groups.

Sechidis, Tsoumakas and Vlahavas 2011, "On the stratification of multi-label data", algorithm 1: the label with the
fewest samples left is dealt out first, since nothing dealt later can make up for it.
"""

import numpy as np

from stages.evaluation.groups import number_groups
from stages.evaluation.subsets import hash_ids


def iterative_folds(
    targets: np.ndarray, sample_ids: np.ndarray, folds: int, seed: int, groups: np.ndarray | None = None
) -> np.ndarray:
    """The fold of each sample, 0 to folds - 1, int64 [N]: each label has its share in each fold, as nearly as may be.

    Again and again the label that has the fewest samples left (the first of equals) is taken, and each sample that has
    it goes to the fold that lacks most of this label; of equals to the one that lacks most samples, then to the first
    by a draw. Samples without labels come last, to the folds that lack most samples. A group goes as a whole and counts
    with all its samples and all their labels; the largest of a label go first.

    The paper leaves open in which order the samples of a label go, and draws among equals: both follow from a hash of
    ids here, so that the folds are a function of seed and ids, in whatever order these are listed.

    Args:
        targets: bool [N, C], whether a sample has a label.
        sample_ids: int64 [N], no two equal.
        groups: int64 [N]; samples of equal number stay in one fold.
    """
    group = np.arange(len(targets)) if groups is None else number_groups(groups)
    number = int(group.max(initial=-1)) + 1
    if not 2 <= folds <= number:
        raise ValueError(f"{number} {'samples' if groups is None else 'groups'} cannot be cut into {folds} folds")
    first_ids = np.full(number, np.iinfo(np.int64).max)
    np.minimum.at(first_ids, group, np.asarray(sample_ids, dtype=np.int64))
    sizes = np.bincount(group, minlength=number)
    counts = np.zeros((number, targets.shape[1]), dtype=np.int64)  # samples of a group with a label
    np.add.at(counts, group, targets)
    order = np.lexsort((hash_ids(first_ids, seed, -1), -sizes))
    turns = np.stack([hash_ids(first_ids, seed, 1 + fold) for fold in range(folds)], axis=1)
    fold = _deal(counts[order], sizes[order], turns[order])
    found = np.empty(number, dtype=np.int64)
    found[order] = fold
    return found[group]


def _deal(counts: np.ndarray, sizes: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """The fold of each of G groups, int64 [G], in their order.

    Args:
        counts: int64 [G, C], samples with each label.
        sizes: int64 [G].
        turns: [G, K], drawn for each group and fold: the smallest wins among equal folds.
    """
    folds = turns.shape[1]
    found = np.full(len(counts), -1, dtype=np.int64)
    # Multiplied by the number of folds, so that what is wanted stays whole.
    lacking = np.tile(counts.sum(0), (folds, 1))  # [K, C]
    room = np.full(folds, sizes.sum())
    left = counts.sum(0)
    while left.any():
        label = int(np.where(left > 0, left, np.iinfo(np.int64).max).argmin())
        for group in np.flatnonzero((counts[:, label] > 0) & (found < 0)).tolist():
            fold = found[group] = int(np.lexsort((turns[group], -room, -lacking[:, label]))[0])
            lacking[fold] -= folds * counts[group]
            room[fold] -= folds * sizes[group]
            left -= counts[group]
    for group in np.flatnonzero(found < 0).tolist():
        fold = found[group] = int(np.lexsort((turns[group], -room))[0])
        room[fold] -= folds * sizes[group]
    return found
