"""Label sets as rows of bool, and batches of samples that have several labels each."""

from collections import Counter

import numpy as np
import pytest

from stages.images.batch_plan import Batches, Labelled, Plan, Unplannable, begin_with, label_samples, plan_batches
from stages.images.targets import Targets
from stages.labels.sets import multi_hot, name_rows, rarest_labels, set_numbers

CLASSES = ("ant", "bee", "cat", "dog", "eel")
RANDOM = np.random.default_rng(0)
SETS = RANDOM.random((90, 5)) < np.array([0.6, 0.4, 0.15, 0.0, 0.05])
SETS[:2] = [[False, False, True, False, False], [False, False, False, False, True]]
SETS = SETS[SETS.any(axis=1)]
POSITIONS = 100 + 2 * np.arange(len(SETS))
ASKED = Batches("p_by_k", 24, 3, 4, 2, 0.5, 0, "repeat")


def samples(negative_only: tuple[str, ...] = (), mirror: bool = False, sets: np.ndarray = SETS) -> Labelled:
    return label_samples(POSITIONS[: len(sets)], sets, CLASSES, negative_only, mirror)


def drawn(plan: Plan, steps: int) -> np.ndarray:
    """[steps, batch], positions in plan.samples."""
    found = np.stack([plan.schedule.positions(step) for step in range(steps)])
    assert found.shape == (steps, plan.batch_size)
    return found


# Sets


def test_lists_and_rows_say_the_same() -> None:
    lists = [[2, 0], [], [1], [0, 1, 2]]
    assert [np.flatnonzero(row).tolist() for row in multi_hot(lists, 4)] == [sorted(one) for one in lists]
    assert multi_hot([], 3).shape == (0, 3)


def test_rows_are_named_by_all_their_labels() -> None:
    assert name_rows([[2, 0], [], [1], [3, 3]], CLASSES) == ["ant|cat", None, "bee", "dog"]


def test_the_rarest_label_is_that_of_the_fewest_samples() -> None:
    counts = SETS.sum(axis=0).tolist()
    empty = np.concatenate([SETS, np.zeros((1, 5), dtype=bool)])
    for row, found in zip(empty, rarest_labels(empty).tolist(), strict=True):
        own = np.flatnonzero(row).tolist()
        assert found == (min(own, key=lambda label: (counts[label], label)) if own else -1)


def test_equal_sets_have_equal_numbers() -> None:
    wide = RANDOM.random((60, 19)) < 0.08
    numbers = set_numbers(wide)
    for one, number in zip(wide, numbers, strict=True):
        for other, other_number in zip(wide, numbers, strict=True):
            assert (number == other_number) == bool((one == other).all())
        assert (number < 0) == (not one.any())


def test_targets_of_several_labels() -> None:
    targets = Targets(np.concatenate([SETS, np.zeros((1, 5), dtype=bool)]), CLASSES)
    assert targets.are_several
    assert targets.known.tolist() == [True] * len(SETS) + [False]
    assert targets.present(np.array([0, 1])).tolist() == [2, 4]
    assert targets.names(np.arange(len(SETS))) == ["|".join(np.array(CLASSES)[row]) for row in SETS]
    assert targets.strata(np.array([3, 0])).tolist() == rarest_labels(SETS[[3, 0]]).tolist()


# Samples


def test_classes_without_an_image_get_no_number_and_negative_only_ones_do_not_count() -> None:
    found = samples()
    assert found.names == ("ant", "bee", "cat", "eel")
    assert found.counts.tolist() == SETS.sum(axis=0)[[0, 1, 2, 4]].tolist()
    assert found.known.all()
    less = samples(("ant", "eel"))
    assert less.names == ("bee", "cat")
    assert less.labels.tolist() == SETS[:, [1, 2]].tolist()
    assert less.known.tolist() == SETS[:, [1, 2]].any(axis=1).tolist()
    assert len(less) == len(SETS), "they are there"


def test_mirrored_images_have_labels_of_their_own() -> None:
    plain, both = samples(), samples(mirror=True)
    assert both.names == (*plain.names, *(f"{name}, mirrored" for name in plain.names))
    assert both.mirrored.tolist() == [False] * len(plain) + [True] * len(plain)
    assert both.labels[: len(plain), :4].tolist() == both.labels[len(plain) :, 4:].tolist() == plain.labels.tolist()
    assert not both.labels[: len(plain), 4:].any()
    assert not both.labels[len(plain) :, :4].any()


def test_an_image_stands_under_each_label_that_it_has() -> None:
    rows, classes = samples().memberships(by_set=False)
    wanted = [(row, label) for row, own in enumerate(samples().labels) for label in np.flatnonzero(own).tolist()]
    assert [*zip(rows.tolist(), classes.tolist(), strict=True)] == wanted
    rows, sets = samples().memberships(by_set=True)
    assert rows.tolist() == [*range(len(SETS))]
    assert sets.tolist() == set_numbers(samples().labels).tolist()


# Batches


def test_p_by_k_draws_images_that_have_the_label() -> None:
    plan = plan_batches(3, samples(), ASKED)
    assert plan.schedule.steps_per_epoch == len(SETS) // 12, "an epoch shows as many images as there are"
    assert plan.repeats == plan.batch_size == 12
    shown: Counter[int] = Counter()
    for batch in drawn(plan, 40):
        shared = [plan.samples.labels[block].all(axis=0) for block in batch.reshape(3, 4)]
        assert all(one.any() for one in shared), "the K images of a class have a label in common"
        shown.update(int(one.argmax()) for one in shared if one.sum() == 1)
    assert set(shown) <= {0, 1, 2, 3}
    assert min(shown[label] for label in (2, 3)) > 10, "rare labels come as often as others"


def test_p_by_k_of_equal_sets_draws_images_of_one_set() -> None:
    plan = plan_batches(3, samples(), Batches("p_by_k", 24, 3, 4, 2, 0.5, 0, "repeat", by_set=True))
    lone = (np.unique(set_numbers(SETS), return_counts=True)[1] == 1).sum()
    assert f"{lone} of {len(np.unique(set_numbers(SETS)))} sets of labels are of a single image" in plan.notes[0]
    for batch in drawn(plan, 30):
        blocks = plan.samples.labels[batch].reshape(3, 4, -1)
        assert (blocks == blocks[:, :1]).all()
        assert len({one[0].tobytes() for one in blocks}) == 3


def test_balanced_draws_labels_equally_often() -> None:
    plan = plan_batches(3, samples(("eel",)), Batches("balanced", 20, 3, 4, 2, 0.5, 0, "repeat"))
    assert plan.repeats == 20
    steps = plan.schedule.steps_per_epoch
    assert steps == int(samples(("eel",)).known.sum()) // 20
    counts = plan.samples.labels[drawn(plan, 5 * steps)].sum(axis=(0, 1))
    assert counts.min() >= 5 * steps * 20 // 3 - 5, "each label is drawn in a third of the places"
    assert plan.samples.known.all()


def test_shuffled_shows_every_image_once() -> None:
    plan = plan_batches(3, samples(), Batches("shuffled", 10, 3, 4, 2, 0.5, 0, "repeat"))
    shown = drawn(plan, plan.schedule.steps_per_epoch).ravel()
    assert len(set(shown.tolist())) == len(shown) == len(SETS) // 10 * 10
    assert plan.repeats == 1


def test_negatives_have_no_label() -> None:
    plan = plan_batches(3, samples(("ant",)), Batches("p_by_k", 24, 2, 3, 2, 0.5, 5, "repeat"))
    for batch in drawn(plan, 9):
        assert not plan.samples.known[batch[6:]].any()
        assert plan.samples.known[batch[:6]].all()


@pytest.mark.parametrize("kept", ["repeat", "drop", "negative"])
def test_labels_of_a_single_image(kept: str) -> None:
    sets = SETS.copy()
    sets[:, 4] = False
    sets[1, 4] = sets[5, 3] = True  # image 1 has that label alone, image 5 has others too
    sets[5, 0] = True
    plan = plan_batches(0, samples(sets=sets), Batches("p_by_k", 24, 3, 4, 2, 0.5, 0, kept))  # type: ignore[arg-type]
    assert "2 of 5 classes have a single image ('dog', 'eel')" in plan.notes[0]
    if kept == "repeat":
        assert plan.samples.names == CLASSES
        return
    assert plan.samples.names == ("ant", "bee", "cat")
    there = sets[:, :3].any(axis=1)
    assert len(plan.samples) == (there.sum() if kept == "drop" else len(sets))
    assert plan.samples.known.sum() == there.sum()
    assert POSITIONS[5] in plan.samples.positions


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Batches("pairs", 24, 3, 4, 2, 0.5, 0, "repeat"), "sampler: pairs is for images with one label each"),
        (Batches("hierarchical", 24, 3, 4, 2, 0.5, 0, "repeat"), "sampler: hierarchical is for images with one label"),
        (
            Batches("p_by_k", 24, 3, 4, 2, 0.5, 0, "drop", by_set=True),
            "classes_of_one: drop is for classes, and batches are of equal sets of labels",
        ),
    ],
)
def test_what_several_labels_cannot_give_is_one_line(asked: Batches, message: str) -> None:
    with pytest.raises(Unplannable, match=message) as caught:
        plan_batches(0, samples(), asked)
    assert "\n" not in str(caught.value)


def test_a_curriculum_is_for_one_label() -> None:
    with pytest.raises(Unplannable, match="curriculum: is for images with one label each"):
        begin_with(0, plan_batches(0, samples(), ASKED), ASKED, 3, 10)
