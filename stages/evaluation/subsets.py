"""Which labelled samples a measurement may use: nested subsets, folds, a held-out part.

All are pure functions of (seed, sample ids, labels, groups): a sample's place comes from a hash of its id, so that the
probe's label curve and fine-tuning on a share of the labels see the same samples, in whatever order they are listed.
"""

import numpy as np

from stages.evaluation.groups import are_single, compose, deal_groups, hold_out_groups

Labels = np.ndarray
Ids = np.ndarray


def label_subset(labels: Labels, sample_ids: Ids, fraction: float, seed: int, index: int = 0) -> np.ndarray:
    """Stratified subset `index` of a share of the samples, at least one of each class.

    The subsets of one index are nested: that of a smaller fraction lies in that of a larger one. Classes keep their
    shares as well as whole samples can (Webster's rounding).

    Args:
        labels: [N], 0 or more.
        sample_ids: [N], no two equal.
        fraction: above 0, up to 1, of N.

    Returns:
        Positions in `labels`, ascending: int64, max(number of classes, round(fraction * N)) of them.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, not {fraction}")
    rank, share = _places(labels, sample_ids, seed, 1 + index)
    order = np.lexsort((hash_ids(sample_ids, seed, 1 + index), share, rank > 0))
    return np.sort(order[: subset_size(labels, fraction)])


def subset_size(labels: Labels, fraction: float) -> int:
    """How many samples `label_subset` takes of labels [N]: round(fraction * N), and one of each class at least."""
    return max(len(np.unique(labels)), round(fraction * len(labels)))


def held_out(
    labels: Labels, sample_ids: Ids, fraction: float, seed: int, groups: np.ndarray | None = None
) -> np.ndarray:
    """Stratified part of the samples to choose settings on: bool [N], true for round(fraction * N) of them.

    At least one sample of each class stays outside, and at least one sample of all is in (if a class has two).

    Args:
        groups: int64 [N]; samples of equal number stay together, on one side. Then the size is as near as whole
            groups come, and the part is empty where each group is the only one of some class.
    """
    if groups is not None and not are_single(groups):
        whole = compose(labels, sample_ids, groups)
        wanted = max(1, round(fraction * len(labels)))
        return hold_out_groups(whole, hash_ids(whole.first_ids, seed, 0), wanted)[whole.group]
    rank, share = _places(labels, sample_ids, seed, 0)
    count = max(1, round(fraction * len(labels)))
    last = rank == np.bincount(labels)[labels] - 1
    order = np.lexsort((hash_ids(sample_ids, seed, 0), share, last))
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[order[:count]] = True
    return chosen & ~last


def stratified_folds(
    labels: Labels, sample_ids: Ids, folds: int, seed: int, index: int = 0, groups: np.ndarray | None = None
) -> np.ndarray:
    """The fold of each sample, 0 to folds - 1, int64 [N].

    Sizes of folds, and each class's counts in them, differ by one at most.

    Args:
        groups: int64 [N]; samples of equal number stay in one fold. Then sizes differ by what whole groups make them
            differ by, and a class that is in one group only is in one fold only.
    """
    number = len(labels) if groups is None else len(np.unique(groups))
    if not 2 <= folds <= number:
        of = "samples" if groups is None else "groups"
        raise ValueError(f"{number} {of} cannot be cut into {folds} folds")
    if groups is not None and number < len(labels):
        whole = compose(labels, sample_ids, groups)
        return deal_groups(whole, hash_ids(whole.first_ids, seed, -1 - index), folds)[whole.group]
    order = np.lexsort((hash_ids(sample_ids, seed, -1 - index), labels))
    fold = np.empty(len(labels), dtype=np.int64)
    fold[order] = np.arange(len(labels)) % folds
    return fold


def _places(labels: Labels, sample_ids: Ids, seed: int, stream: int) -> tuple[np.ndarray, np.ndarray]:
    """Rank of each sample within its class by hash (0 first), and the share of its class that comes before it."""
    order = np.lexsort((hash_ids(sample_ids, seed, stream), labels))
    counts = np.bincount(labels)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    rank = np.empty(len(labels), dtype=np.int64)
    rank[order] = np.arange(len(labels)) - starts[labels[order]]
    return rank, (rank + 0.5) / counts[labels]


def hash_ids(sample_ids: Ids, seed: int, stream: int) -> np.ndarray:
    """64 well-mixed bits of each id, different for different ids (the finaliser of SplitMix64, Steele et al. 2014)."""
    key = np.random.SeedSequence([seed, stream % 2**32]).generate_state(1, np.uint64)
    bits = np.asarray(sample_ids, dtype=np.int64).view(np.uint64) + key
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return bits ^ (bits >> np.uint64(31))
