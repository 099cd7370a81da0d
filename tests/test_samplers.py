"""Schedules for labels: classes equally often, classes of classes, one after another, and with others beside."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.images.samplers import Balanced, Hierarchical, Then, WithMore
from stages.images.schedule import ClassBalanced, Schedule, Shuffled

UNEQUAL = np.repeat([0, 1, 3, 4, 8], [1, 2, 7, 90, 400])[np.random.default_rng(0).permutation(500)]
# 24 classes of 6 to 11 images; 6 parents have 5, 1, 7, 3, 6 and 2 of them.
CLASSES_OF_PARENTS = np.repeat(np.arange(6), [5, 1, 7, 3, 6, 2])
LABELS = np.random.default_rng(1).permutation(np.repeat(np.arange(24), 6 + np.arange(24) % 6))
PARENTS = 10 * CLASSES_OF_PARENTS[LABELS]


def epoch_of(schedule: Schedule, epoch: int = 0) -> np.ndarray:
    """[steps, batch]"""
    steps = schedule.steps_per_epoch
    return np.stack([schedule.positions(step) for step in range(epoch * steps, (epoch + 1) * steps)])


def counts_of(values: np.ndarray, among: np.ndarray) -> np.ndarray:
    found = Counter(values.ravel().tolist())
    return np.array([found[value] for value in among.tolist()])


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=120).map(np.array),
    st.integers(1, 150),
    st.integers(0, 2**31),
    st.integers(0, 5),
)
def test_classes_come_equally_often_and_so_do_their_images(
    labels: np.ndarray, batch_size: int, seed: int, epoch: int
) -> None:
    schedule = Balanced(seed, labels, batch_size)
    drawn = epoch_of(schedule, epoch)
    assert drawn.shape == (max(1, len(labels) // batch_size), batch_size)
    of_classes = counts_of(labels[drawn], np.unique(labels))
    assert of_classes.max() - of_classes.min() <= 1
    for label in np.unique(labels):
        of_images = counts_of(drawn, np.flatnonzero(labels == label))
        assert of_images.max() - of_images.min() <= 1


def test_very_unequal_classes_are_drawn_alike() -> None:
    schedule = Balanced(0, UNEQUAL, 50)
    drawn = epoch_of(schedule)
    assert counts_of(UNEQUAL[drawn], np.unique(UNEQUAL)).tolist() == [100] * 5
    assert counts_of(drawn, np.flatnonzero(UNEQUAL == 0)).tolist() == [100]
    assert set(counts_of(drawn, np.flatnonzero(UNEQUAL == 3))) == {14, 15}
    # Of the largest another quarter each epoch: over epochs all have their turn.
    seen = np.unique(np.concatenate([epoch_of(schedule, epoch).ravel() for epoch in range(70)]))
    assert len(seen) == 500


def test_balanced_batches_are_mixed() -> None:
    drawn = UNEQUAL[epoch_of(Balanced(0, UNEQUAL, 50))]
    assert all(len(set(batch)) == 5 for batch in drawn.tolist()), "10 of each on average"
    first, second = (epoch_of(Balanced(0, UNEQUAL, 50), epoch) for epoch in (0, 1))
    assert not np.array_equal(first, second)


# Classes of classes


def blocks(schedule: Hierarchical, steps: int, images: int) -> np.ndarray:
    """[steps, P, K], each block of one class."""
    found = np.stack([schedule.positions(step) for step in range(steps)]).reshape(steps, -1, images)
    assert (LABELS[found] == LABELS[found][:, :, :1]).all()
    return found


@pytest.mark.parametrize(
    ("classes", "images", "parents", "share"), [(4, 3, 2, 2), (6, 2, 3, 2), (7, 4, 2, 3), (2, 2, 2, 1), (5, 9, 1, 5)]
)
def test_a_batch_has_the_classes_of_few_parents(classes: int, images: int, parents: int, share: int) -> None:
    schedule = Hierarchical(3, LABELS, PARENTS, classes, images, parents)
    assert schedule.batch_size == parents * share * images
    found = blocks(schedule, 60, images)
    assert found.shape[1] == parents * share
    for batch in found:
        labels = LABELS[batch][:, 0]
        assert len(set(labels.tolist())) == parents * share, "different classes"
        above = Counter(CLASSES_OF_PARENTS[labels].tolist())
        assert len(above) == parents
        assert set(above.values()) == {share}
        for block in batch:
            there = (LABELS[block[0]] == LABELS).sum()
            assert len(set(block.tolist())) == min(images, there)
    large = [parent for parent in range(6) if np.count_nonzero(parent == CLASSES_OF_PARENTS) >= share]
    assert set(CLASSES_OF_PARENTS[LABELS[found]].ravel().tolist()) == set(large), "those with fewer are left out"


def test_parents_take_turns() -> None:
    found = blocks(Hierarchical(0, LABELS, PARENTS, 4, 2, 2), 200, 2)
    above = CLASSES_OF_PARENTS[LABELS[found][:, ::2, 0]]  # [steps, 2 parents]
    rounds = above.reshape(100, 4)  # five have two classes or more: two batches a round, and one is left over
    assert all(len(set(one)) == 4 for one in rounds.tolist())
    often = counts_of(rounds, np.array([0, 2, 3, 4, 5]))
    assert np.abs(often - 80).max() < 4.5 * np.sqrt(100 * 0.8 * 0.2), "who is left over is drawn"


def test_within_a_parent_classes_and_images_come_alike() -> None:
    found = blocks(Hierarchical(0, LABELS, PARENTS, 4, 2, 2), 400, 2)
    labels = LABELS[found][:, :, 0]
    for parent in (0, 2, 3, 4, 5):
        members = np.flatnonzero(parent == CLASSES_OF_PARENTS)
        often = counts_of(labels, members)
        assert np.abs(often - often.mean()).max() < 4.5 * np.sqrt(often.mean())
        for label in members:
            images = counts_of(found, np.flatnonzero(label == LABELS))
            assert np.abs(images - images.mean()).max() < 4.5 * np.sqrt(images.mean())


def test_classes_of_two_parents_meet_in_all_ways() -> None:
    """Parents that are built alike must not be drawn alike, or the same negatives come side by side for ever."""
    labels = np.repeat(np.arange(8), 4)
    schedule = Hierarchical(0, labels, labels // 4, 2, 2, 2)
    met = Counter(frozenset(labels[schedule.positions(step)].tolist()) for step in range(400))
    assert met.keys() == {frozenset((a, b)) for a in range(4) for b in range(4, 8)}
    assert max(met.values()) < 3 * min(met.values())


def test_an_epoch_is_of_the_images_of_parents_that_are_drawn() -> None:
    schedule = Hierarchical(0, LABELS, PARENTS, 6, 2, 2)
    images = np.isin(CLASSES_OF_PARENTS[LABELS], [0, 2, 3, 4]).sum()  # three classes or more
    assert schedule.steps_per_epoch == images // 12
    assert Hierarchical(0, LABELS, PARENTS, 6, 99, 2).steps_per_epoch == 1


@pytest.mark.parametrize(
    ("classes", "parents", "message"),
    [
        (2, 3, "2 classes a batch are fewer than 3 classes above"),
        (18, 3, "only 2 of the classes above have 6 classes or more; 3 are needed"),
        (16, 2, "only 0 of the classes above have 8 classes or more; 2 are needed"),
    ],
)
def test_too_few_classes_above(classes: int, parents: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Hierarchical(0, LABELS, PARENTS, classes, 2, parents)


# One after another, and one beside another


def test_then_begins_the_second_at_its_first_step() -> None:
    first, second = Shuffled(0, 10, 4), Shuffled(1, 100, 7)
    both = Then(first, 5, second)
    assert both.steps_per_epoch == second.steps_per_epoch == 14
    for step in range(30):
        wanted = first.positions(step) if step < 5 else second.positions(step - 5)
        assert both.positions(step).tolist() == wanted.tolist()
    assert Then(first, 0, second).positions(0).tolist() == second.positions(0).tolist()


def test_with_more_has_both_batches() -> None:
    first, more = Shuffled(0, 10, 4), Shuffled(1, 100, 7)
    both = WithMore(first, more)
    assert both.steps_per_epoch == first.steps_per_epoch == 2
    for step in range(30):
        assert both.positions(step).tolist() == [*first.positions(step), *more.positions(step)]


SCHEDULES = {
    "balanced": lambda seed: Balanced(seed, UNEQUAL, 30),
    "hierarchical": lambda seed: Hierarchical(seed, LABELS, PARENTS, 4, 3, 2),
    "then": lambda seed: Then(Balanced(seed, UNEQUAL, 30), 7, ClassBalanced(seed, UNEQUAL, 3, 10)),
    "with_more": lambda seed: WithMore(Balanced(seed, UNEQUAL, 30), Shuffled(seed, 50, 3)),
}


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_a_step_is_the_same_whatever_was_asked_before(name: str) -> None:
    one, other = SCHEDULES[name](4), SCHEDULES[name](4)
    steps = 3 * one.steps_per_epoch
    forwards = [one.positions(step).tolist() for step in range(steps)]
    for step in [*reversed(range(steps)), *np.random.default_rng(0).integers(0, steps, 10).tolist()]:
        assert other.positions(step).tolist() == forwards[step]
    assert forwards[: steps // 3] != forwards[steps // 3 : 2 * (steps // 3)]
    assert forwards != [SCHEDULES[name](5).positions(step).tolist() for step in range(steps)]


def test_the_batches_stay_what_they_were() -> None:
    """Changed ones would silently change every training run."""
    assert Balanced(0, UNEQUAL, 6).positions(100).tolist() == [268, 41, 161, 161, 426, 356]
    assert Hierarchical(0, LABELS, PARENTS, 4, 2, 2).positions(17).tolist() == [118, 85, 21, 38, 77, 69, 105, 138]
