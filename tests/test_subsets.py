"""Which samples a measurement may use: nested, stratified, and a function of ids alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.evaluation import held_out, label_subset, stratified_folds

labellings = st.tuples(
    st.lists(st.integers(0, 6), min_size=2, max_size=120).map(np.array), st.integers(0, 2**31), st.integers(0, 3)
)


def unbalanced():
    labels = np.repeat([0, 1, 2, 4], [500, 300, 150, 50])
    return labels, 7 * np.arange(len(labels)) + 3


@given(labellings, st.floats(0.001, 1), st.floats(0.001, 1))
def test_subsets_are_nested_with_at_least_one_of_each_class(labelling, one, other):
    labels, seed, index = labelling
    ids = np.arange(len(labels))
    small, large = (label_subset(labels, ids, fraction, seed, index) for fraction in sorted([one, other]))
    assert set(small) <= set(large)
    assert set(labels[small]) == set(labels)
    assert len(large) == max(len(set(labels)), round(max(one, other) * len(labels)))
    assert (np.diff(large) > 0).all()


def test_subsets_keep_the_shares_of_classes():
    labels, ids = unbalanced()
    for fraction in (0.1, 0.2, 0.5):
        chosen = np.bincount(labels[label_subset(labels, ids, fraction, seed=0)], minlength=5)
        assert np.abs(chosen - fraction * np.bincount(labels)).max() <= 1
    assert np.bincount(labels[label_subset(labels, ids, 0.01, seed=0)]).tolist() == [5, 3, 1, 0, 1]


def test_all_labels_are_all_samples():
    labels, ids = unbalanced()
    assert label_subset(labels, ids, 1.0, seed=3).tolist() == list(range(len(labels)))


def test_subsets_of_other_seeds_and_indices_differ():
    labels, ids = unbalanced()
    drawn = [tuple(label_subset(labels, ids, 0.1, seed, index)) for seed in (0, 1) for index in (0, 1, 2)]
    assert len(set(drawn)) == 6
    overlap = len(set(drawn[0]) & set(drawn[1]))
    assert overlap < 30  # 10 expected of 100


def test_every_sample_is_as_likely():
    labels, ids = np.zeros(200, dtype=int), np.arange(200)
    counts = np.zeros(200)
    for index in range(300):
        counts[label_subset(labels, ids, 0.1, 0, index)] += 1
    assert counts.mean() == 30
    assert 4 < counts.std() < 6.5  # binomial: 5.2


@given(labellings)
def test_a_sample_is_chosen_by_its_id_wherever_it_stands(labelling):
    labels, seed, index = labelling
    ids = np.arange(len(labels)) * 11
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = ids[label_subset(labels, ids, 0.3, seed, index)]
    assert set(chosen) == set(ids[order][label_subset(labels[order], ids[order], 0.3, seed, index)])
    part = ids[held_out(labels, ids, 0.3, seed)]
    assert set(part) == set(ids[order][held_out(labels[order], ids[order], 0.3, seed)])
    fold = dict(zip(ids, stratified_folds(labels, ids, 2, seed, index), strict=True))
    again = dict(zip(ids[order], stratified_folds(labels[order], ids[order], 2, seed, index), strict=True))
    assert fold == again


def test_pinned_so_that_later_versions_choose_the_same():
    labels, ids = np.arange(40) % 4, np.arange(100, 140)
    assert label_subset(labels, ids, 0.2, seed=0).tolist() == [0, 6, 21, 22, 23, 25, 31, 32]
    assert np.flatnonzero(held_out(labels, ids, 0.1, seed=0)).tolist() == [0, 13, 27, 38]
    assert stratified_folds(labels, ids, 4, seed=0).tolist()[:12] == [0, 3, 3, 0, 1, 2, 2, 1, 0, 0, 1, 3]


@given(labellings, st.floats(0.05, 0.6))
def test_held_out_part_leaves_one_of_each_class(labelling, fraction):
    labels, seed, _ = labelling
    mask = held_out(labels, np.arange(len(labels)), fraction, seed)
    assert set(labels[~mask]) == set(labels)
    assert mask.any() == (len(set(labels)) < len(labels))
    assert mask.sum() <= max(1, round(fraction * len(labels)))


def test_held_out_part_is_a_stratified_tenth():
    labels, ids = unbalanced()
    assert np.bincount(labels[held_out(labels, ids, 0.1, seed=0)]).tolist() == [50, 30, 15, 0, 5]


@given(labellings, st.integers(2, 6))
def test_folds_are_even_and_stratified(labelling, folds):
    labels, seed, index = labelling
    if folds > len(labels):
        with pytest.raises(ValueError, match="folds"):
            stratified_folds(labels, np.arange(len(labels)), folds, seed, index)
        return
    fold = stratified_folds(labels, np.arange(len(labels)), folds, seed, index)
    sizes = np.bincount(fold, minlength=folds)
    assert sizes.max() - sizes.min() <= 1
    for label in set(labels):
        counts = np.bincount(fold[labels == label], minlength=folds)
        assert counts.max() - counts.min() <= 1


def test_folds_are_independent_of_subsets():
    """What a subset was chosen by must not order its folds."""
    labels, ids = np.zeros(1000, dtype=int), np.arange(1000)
    chosen = label_subset(labels, ids, 0.5, seed=0)
    fold = stratified_folds(labels, ids, 2, seed=0)
    assert 0.4 < fold[chosen].mean() < 0.6


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01])
def test_refuses_fractions_outside(fraction):
    with pytest.raises(ValueError, match="fraction"):
        label_subset(np.array([0, 1]), np.array([0, 1]), fraction, seed=0)
