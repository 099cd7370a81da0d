"""Iterative stratification: the rule of the paper, whole groups, and balance that random folds do not have."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.mosaics import make_mosaics
from stages.evaluation import iterative_folds
from stages.evaluation.subsets import hash_ids


@st.composite
def labelled(draw):
    """Labels bool [N, C], ids, groups, folds and a seed."""
    rows, classes, units = draw(st.integers(2, 50)), draw(st.integers(1, 6)), draw(st.integers(2, 40))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    targets = random.random((rows, classes)) < 0.7 ** np.arange(classes) * draw(st.sampled_from([0.2, 0.6]))
    groups = random.integers(0, units, rows)
    groups[:2] = 0, 1
    folds = draw(st.integers(2, min(6, len(set(groups.tolist())))))
    return targets, random.permutation(4 * rows)[:rows], groups, folds, draw(st.integers(0, 2**31))


def slow_folds(targets, ids, folds, seed, groups):
    """Algorithm 1 of the paper in plain loops, with the equal groups and folds that it leaves open by hashes of ids."""
    members = {}
    for row, group in enumerate(groups):
        members.setdefault(int(group), []).append(row)
    units = list(members.values())
    first = [min(int(ids[row]) for row in unit) for unit in units]
    classes = targets.shape[1]

    def has(unit, label):
        return sum(bool(targets[row, label]) for row in units[unit])

    wanted = [[sum(map(bool, targets[:, label])) / folds for label in range(classes)] for _ in range(folds)]
    size = [len(targets) / folds] * folds
    left, found = set(range(len(units))), {}

    def place(unit, label):
        def merit(fold):
            lacks = round(wanted[fold][label], 6) if label is not None else 0
            return (-lacks, -round(size[fold], 6), int(hash_ids(np.array([first[unit]]), seed, 1 + fold)[0]))

        fold = min(range(folds), key=merit)
        found[unit] = fold
        left.discard(unit)
        size[fold] -= len(units[unit])
        for one in range(classes):
            wanted[fold][one] -= has(unit, one)

    def turn(unit):
        return (-len(units[unit]), int(hash_ids(np.array([first[unit]]), seed, -1)[0]))

    while left:
        remaining = {label: sum(has(unit, label) for unit in left) for label in range(classes)}
        remaining = {label: number for label, number in remaining.items() if number}
        label = min(remaining, key=lambda one: (remaining[one], one)) if remaining else None
        for unit in sorted(left, key=turn):
            if label is None or has(unit, label):
                place(unit, label)
    by_row = {row: found[unit] for unit, rows in enumerate(units) for row in rows}
    return [by_row[row] for row in range(len(targets))]


@settings(max_examples=60, deadline=None)
@given(labelled())
def test_folds_are_those_of_the_paper(case):
    targets, ids, groups, folds, seed = case
    assert iterative_folds(targets, ids, folds, seed, groups).tolist() == slow_folds(targets, ids, folds, seed, groups)
    single = np.arange(len(targets))
    if folds <= len(targets):
        assert iterative_folds(targets, ids, folds, seed).tolist() == slow_folds(targets, ids, folds, seed, single)


@settings(max_examples=60, deadline=None)
@given(labelled())
def test_groups_stay_whole_and_the_order_of_rows_does_not_matter(case):
    targets, ids, groups, folds, seed = case
    found = iterative_folds(targets, ids, folds, seed, groups)
    assert all(len(set(found[groups == one].tolist())) == 1 for one in set(groups.tolist()))
    assert set(found.tolist()) <= set(range(folds))
    order = np.random.default_rng(seed).permutation(len(ids))
    again = iterative_folds(targets[order], ids[order], folds, seed, 7 - groups[order])
    assert again.tolist() == found[order].tolist()


def test_a_small_case_by_hand():
    """Label 1 is the rarest: its two images part; then those of label 0 make up for it, then the one without labels."""
    targets = np.array([[1, 1], [1, 1], [1, 0], [1, 0], [0, 0], [0, 0]], dtype=bool)
    for seed in range(20):
        fold = iterative_folds(targets, np.arange(6), 2, seed)
        assert [set(fold[pair].tolist()) for pair in ([0, 1], [2, 3], [4, 5])] == [{0, 1}] * 3


def spread(targets, fold, folds):
    """Over labels: how far the counts in folds are from equal, as a share of their mean."""
    counts = np.stack([targets[fold == number].sum(0) for number in range(folds)])
    return (counts.std(0) / counts.mean(0)).tolist()


def test_labels_are_balanced_better_than_by_chance():
    mosaics = make_mosaics(1000, decay=0.6)
    random = np.random.default_rng(0)
    drawn = np.mean([spread(mosaics.targets, random.permutation(1000) % 5, 5) for _ in range(20)], axis=0)
    for seed in range(5):
        fold = iterative_folds(mosaics.targets, np.arange(1000), 5, seed)
        counts = np.stack([mosaics.targets[fold == number].sum(0) for number in range(5)])
        rare = mosaics.targets.sum(0).argsort()[:3]
        assert (np.ptp(counts[:, rare], axis=0) <= 2).all(), "the rare ones in all but equal numbers"
        assert np.mean(spread(mosaics.targets, fold, 5)) < 0.35 * drawn.mean()
        assert np.ptp(np.bincount(fold)) <= 25


def test_groups_are_balanced_better_than_by_chance():
    mosaics = make_mosaics(1200, decay=0.6, group_size=4)
    random = np.random.default_rng(0)
    drawn = [spread(mosaics.targets, (random.permutation(300) % 5)[mosaics.groups], 5) for _ in range(20)]
    fold = iterative_folds(mosaics.targets, np.arange(1200), 5, 0, mosaics.groups)
    assert np.mean(spread(mosaics.targets, fold, 5)) < 0.5 * np.mean(drawn)


def test_other_seeds_other_folds_and_the_same_again():
    mosaics = make_mosaics(200)
    drawn = [tuple(iterative_folds(mosaics.targets, np.arange(200), 5, seed)) for seed in (0, 1, 2, 0)]
    assert len(set(drawn)) == 3
    assert drawn[0] == drawn[3]


@pytest.mark.parametrize(("folds", "groups"), [(1, None), (7, None), (3, np.array([0, 0, 1, 1, 1, 0]))])
def test_folds_that_cannot_be(folds, groups):
    with pytest.raises(ValueError, match="cannot be cut"):
        iterative_folds(np.ones((6, 2), dtype=bool), np.arange(6), folds, 0, groups)
