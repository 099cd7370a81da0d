"""What a training learns from: labels of samples, batches of each sampler, what is said of them, and curricula."""

from collections import Counter
from dataclasses import replace
from itertools import chain
from typing import Literal

import numpy as np
import pytest

from stages.images.batch_plan import (
    Batches,
    Labelled,
    Plan,
    Unplannable,
    begin_with,
    label_samples,
    plan_batches,
    plan_given_pairs,
)
from stages.images.pairs import Pairs
from stages.images.samplers import Balanced
from stages.images.schedule import Shuffled

CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox")
COUNTS = {"ant": 9, "cat": 1, "dog": 4, "eel": 1, "fox": 7}  # no bee
LABELS = np.random.default_rng(0).permutation(np.repeat([CLASSES.index(name) for name in COUNTS], [*COUNTS.values()]))
POSITIONS = 100 + 3 * np.arange(len(LABELS))
ASKED = Batches("shuffled", 8, 3, 2, 2, 0.5, 0, "repeat")


def samples(negative_only: tuple[str, ...] = (), mirror: bool = False) -> Labelled:
    return label_samples(POSITIONS, LABELS, CLASSES, negative_only, mirror)


def drawn(plan: Plan, steps: int) -> np.ndarray:
    """[steps, batch], positions in plan.samples."""
    found = np.stack([plan.schedule.positions(step) for step in range(steps)])
    assert found.shape == (steps, plan.batch_size)
    return found


def names_in(plan: Plan, batch: np.ndarray) -> Counter[str]:
    labels = plan.samples.labels[batch].ravel().tolist()
    return Counter("-" if label < 0 else plan.samples.names[label] for label in labels)


# Labels


def test_classes_without_a_training_image_get_no_number() -> None:
    found = samples()
    assert found.names == ("ant", "cat", "dog", "eel", "fox")
    assert found.counts.tolist() == [9, 1, 4, 1, 7]
    assert len(found) == 22
    assert not found.mirrored.any()
    assert found.positions.tolist() == POSITIONS.tolist()
    assert [found.names[label] for label in found.labels] == [CLASSES[label] for label in LABELS]


def test_negative_only_classes_are_nobodys() -> None:
    found = samples(("fox", "cat"))
    assert found.names == ("ant", "dog", "eel")
    for label, own in zip(LABELS.tolist(), found.labels.tolist(), strict=True):
        wanted = CLASSES[label]
        assert own == -1 if wanted in ("fox", "cat") else found.names[own] == wanted
    assert found.counts.tolist() == [9, 4, 1]
    assert len(found) == 22, "they are there"


def test_mirrored_images_are_samples_of_other_classes() -> None:
    found = samples(("fox",), mirror=True)
    assert found.names == (
        "ant", "cat", "dog", "eel", "ant, mirrored", "cat, mirrored", "dog, mirrored", "eel, mirrored",
    )  # fmt: skip
    assert found.counts.tolist() == [9, 1, 4, 1] * 2
    plain, mirrored = found.only(~found.mirrored), found.only(found.mirrored)
    assert plain.positions.tolist() == mirrored.positions.tolist() == POSITIONS.tolist()
    assert np.array_equal(plain.labels, samples(("fox",)).labels)
    for one, other in zip(plain.labels.tolist(), mirrored.labels.tolist(), strict=True):
        assert other == (-1 if one == -1 else one + 4), "a mirrored image without a class has none either"


def test_some_samples_keep_their_numbers() -> None:
    found = replace(samples(), parents=LABELS % 2).only(np.isin(LABELS, [0, 5]))
    assert found.names == samples().names
    assert found.counts.tolist() == [9, 0, 0, 0, 7]
    assert found.parents is not None
    assert found.parents.tolist() == [label % 2 for label in LABELS.tolist() if label in (0, 5)]


@pytest.mark.parametrize(
    ("negative_only", "message"),
    [
        (("gnu", "fox"), "negative_only: no labelled training image is 'gnu'"),
        (("bee",), "negative_only: no labelled training image is 'bee'"),
        (("ant", "cat", "dog", "eel"), "negative_only leaves 1 classes to be told apart; two are needed"),
        (("ant", "cat", "dog", "eel", "fox"), "negative_only leaves 0 classes"),
    ],
)
def test_what_cannot_be_negative_only(negative_only: tuple[str, ...], message: str) -> None:
    for mirror in (False, True):
        with pytest.raises(Unplannable, match=message) as caught:
            samples(negative_only, mirror)
        assert caught.value.exit_code == 2


def test_a_hundred_thousand_classes_are_numbered_at_once() -> None:
    """Not by looking each up in a list of all: that would be five thousand million comparisons of names."""
    classes = [f"class {number}" for number in range(100_000)]
    found = label_samples(np.arange(100_000), np.arange(100_000), classes, ("class 7",), False)
    assert found.labels[:9].tolist() == [0, 1, 2, 3, 4, 5, 6, -1, 7]
    assert found.labels[-1] == 99_998


# Batches


def test_shuffled_batches_have_everything() -> None:
    plan = plan_batches(3, samples(("fox",)), ASKED)
    assert isinstance(plan.schedule, Shuffled)
    assert (plan.batch_size, plan.repeats, plan.unit, plan.notes) == (8, 1, 1, ())
    assert len(set(drawn(plan, 2).ravel().tolist())) == 16
    whole = plan_batches(3, samples(), replace(ASKED, batch_size=30))
    assert whole.batch_size == 22
    assert whole.notes == ("batches of 22: there are no more than 22 labelled images",)


def test_balanced_batches_leave_negatives_out() -> None:
    plan = plan_batches(3, samples(("fox",)), replace(ASKED, sampler="balanced", batch_size=30))
    assert isinstance(plan.schedule, Balanced)
    assert plan.notes == ("balanced: the 7 negative-only images are left out",)
    assert len(plan.samples) == 15
    assert plan.batch_size == 30, "more than there are: they are repeated"
    assert sorted(names_in(plan, drawn(plan, 1)[0]).values()) == [7, 7, 8, 8]
    assert plan_batches(3, samples(), replace(ASKED, sampler="balanced")).notes == ()


def test_given_pairs_and_their_targets_stay_together() -> None:
    pairs = np.array([[7, 3], [3, 90], [41, 7], [90, 90], [12, 3]])
    targets = np.array([0.0, 0.25, 0.5, 0.75, 1.0], dtype=np.float32)
    plan = plan_given_pairs(3, pairs, targets, 8)
    assert (plan.batch_size, plan.repeats, plan.unit) == (8, 8, 2)
    assert plan.notes == ("an epoch is of 4 pairs: the 1 that fill no batch are others each time",)
    assert plan.samples.positions.tolist() == [3, 7, 12, 41, 90]
    assert plan.samples.labels.tolist() == [-1] * 5
    assert (plan.samples.names, plan.samples.counts.tolist()) == ((), [])
    expected = {tuple(sorted(pair)): target for pair, target in zip(pairs.tolist(), targets.tolist(), strict=True)}
    for step in range(6):
        images = plan.images().positions(step).reshape(4, 2)
        whole = plan.answers(step, 0, 1)
        assert whole.dtype == np.float32
        assert [expected[tuple(sorted(pair))] for pair in images.tolist()] == whole.tolist()
        for ranks in (2, 4):
            rows = [plan.samples.positions[plan.rows(step, rank, ranks)] for rank in range(ranks)]
            answers = [plan.answers(step, rank, ranks) for rank in range(ranks)]
            assert np.array_equal(np.concatenate(rows), images.ravel())
            assert np.array_equal(np.concatenate(answers), whole)
            assert {len(answer) for answer in answers} == {4 // ranks}
    few = plan_given_pairs(3, pairs, targets, 20)
    assert (few.batch_size, few.notes) == (10, ("batches of 10: there are no more than 5 pairs",))


def test_of_labels_the_answers_are_labels() -> None:
    plan = plan_batches(3, samples(), ASKED)
    for rank in range(2):
        answers = plan.answers(1, rank, 2)
        assert answers.dtype == np.int64
        assert np.array_equal(answers, plan.samples.labels[plan.rows(1, rank, 2)])


def test_pairs_stay_on_one_process() -> None:
    plan = plan_batches(3, samples(("fox",)), replace(ASKED, sampler="pairs", batch_size=12))
    assert isinstance(plan.schedule, Pairs)
    assert (plan.batch_size, plan.repeats, plan.unit) == (12, 12, 2)
    positives = 36 + 6
    negatives = 15 * 14 // 2 - positives + 15 * 7
    assert plan.notes == (f"{positives} pairs of one class and {negatives} of two",)
    whole = drawn(plan, 1)[0]
    for ranks in (1, 2, 3):
        shares = [plan.rows(0, rank, ranks).tolist() for rank in range(ranks)]
        assert [*chain.from_iterable(shares)] == whole.tolist()
        assert all(len(share) % 2 == 0 for share in shares)
    with pytest.raises(Unplannable, match="sampler: pairs: there are no positive pairs among 2 images"):
        plan_batches(3, samples().only(np.isin(LABELS, [2, 4])), replace(ASKED, sampler="pairs"))


def test_groups_say_what_is_short() -> None:
    plan = plan_batches(3, samples(), replace(ASKED, sampler="p_by_k", classes_per_batch=7, images_per_class=5))
    assert (plan.batch_size, plan.repeats, plan.unit) == (25, 5, 1)
    alone, fewer, few = plan.notes
    assert alone.startswith("2 of 5 classes have a single image ('cat', 'eel'), whose only positives are other views")
    assert fewer == "batches of 5 classes with 5 images each: there are no more than 5 classes"
    assert few == ("3 of 5 classes have fewer than images_per_class = 5 images: a batch repeats theirs, in other views")
    assert set(names_in(plan, drawn(plan, 1)[0]).values()) == {5}


def test_a_sample_repeats_within_rows_that_follow_one_another() -> None:
    """What keys its views: `_visits` in stages/finetune.py counts modulo `repeats`."""
    asked = replace(ASKED, sampler="p_by_k", classes_per_batch=4, images_per_class=5, negatives_per_batch=3)
    hierarchical = replace(asked, sampler="hierarchical", parents_per_batch=2, negatives_per_batch=0)
    for plan in (
        plan_batches(0, samples(("fox",)), asked),
        plan_batches(0, replace(samples(), parents=LABELS % 2), hierarchical),
        plan_batches(0, samples(), replace(ASKED, sampler="balanced", batch_size=40)),
        plan_batches(0, samples(), replace(ASKED, sampler="pairs", batch_size=40)),
        plan_batches(0, samples(), ASKED),
    ):
        for batch in drawn(plan, 20).tolist():
            keys = [(sample, row % plan.repeats) for row, sample in enumerate(batch)]
            assert len(set(keys)) == len(keys)


def test_images_are_those_of_the_samples() -> None:
    plan = plan_batches(0, samples(("fox",), mirror=True), replace(ASKED, sampler="p_by_k"))
    for step in range(9):
        rows = plan.rows(step, 0, 1)
        assert plan.images().positions(step).tolist() == plan.samples.positions[rows].tolist()


# Classes of a single image


def test_single_images_may_be_left_out() -> None:
    asked = replace(ASKED, sampler="p_by_k", classes_of_one="drop")
    plan = plan_batches(0, replace(samples(("fox",)), parents=POSITIONS), asked)
    assert plan.notes[0] == "2 of 4 classes have a single image ('cat', 'eel'): they are left out"
    assert plan.samples.names == ("ant", "dog"), "a head would have a place for what never comes"
    assert plan.samples.counts.tolist() == [9, 4]
    assert len(plan.samples) == 20, "the negatives are still there"
    assert plan.samples.parents is not None
    assert plan.samples.parents.tolist() == plan.samples.positions.tolist()
    wanted = {int(p): CLASSES[label] for p, label in zip(POSITIONS, LABELS, strict=True)}
    for position, label in zip(plan.samples.positions.tolist(), plan.samples.labels.tolist(), strict=True):
        assert wanted[position] == ("fox" if label < 0 else plan.samples.names[label])


def test_single_images_may_be_negatives_only() -> None:
    asked = replace(ASKED, sampler="p_by_k", classes_of_one="negative", negatives_per_batch=2)
    plan = plan_batches(0, samples(), asked)
    assert plan.notes[0] == "2 of 5 classes have a single image ('cat', 'eel'): they are negative-only"
    assert plan.samples.names == ("ant", "dog", "fox")
    assert plan.batch_size == 8
    alone = {int(position) for position in POSITIONS[np.isin(LABELS, [2, 4])]}
    for batch in drawn(plan, 5):
        assert names_in(plan, batch) == {"ant": 2, "dog": 2, "fox": 2, "-": 2}
        assert set(plan.samples.positions[batch[-2:]].tolist()) == alone


@pytest.mark.parametrize("kept", ["drop", "negative"])
def test_single_images_alone_make_no_batch(kept: Literal["drop", "negative"]) -> None:
    few = samples().only(np.isin(LABELS, [0, 2, 4]))
    asked = replace(ASKED, sampler="p_by_k", classes_of_one=kept)
    with pytest.raises(Unplannable, match="1 classes have two images or more; two are needed: classes_of_one: repeat"):
        plan_batches(0, few, asked)
    assert plan_batches(0, few, replace(asked, classes_of_one="repeat")).batch_size == 6


def test_many_single_images_are_not_all_named() -> None:
    classes = [f"class {number}" for number in range(3000)]
    labels = np.concatenate([np.arange(3000), [0, 1]])
    found = label_samples(np.arange(3002), labels, classes, (), False)
    note = plan_batches(0, found, replace(ASKED, sampler="p_by_k", classes_of_one="drop")).notes[0]
    assert note == (
        "2,998 of 3,000 classes have a single image ('class 2', 'class 3', 'class 4', 'class 5', 'class 6' and 2,993 "
        "more): they are left out"
    )


# Negatives, and classes above


def test_negatives_are_added_to_groups() -> None:
    asked = replace(ASKED, sampler="p_by_k", classes_per_batch=2, negatives_per_batch=3)
    plan = plan_batches(0, samples(("fox",)), asked)
    assert plan.batch_size == 7
    found = drawn(plan, 40)
    for batch in found:
        names = names_in(plan, batch)
        assert names.pop("-") == 3
        assert [*names.values()] == [2, 2]
    negatives = Counter(found[:, 4:].ravel().tolist())
    assert len(negatives) == 7
    assert (plan.samples.labels[found[:, 4:]] == -1).all()
    # Without them negative-only images do not come.
    without = plan_batches(0, samples(("fox",)), replace(asked, negatives_per_batch=0))
    assert "-" not in names_in(without, drawn(without, 9))
    with pytest.raises(Unplannable, match="negatives_per_batch: 8 is more than the 7 negative-only images"):
        plan_batches(0, samples(("fox",)), replace(asked, negatives_per_batch=8))


PARENTS = np.array([0, 0, 1, 1, 2, 2])  # ant | cat dog | eel fox


def hierarchical(found: Labelled, asked: Batches = ASKED) -> Plan:
    parents = PARENTS[LABELS] if found.parents is None else found.parents
    return plan_batches(0, replace(found, parents=parents), replace(asked, sampler="hierarchical"))


def test_classes_above_are_those_of_the_images_that_are_left() -> None:
    asked = replace(ASKED, classes_per_batch=4, parents_per_batch=2)
    plan = hierarchical(samples(), asked)
    assert plan.batch_size == 8
    for batch in drawn(plan, 20):
        assert names_in(plan, batch) == {"cat": 2, "dog": 2, "eel": 2, "fox": 2}, "ant is alone under its parent"
    plan = hierarchical(samples(), replace(asked, classes_per_batch=2, classes_of_one="drop"))
    met = {frozenset(names_in(plan, batch)) for batch in drawn(plan, 60)}
    assert met == {frozenset(two) for two in (("ant", "dog"), ("ant", "fox"), ("dog", "fox"))}
    plan = hierarchical(samples(("cat",)), replace(asked, classes_per_batch=2, negatives_per_batch=1))
    assert all(names_in(plan, batch)["-"] == 1 for batch in drawn(plan, 9))


def test_classes_above_that_do_not_fit() -> None:
    asked = replace(ASKED, sampler="hierarchical")
    with pytest.raises(Unplannable, match="sampler: hierarchical: 3 classes a batch are fewer than 4 classes above"):
        hierarchical(samples(), replace(asked, parents_per_batch=4))
    with pytest.raises(Unplannable, match="sampler: hierarchical: only 1 of the classes above have 2 classes or more"):
        hierarchical(samples(("cat",)), replace(asked, classes_per_batch=6, parents_per_batch=2))
    split = replace(samples(), parents=np.arange(len(LABELS)) % 2)
    with pytest.raises(
        Unplannable, match="hierarchy: images of 'ant' have several classes above; each class needs one"
    ):
        hierarchical(split)


# Curriculum


@pytest.mark.parametrize("sampler", ["shuffled", "balanced", "p_by_k"])
def test_a_curriculum_begins_with_large_classes(sampler: Literal["shuffled", "balanced", "p_by_k"]) -> None:
    asked = replace(ASKED, sampler=sampler, batch_size=5, classes_per_batch=2)
    plan = plan_batches(0, samples(), asked)
    begun = begin_with(0, plan, asked, 4, 12)
    assert begun.notes[-1] == "the first 12 steps are of the 3 classes with 4 images or more"
    assert begun.notes[:-1] == plan.notes
    assert (begun.batch_size, begun.repeats, begun.unit) == (plan.batch_size, plan.repeats, plan.unit)
    assert begun.schedule.steps_per_epoch == plan.schedule.steps_per_epoch
    found = drawn(begun, 60)
    assert names_in(begun, found[:12].ravel()).keys() == {"ant", "dog", "fox"}
    assert names_in(begun, found[12:].ravel()).keys() == {"ant", "cat", "dog", "eel", "fox"}
    assert np.array_equal(found[12:], drawn(plan, 48)), "then all, as if nothing had been before"


@pytest.mark.parametrize("kept", ["drop", "negative", "repeat"])
def test_a_curriculum_of_classes_above_with_negatives(kept: Literal["drop", "negative", "repeat"]) -> None:
    asked = replace(ASKED, sampler="hierarchical", classes_per_batch=2, classes_of_one=kept, negatives_per_batch=1)
    plan = hierarchical(samples(("cat",)), asked)
    begun = begin_with(0, plan, asked, 5, 30)
    found = drawn(begun, 100)
    for batch in found[:30]:
        assert names_in(begun, batch) == {"ant": 2, "fox": 2, "-": 1}
    assert "dog" in names_in(begun, found[30:].ravel())


def test_a_curriculum_that_cannot_be() -> None:
    plan = plan_batches(0, samples(), ASKED)
    with pytest.raises(
        Unplannable, match=r"curriculum\.min_per_class: 1 classes have 8 images or more; two are needed"
    ):
        begin_with(0, plan, ASKED, 8, 3)
    large = replace(ASKED, batch_size=21)
    with pytest.raises(
        Unplannable,
        match=r"the 2 classes of 5 images or more make batches of 16, and all classes of 21: make the batches smaller",
    ):
        begin_with(0, plan_batches(0, samples(), large), large, 5, 3)
    groups = replace(ASKED, sampler="p_by_k")
    with pytest.raises(Unplannable, match="make batches of 4, and all classes of 6"):
        begin_with(0, plan_batches(0, samples(), groups), groups, 5, 3)
