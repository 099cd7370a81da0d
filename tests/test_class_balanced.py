"""Which samples make a batch: class-balanced batches, and schedules over some samples only."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.images.order import order
from stages.images.schedule import Among, ClassBalanced, Shuffled, class_key

UNBALANCED = np.repeat([0, 1, 2, 3, 5, 6, 9], [1, 2, 3, 40, 41, 57, 100])[np.random.default_rng(0).permutation(244)]


def blocks(schedule: ClassBalanced, labels: np.ndarray, images: int, epoch: int = 0) -> np.ndarray:
    """Positions of an epoch: [steps, P, K], each block of one class."""
    steps = range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch)
    found = np.stack([schedule.positions(step) for step in steps])
    found = found.reshape(len(found), -1, images)
    assert (labels[found] == labels[found][:, :, :1]).all(), "the images of a class stand side by side"
    return found


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(0, 7), min_size=2, max_size=150).map(np.array),
    st.integers(1, 8),
    st.integers(1, 6),
    st.integers(0, 2**31),
)
def test_batches_are_p_different_classes_with_k_images(
    labels: np.ndarray, classes: int, images: int, seed: int
) -> None:
    classes = min(classes, len(np.unique(labels)))
    schedule = ClassBalanced(seed, labels, classes, images)
    assert schedule.steps_per_epoch == max(1, len(labels) // (classes * images))
    for epoch in (0, 3):
        found = blocks(schedule, labels, images, epoch)
        assert found.shape[1] == classes
        for batch in labels[found][:, :, 0]:
            assert len(set(batch)) == classes
        counts = np.bincount(labels)
        for block in found.reshape(-1, images):
            there = counts[labels[block[0]]]
            assert len(set(block)) == min(images, there), "no image comes again before all of its class were there"
            assert np.bincount(block, minlength=len(labels)).max() == -(-images // there)


def windows_by_loops(key: int, length: int, window: int, count: int) -> list[np.ndarray]:
    """Permutation after permutation, cut into windows; one that lacks some takes the first that it has not."""
    found: list[np.ndarray] = []
    left, turn = np.empty(0, dtype=np.int64), 0
    while len(found) < count:
        fresh = order(key, turn, length)[:]
        if len(left):
            added = fresh[np.isin(fresh, left, invert=True)][: window - len(left)]
            found.append(np.concatenate([left, added]))
            fresh = fresh[np.isin(fresh, added, invert=True)]
        while len(fresh) >= window:
            found.append(fresh[:window])
            fresh = fresh[window:]
        left = fresh
        turn += 1
    return found[:count]


def epoch_by_loops(seed: int, labels: np.ndarray, classes: int, images: int, epoch: int) -> list[list[int]]:
    """An epoch's batches, class by class."""
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    steps = max(1, len(labels) // (classes * images))
    chosen = windows_by_loops(class_key(seed, epoch, -1), len(members), classes, steps)
    visits = [sum(number in one for one in chosen) for number in range(len(members))]
    drawn = [
        iter(windows_by_loops(class_key(seed, epoch, number), len(own), min(images, len(own)), visits[number]))
        for number, own in enumerate(members)
    ]
    batches = []
    for one in chosen:
        batch: list[int] = []
        for number in one.tolist():
            places = next(drawn[number])
            batch += [int(members[number][places[image % len(places)]]) for image in range(images)]
        batches.append(batch)
    return batches


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=200).map(np.array),
    st.integers(1, 13),
    st.integers(1, 9),
    st.integers(0, 2**31),
    st.integers(0, 5),
)
def test_batches_are_those_of_loops(labels: np.ndarray, classes: int, images: int, seed: int, epoch: int) -> None:
    classes = min(classes, len(np.unique(labels)))
    schedule = ClassBalanced(seed, labels, classes, images)
    steps = range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch)
    found = [schedule.positions(step).tolist() for step in steps]
    assert found == epoch_by_loops(seed, labels, classes, images, epoch)


def test_batches_of_many_classes_are_those_of_loops() -> None:
    random = np.random.default_rng(0)
    labels = random.choice(300, 5000, p=random.dirichlet(np.full(300, 0.5)))  # some of hundreds, some of one image
    schedule = ClassBalanced(3, labels, 20, 4)
    found = [schedule.positions(step).tolist() for step in range(schedule.steps_per_epoch)]
    assert found == epoch_by_loops(3, labels, 20, 4, 0)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 7), st.integers(1, 5), st.integers(0, 9))
def test_classes_come_equally_often_and_so_do_their_images(seed: int, classes: int, images: int, epoch: int) -> None:
    found = blocks(ClassBalanced(seed, UNBALANCED, classes, images), UNBALANCED, images, epoch)
    visits = np.bincount(UNBALANCED[found][:, :, 0].ravel(), minlength=10)[np.unique(UNBALANCED)]
    assert visits.max() - visits.min() <= 1
    drawn = np.bincount(found.ravel(), minlength=len(UNBALANCED))
    for label in np.unique(UNBALANCED):
        of_class = drawn[label == UNBALANCED]
        if len(of_class) >= images:
            assert of_class.max() - of_class.min() <= 1


def test_a_step_is_the_same_whatever_was_asked_before() -> None:
    one, other = (ClassBalanced(4, UNBALANCED, 3, 4) for _ in range(2))
    steps = 3 * one.steps_per_epoch
    forwards = [one.positions(step).tolist() for step in range(steps)]
    backwards = [other.positions(step).tolist() for step in reversed(range(steps))]
    assert forwards == backwards[::-1]
    per_epoch = one.steps_per_epoch
    assert forwards[:per_epoch] != forwards[per_epoch : 2 * per_epoch]
    assert forwards != [ClassBalanced(5, UNBALANCED, 3, 4).positions(step).tolist() for step in range(steps)]


def test_over_epochs_every_image_has_its_turn() -> None:
    schedule = ClassBalanced(0, UNBALANCED, 3, 4)
    drawn = np.bincount(
        np.concatenate([schedule.positions(step) for step in range(40 * schedule.steps_per_epoch)]), minlength=244
    )
    largest = drawn[UNBALANCED == 9]  # of 100 images some 34 an epoch
    assert largest.min() > 0
    assert 2 < largest.std() < 4  # binomial: 3


def test_the_batches_stay_what_they_were() -> None:
    """Changed ones would silently change every training run."""
    assert ClassBalanced(0, UNBALANCED, 2, 3).positions(17).tolist() == [193, 37, 33, 162, 168, 36]


@pytest.mark.parametrize("classes", [0, 8])
def test_more_classes_than_there_are_is_refused(classes: int) -> None:
    with pytest.raises(ValueError, match="1 to 7"):
        ClassBalanced(0, UNBALANCED, classes, 2)


def test_a_schedule_among_some_samples_gives_their_positions() -> None:
    chosen = np.array([3, 8, 21, 40, 41])
    schedule = Among(chosen, Shuffled(2, 5, 2))
    assert schedule.steps_per_epoch == 2
    assert schedule.positions(3).tolist() == chosen[Shuffled(2, 5, 2).positions(3)].tolist()


def test_an_epoch_is_drawn_once_by_whoever_reads_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    draw = ClassBalanced._draw

    def counted(self: ClassBalanced, epoch: int) -> np.ndarray:
        drawn.append(epoch)
        return draw(self, epoch)

    monkeypatch.setattr(ClassBalanced, "_draw", counted)
    schedule = ClassBalanced(0, np.arange(40) % 4, 2, 5)
    for step in range(3 * schedule.steps_per_epoch):
        schedule.positions(step + 1)  # who reads ahead
        schedule.positions(step)
    assert drawn == [0, 1, 2, 3]
