"""All pairs of images: counts, numbers, and batches that are drawn from them without repetition."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.images.order import MAX_LENGTH
from stages.images.pairs import GivenPairs, Pairs, PairSet

LABELS = np.random.default_rng(0).permutation(np.repeat([-1, 0, 2, 3, 7], [4, 1, 2, 9, 14]))


def as_sets(pairs: np.ndarray) -> list[frozenset[int]]:
    return [frozenset(pair) for pair in pairs.tolist()]


def of_kind(labels: np.ndarray, same: bool) -> set[frozenset[int]]:
    """By a loop over all pairs: an image without a class is in negative ones only, with images that have one."""
    found = set()
    for a, b in itertools.combinations(range(len(labels)), 2):
        is_positive = labels[a] == labels[b] and labels[a] >= 0
        is_pair = labels[a] >= 0 or labels[b] >= 0
        if is_pair and is_positive == same:
            found.add(frozenset((a, b)))
    return found


@pytest.mark.parametrize("classes", [1, 2, 7, 100])
def test_a_hundred_images_have_4950_pairs(classes: int) -> None:
    pairs = PairSet(np.arange(100) % classes)
    assert len(pairs) == 4950
    assert len(set(as_sets(pairs[np.arange(4950)]))) == 4950
    positives = sum(math.comb(len(range(first, 100, classes)), 2) for first in range(classes))
    assert (pairs.positives, pairs.negatives) == (positives, 4950 - positives)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(-1, 5) | st.sampled_from([-7, 40, 2**40]), max_size=40).map(lambda one: np.array(one, int)))
def test_each_pair_has_one_number(labels: np.ndarray) -> None:
    pairs = PairSet(labels)
    listed = as_sets(pairs[np.arange(len(pairs))])
    positives, negatives = of_kind(labels, True), of_kind(labels, False)
    assert len(positives) == pairs.positives
    assert len(negatives) == pairs.negatives
    assert len(pairs) == len(listed) == len(set(listed))
    assert set(listed[: pairs.positives]) == positives
    assert set(listed[pairs.positives :]) == negatives


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=60).map(np.array))
def test_with_a_class_each_they_are_all_combinations(labels: np.ndarray) -> None:
    pairs = PairSet(labels)
    n = len(labels)
    assert len(pairs) == n * (n - 1) // 2
    assert set(as_sets(pairs[np.arange(len(pairs))])) == set(map(frozenset, itertools.combinations(range(n), 2)))


def test_numbers_may_be_asked_for_in_any_order_and_twice() -> None:
    pairs = PairSet(LABELS)
    whole = pairs[np.arange(len(pairs))]
    wanted = np.random.default_rng(1).integers(0, len(pairs), 500)
    assert np.array_equal(pairs[wanted], whole[wanted])
    assert pairs[np.empty(0, dtype=np.int64)].shape == (0, 2)


@pytest.mark.parametrize("number", [-1, len(PairSet(LABELS))])
def test_numbers_outside_are_refused(number: int) -> None:
    with pytest.raises(IndexError, match=f"from 0 to {len(PairSet(LABELS)) - 1}"):
        PairSet(LABELS)[np.array([0, number])]


def test_a_million_images_are_never_listed() -> None:
    """5e11 pairs would be 8 TB; where the rows of the triangle end, the square root is wrong if it is rounded."""
    images = 1_000_000
    pairs = PairSet(np.zeros(images, dtype=np.int64))
    assert len(pairs) == pairs.positives == 499_999_500_000
    rows = np.array([1, 2, 3, 65_537, 524_288, 999_998, 999_999])
    for row in rows.tolist():
        first, last = row * (row - 1) // 2, row * (row + 1) // 2 - 1
        assert pairs[np.array([first, last])].tolist() == [[row, 0], [row, row - 1]]
    mixed = PairSet(np.arange(images) % 3)
    ends = np.array([0, mixed.positives - 1, mixed.positives, len(mixed) - 1])
    assert len(mixed) == 499_999_500_000
    labels = mixed[ends] % 3
    assert (labels[:, 0] == labels[:, 1]).tolist() == [True, True, False, False]


def test_the_square_root_may_be_rounded_either_way() -> None:
    """Beyond 2^53 a number is not exact as a float; the pairs of a thousand million images have such numbers."""
    images = 2**30
    pairs = PairSet.__new__(PairSet)  # without the memory of so many labels
    pairs._starts, pairs._positives_before = np.array([0]), np.array([0, math.comb(images, 2)])
    assert math.comb(images, 2) < MAX_LENGTH
    rows = np.concatenate([np.arange(images - 2000, images), np.random.default_rng(0).integers(2**26, images, 2000)])
    for numbers, other in ((rows * (rows - 1) // 2, 0 * rows), (rows * (rows + 1) // 2 - 1, rows - 1)):
        assert np.array_equal(pairs._positive(numbers), np.stack([rows, other], axis=1))


# Batches of pairs


def batches(pairs: Pairs, steps: int, first: int = 0) -> np.ndarray:
    """[steps, pairs, 2]"""
    return np.stack([pairs.positions(step) for step in range(first, first + steps)]).reshape(steps, -1, 2)


def is_positive(labels: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    return (labels[drawn[..., 0]] == labels[drawn[..., 1]]) & (labels[drawn[..., 0]] >= 0)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.integers(1, 30), st.floats(0, 1))
def test_no_pair_comes_again_before_all_of_its_kind_have(seed: int, batch: int, share: float) -> None:
    drawn = batches(Pairs(seed, LABELS, batch, share), 40)
    positive = is_positive(LABELS, drawn)
    assert (positive.sum(axis=1) == round(share * batch)).all(), "the share of each batch"
    for same in (True, False):
        there = of_kind(LABELS, same)
        # Within a batch the order says nothing, so that the rounds are those of whole batches.
        of_batches = [as_sets(one[kind == same]) for one, kind in zip(drawn, positive, strict=True)]
        counts: Counter[frozenset[int]] = Counter()
        for one in of_batches:
            counts.update(one)
            assert counts.keys() <= there
            often = [counts[pair] for pair in there]
            assert max(often) - min(often) <= 1


def test_the_share_is_rounded_to_whole_pairs() -> None:
    for share, wanted in ((0.0, 0), (0.1, 1), (0.26, 3), (0.5, 5), (1.0, 10)):
        drawn = batches(Pairs(0, LABELS, 10, share), 5)
        assert (is_positive(LABELS, drawn).sum(axis=1) == wanted).all()


def test_neither_the_place_in_a_pair_nor_in_the_batch_tells_the_kind() -> None:
    labels = np.arange(200) // 20
    drawn = batches(Pairs(3, labels, 20, 0.5), 400)
    positive = is_positive(labels, drawn)
    places = positive.mean(axis=0)  # of each of the 20 places in the batch
    assert np.abs(places - 0.5).max() < 4.5 * math.sqrt(0.25 / 400)
    # In the order that the numbers give, all positives have the larger one first, and all negatives the smaller.
    for kind in (True, False):
        larger_first = (drawn[..., 0] > drawn[..., 1])[positive == kind]
        assert abs(larger_first.mean() - 0.5) < 4.5 * math.sqrt(0.25 / larger_first.size)


def test_a_step_is_the_same_whatever_was_asked_before() -> None:
    forwards = batches(Pairs(4, LABELS, 7, 0.4), 60)
    other = Pairs(4, LABELS, 7, 0.4)
    backwards = [other.positions(step).reshape(-1, 2) for step in reversed(range(60))]
    assert np.array_equal(forwards, backwards[::-1])
    assert not np.array_equal(forwards, batches(Pairs(5, LABELS, 7, 0.4), 60))
    far = Pairs(4, np.arange(10**6) % 1000, 64, 0.5)
    assert far.positions(10**9).shape == (128,)


def test_an_epoch_shows_as_many_images_as_there_are() -> None:
    assert Pairs(0, np.arange(100) % 10, 8, 0.5).steps_per_epoch == 6
    assert Pairs(0, np.arange(10) % 2, 8, 0.5).steps_per_epoch == 1
    pairs = Pairs(0, LABELS, 8, 0.5)
    assert (pairs.positives, pairs.negatives) == (len(of_kind(LABELS, True)), len(of_kind(LABELS, False)))


@pytest.mark.parametrize(
    ("labels", "share", "kind"),
    [([0, 1, 2, -1], 0.5, "positive"), ([4, 4, 4], 0.5, "negative"), ([-1, -1, 0], 1.0, "positive")],
)
def test_a_kind_that_there_is_none_of_is_refused(labels: list[int], share: float, kind: str) -> None:
    with pytest.raises(ValueError, match=f"there are no {kind} pairs among {len(labels)} images"):
        Pairs(0, np.array(labels), 4, share)


def test_a_kind_that_is_not_asked_for_need_not_be_there() -> None:
    assert is_positive(np.zeros(4), batches(Pairs(0, np.zeros(4, dtype=np.int64), 2, 1.0), 3)).all()
    assert not is_positive(np.arange(4), batches(Pairs(0, np.arange(4), 2, 0.0), 3)).any()


def test_the_batches_stay_what_they_were() -> None:
    """Changed ones would silently change every training run."""
    assert Pairs(0, LABELS, 3, 0.5).positions(17).tolist() == [12, 13, 3, 27, 23, 20]


# Pairs that are given


GIVEN = np.random.default_rng(1).integers(0, 50, (23, 2))
TARGETS = np.random.default_rng(2).random(23, dtype=np.float32)


def numbers_of(drawn: np.ndarray, targets: np.ndarray) -> list[int]:
    """Which of the given pairs these are, by their targets: of each, that its images are those of the pair."""
    numbers = [int(np.flatnonzero(target == TARGETS)[0]) for target in targets]
    assert [sorted(pair) for pair in drawn.tolist()] == [sorted(GIVEN[number].tolist()) for number in numbers]
    return numbers


def test_every_given_pair_comes_at_most_once_an_epoch_with_its_target() -> None:
    pairs = GivenPairs(0, GIVEN, TARGETS, 5)
    assert pairs.steps_per_epoch == 4
    epochs = []
    for epoch in range(60):
        steps = range(4 * epoch, 4 * epoch + 4)
        drawn = np.concatenate([pairs.positions(step).reshape(5, 2) for step in steps])
        epochs.append(numbers_of(drawn, np.concatenate([pairs.targets(step) for step in steps])))
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 60, "an order of its own for each"
    assert set.intersection(*map(set, epochs)) == set(), "what is left over is another part each time"
    whole = GivenPairs(0, GIVEN, TARGETS, 23)
    assert whole.steps_per_epoch == 1
    assert sorted(numbers_of(whole.positions(7).reshape(23, 2), whole.targets(7))) == [*range(23)]


def test_which_of_a_given_pair_comes_first_is_drawn() -> None:
    pairs = np.stack([np.arange(400), 400 + np.arange(400)], axis=1)
    given = GivenPairs(5, pairs, np.zeros(400, dtype=np.float32), 40)
    firsts = []
    for epoch in range(50):
        drawn = np.concatenate([given.positions(10 * epoch + step).reshape(40, 2) for step in range(10)])
        assert sorted((drawn % 400)[:, 0].tolist()) == [*range(400)]
        as_given = np.zeros(400, dtype=bool)
        as_given[drawn[:, 0] % 400] = drawn[:, 0] < 400
        firsts.append(as_given)
    found = np.array(firsts)
    deviation = math.sqrt(0.25 / 400)
    assert np.abs(found.mean(axis=1) - 0.5).max() < 4.5 * deviation, "in each epoch"
    assert np.abs(found.mean(axis=0) - 0.5).max() < 4.5 * math.sqrt(0.25 / 50), "and of each pair over epochs"
    assert np.array_equal(pairs, np.stack([np.arange(400), 400 + np.arange(400)], axis=1)), "what was given stays"


def test_a_step_of_given_pairs_is_the_same_whatever_was_asked_before() -> None:
    one, other = GivenPairs(3, GIVEN, TARGETS, 4), GivenPairs(3, GIVEN, TARGETS, 4)
    forwards = [(one.positions(step).tolist(), one.targets(step).tolist()) for step in range(30)]
    backwards = [(other.positions(step).tolist(), other.targets(step).tolist()) for step in reversed(range(30))]
    assert forwards == backwards[::-1]
    assert GivenPairs(4, GIVEN, TARGETS, 4).positions(0).tolist() != forwards[0][0]
