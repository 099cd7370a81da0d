"""Parts of whole groups: none is cut, sizes are near, every class stays, and groups of one sample change nothing."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedGroupKFold

from stages.evaluation import bootstrap_interval, held_out, stratified_folds
from stages.evaluation.groups import compose, hold_out_groups, number_groups


@st.composite
def grouped(draw, own_class: bool = False):
    """Labels, ids, groups and a seed; `own_class`: all samples of a group have one label."""
    size = draw(st.integers(2, 90))
    groups = np.array(draw(st.lists(st.integers(0, draw(st.integers(0, 40))), min_size=size, max_size=size)))
    labels = np.array(draw(st.lists(st.integers(0, 5), min_size=size, max_size=size)))
    if own_class:
        labels = np.array(draw(st.lists(st.integers(0, 5), min_size=41, max_size=41)))[groups]
    ids = np.random.default_rng(draw(st.integers(0, 99))).permutation(3 * size)[:size]
    return labels, ids, groups, draw(st.integers(0, 2**31))


def whole(mask, groups):
    return all(len(set(mask[groups == one].tolist())) == 1 for one in set(groups.tolist()))


@given(grouped(), st.floats(0.02, 0.6))
def test_held_out_part_cuts_no_group_and_leaves_every_class(case, fraction):
    labels, ids, groups, seed = case
    mask = held_out(labels, ids, fraction, seed, groups)
    assert whole(mask, groups)
    assert set(labels[~mask]) == set(labels)
    wanted, taken = max(1, round(fraction * len(labels))), mask.sum()
    alone = {one for one in set(labels.tolist()) if len(set(groups[labels == one].tolist())) == 1}
    free = [one for one in set(groups.tolist()) if not alone & set(labels[groups == one].tolist())]
    assert bool(taken) == bool(free), "empty only where each group is the only one of some class"
    sizes = [int((groups == one).sum()) for one in set(groups[mask].tolist())]
    assert taken < 2 * wanted or len(sizes) == 1, "each group taken brings the count nearer"
    if taken >= 2 * wanted:
        assert sizes[0] == min((groups == one).sum() for one in free), "the smallest possible"


def slow_held_out(labels, ids, groups, places, wanted):
    """All groups looked at in each round, with shares counted anew."""
    left, held = set(groups.tolist()), []
    first = {one: places[min(ids[groups == one].tolist())] for one in left}
    totals = Counter(labels.tolist())
    spread = {label: len(set(groups[labels == label].tolist())) for label in totals}
    while left and sum((groups == one).sum() for one in held) < wanted:
        chosen = Counter(labels[np.isin(groups, held)].tolist())
        total = sum(chosen.values())

        def share(one, chosen=chosen):
            inside = Counter(labels[groups == one].tolist())
            size = sum(inside.values())
            return sum(
                Fraction(n, size) * (Fraction(chosen[c], totals[c]) + Fraction(1, 2 * spread[c]))
                for c, n in inside.items()
            )

        best = min(left, key=lambda one: (share(one), first[one]))
        left.remove(best)
        inside = Counter(labels[groups == best].tolist())
        if sum(inside.values()) < 2 * (wanted - total) and all(chosen[c] + n < totals[c] for c, n in inside.items()):
            held.append(best)
    return np.isin(groups, held)


@given(grouped(), st.integers(1, 40))
def test_held_out_groups_are_those_of_a_slow_search(case, wanted):
    labels, ids, groups, seed = case
    composition = compose(labels, ids, groups)
    drawn = np.random.default_rng(seed).permutation(10 * len(ids))
    places = dict(zip(range(3 * len(ids)), drawn.tolist(), strict=False))
    expected = slow_held_out(labels, ids, groups, places, wanted)
    found = hold_out_groups(composition, np.array([places[one] for one in composition.first_ids]), wanted)
    if expected.any():
        assert (found[composition.group] == expected).all()


def test_held_out_groups_are_stratified():
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(200), random.integers(1, 20, 200))
    labels = groups % 5  # each group of one class
    mask = held_out(labels, np.arange(len(labels)), 0.2, 0, groups)
    assert mask.mean() == pytest.approx(0.2, abs=0.02)
    shares = np.bincount(labels[mask]) / np.bincount(labels)
    assert np.abs(shares - 0.2).max() < 0.05


@given(grouped(), st.integers(2, 6), st.integers(0, 3))
def test_folds_cut_no_group_and_are_as_even_as_groups_allow(case, folds, index):
    labels, ids, groups, seed = case
    if folds > len(set(groups.tolist())):
        with pytest.raises(ValueError, match=r"(samples|groups) cannot be cut"):
            stratified_folds(labels, ids, folds, seed, index, groups)
        return
    fold = stratified_folds(labels, ids, folds, seed, index, groups)
    assert whole(fold, groups)
    assert set(fold.tolist()) == set(range(folds)), "no fold is empty"


@given(grouped(own_class=True), st.integers(2, 6))
def test_every_class_of_two_groups_is_known_outside_every_fold(case, folds):
    labels, ids, groups, seed = case
    if folds > len(set(groups.tolist())):
        return
    fold = stratified_folds(labels, ids, folds, seed, 0, groups)
    for label in set(labels.tolist()):
        several = len(set(groups[labels == label].tolist())) > 1
        assert len(set(fold[labels == label].tolist())) > 1 or not several


def test_a_class_is_not_lost_to_even_sizes():
    """One huge group fills a fold; all that is small would go to the other."""
    labels = np.array([0] * 90 + [0, 1, 1])
    groups = np.array([0] * 90 + [1, 2, 3])
    fold = stratified_folds(labels, np.arange(93), 2, 0, 0, groups)
    assert fold[91] != fold[92]


def test_folds_are_about_as_stratified_as_those_of_scikit_learn():
    def unevenness(fold, labels):
        table = np.array([[((fold == k) & (labels == c)).sum() for c in range(6)] for k in range(5)])
        return float((table / np.bincount(labels, minlength=6) - 0.2).std())

    ours, theirs = [], []
    for seed in range(15):
        random = np.random.default_rng(seed)
        groups = random.integers(0, 60, 600)
        labels = (random.integers(0, 6, 60)[groups] + (random.random(600) < 0.3) * random.integers(0, 6, 600)) % 6
        ours.append(unevenness(stratified_folds(labels, np.arange(600), 5, seed, 0, groups), labels))
        fold = np.empty(600, dtype=int)
        for number, (_, rows) in enumerate(StratifiedGroupKFold(5).split(labels, labels, groups)):
            fold[rows] = number
        theirs.append(unevenness(fold, labels))
    assert np.mean(ours) < 1.1 * np.mean(theirs)


@given(grouped(), st.floats(0.02, 0.6), st.integers(2, 6))
def test_groups_of_one_sample_change_nothing(case, fraction, folds):
    labels, ids, _, seed = case
    own = np.random.default_rng(seed).permutation(len(labels))
    assert (held_out(labels, ids, fraction, seed, own) == held_out(labels, ids, fraction, seed)).all()
    if folds <= len(labels):
        fold = stratified_folds(labels, ids, folds, seed, 1, own)
        assert (fold == stratified_folds(labels, ids, folds, seed, 1)).all()
    right = (labels > 2).astype(float)
    assert bootstrap_interval(right, 50, seed, groups=own) == bootstrap_interval(right, 50, seed)


@given(grouped(), st.integers(2, 4))
def test_neither_order_nor_numbers_of_groups_decide(case, folds):
    labels, ids, groups, seed = case
    order = np.random.default_rng(seed).permutation(len(labels))
    renamed = 1000 - 7 * groups
    mask = held_out(labels, ids, 0.3, seed, groups)
    again = held_out(labels[order], ids[order], 0.3, seed, renamed[order])
    assert (mask[order] == again).all()
    if folds <= len(set(groups.tolist())):
        fold = stratified_folds(labels, ids, folds, seed, 0, groups)
        assert (fold[order] == stratified_folds(labels[order], ids[order], folds, seed, 0, renamed[order])).all()


def test_seeds_hold_out_other_groups():
    groups = np.arange(300) // 3
    masks = {tuple(held_out(groups % 4, np.arange(300), 0.2, seed, groups)) for seed in range(5)}
    assert len(masks) == 5


def test_groups_are_numbered_as_they_appear():
    assert number_groups(np.array([9, 4, 9, -1, 4])).tolist() == [0, 1, 0, 2, 1]


def test_cluster_bootstrap_equals_a_loop_over_groups():
    random = np.random.default_rng(2)
    values, groups = random.normal(size=60), random.integers(0, 12, 60)
    number, draws = number_groups(groups), np.random.Generator(np.random.PCG64(7))
    means = []
    for _ in range(200):
        drawn = draws.integers(0, number.max() + 1, number.max() + 1)
        means.append(np.concatenate([values[number == one] for one in drawn]).mean())
    expected = np.quantile(means, [0.025, 0.975])
    assert bootstrap_interval(values, 200, 7, groups=groups) == pytest.approx(tuple(expected))


def test_interval_of_groups_that_agree_is_that_of_their_number():
    """Ten frames of one video are one piece of evidence, not ten."""
    right = np.arange(100) < 70
    low, high = bootstrap_interval(np.repeat(right, 10), 2000, groups=np.repeat(np.arange(100), 10))
    narrow_low, narrow_high = bootstrap_interval(np.repeat(right, 10), 2000)
    assert (low, high) == pytest.approx(bootstrap_interval(right, 2000), abs=0.02)
    assert high - low > 2.5 * (narrow_high - narrow_low)
