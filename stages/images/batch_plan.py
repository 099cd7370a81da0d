"""What a supervised training learns from: which images, with which labels, and which of them come when."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from stages.images.pairs import GivenPairs, Pairs
from stages.images.samplers import Balanced, Hierarchical, Then, WithMore
from stages.images.schedule import Among, ClassBalanced, Schedule, Shuffled
from stages.labels.sets import set_numbers

FEW_NAMES = 5
"""Classes that a message names."""


class Unplannable(ValueError):
    """The images do not make the batches that are asked for."""

    exit_code = 2


@dataclass(frozen=True)
class Labelled:
    """The samples that are learned from. A sample is an image; mirrored ones may be samples of their own.

    Attributes:
        positions: int64 [n], of its image in the split.
        labels: int64 [n], positions in `names`, -1: negative-only; or bool [n, names], which of them a sample has.
        names: of the classes.
        mirrored: bool [n].
        parents: int64 [n], the class above of each, for `hierarchical`.
    """

    positions: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    mirrored: np.ndarray
    parents: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def have_several(self) -> bool:
        """Whether samples have several labels."""
        return self.labels.ndim > 1

    @property
    def known(self) -> np.ndarray:
        """Which samples have a class, bool [n]."""
        return np.asarray(self.labels.any(axis=1)) if self.have_several else self.labels >= 0

    @property
    def counts(self) -> np.ndarray:
        """Samples of each class, int64 [classes]."""
        if self.have_several:
            return self.labels.sum(axis=0)
        return np.bincount(self.labels[self.labels >= 0], minlength=len(self.names))

    def memberships(self, by_set: bool) -> tuple[np.ndarray, np.ndarray]:
        """Each sample under each of its classes: samples and classes, int64 [e] each.

        Args:
            by_set: of several labels: all that a sample has together are its class, each other set another.
        """
        if self.have_several and not by_set:
            rows, classes = np.nonzero(self.labels)
            return rows, classes
        classes = set_numbers(self.labels) if self.have_several else self.labels
        rows = np.flatnonzero(classes >= 0)
        return rows, classes[rows]

    def only(self, kept: np.ndarray) -> "Labelled":
        """Some of the samples, bool [n]; classes keep their numbers."""
        parents = None if self.parents is None else self.parents[kept]
        return Labelled(self.positions[kept], self.labels[kept], self.names, self.mirrored[kept], parents)


def label_samples(
    positions: np.ndarray, labels: np.ndarray, classes: Sequence[str], negative_only: Sequence[str], mirror: bool
) -> Labelled:
    """Samples of labelled images, of the classes that they have.

    Args:
        positions: int64 [n], in the split.
        labels: int64 [n], positions in `classes`; or bool [n, classes], several an image.
        negative_only: names of classes; of several labels they do not count.
        mirror: each image is a sample of its class, and mirrored one of another (`NAME, mirrored`).

    Raises:
        Unplannable: a negative-only class that no image has, or less than two others.
    """
    there = np.flatnonzero(np.any(labels, axis=0)) if labels.ndim > 1 else np.unique(labels)
    unknown = sorted(set(negative_only) - {classes[label] for label in there.tolist()})
    if unknown:
        raise Unplannable(f"negative_only: no labelled training image is {unknown[0]!r}")
    told_apart = there[[classes[label] not in negative_only for label in there.tolist()]]
    names = tuple(classes[label] for label in told_apart)
    if len(names) < 2:
        raise Unplannable(f"negative_only leaves {len(names)} classes to be told apart; two are needed")
    if labels.ndim > 1:
        own = labels[:, told_apart]
        beside = np.zeros_like(own)
        of_both = np.block([[own, beside], [beside, own]])
    else:
        numbers = np.full(len(classes), -1, dtype=np.int64)
        numbers[told_apart] = np.arange(len(names))
        own = numbers[labels]
        of_both = np.concatenate([own, np.where(own < 0, own, own + len(names))])
    plain = np.zeros(len(own), dtype=bool)
    if not mirror:
        return Labelled(positions, own, names, plain)
    return Labelled(
        np.concatenate([positions, positions]),
        of_both,
        (*names, *(f"{name}, mirrored" for name in names)),
        np.concatenate([plain, ~plain]),
    )


@dataclass(frozen=True)
class Batches:
    """What is asked for; see stages/settings/finetune.py."""

    sampler: Literal["shuffled", "balanced", "p_by_k", "hierarchical", "pairs"]
    batch_size: int
    classes_per_batch: int
    images_per_class: int
    parents_per_batch: int
    positive_share: float
    negatives_per_batch: int
    classes_of_one: Literal["repeat", "drop", "negative"]
    by_set: bool = False
    """Of several labels: all that an image has together are its class."""


@dataclass(frozen=True)
class Plan:
    """Which samples come when.

    Attributes:
        samples: those that come at all.
        schedule: over positions in `samples`.
        batch_size: of the global batch.
        repeats: a sample comes at most so often in a batch, and then within so many rows that follow one another.
        unit: rows that stay on one process: the two of a pair.
        notes: for the user.
    """

    samples: Labelled
    schedule: Schedule
    batch_size: int
    repeats: int
    unit: int
    notes: tuple[str, ...]

    def rows(self, step: int, rank: int, ranks: int) -> np.ndarray:
        """Samples of a process's share of a batch, int64 [rows]."""
        share = self.batch_size // ranks
        return self.schedule.positions(step)[rank * share : (rank + 1) * share]

    def answers(self, step: int, rank: int, ranks: int) -> np.ndarray:
        """What the loss is told of these rows: their labels, int64 [rows]; of given pairs the targets, float32
        [rows / 2]."""
        if not isinstance(self.schedule, GivenPairs):
            return self.samples.labels[self.rows(step, rank, ranks)]
        share = self.batch_size // 2 // ranks
        return self.schedule.targets(step)[rank * share : (rank + 1) * share]

    def images(self) -> Schedule:
        """The same in positions of images in the split."""
        return Among(self.samples.positions, self.schedule)


def plan_batches(seed: int, samples: Labelled, asked: Batches) -> Plan:
    """Batches of samples.

    Raises:
        Unplannable: they cannot be made; the message says how they could.
    """
    if samples.have_several and asked.sampler in ("pairs", "hierarchical"):
        raise Unplannable(
            f"sampler: {asked.sampler} is for images with one label each; of several take shuffled, balanced or p_by_k"
        )
    if asked.sampler == "pairs":
        return _plan_pairs(seed, samples, asked)
    if asked.sampler in ("p_by_k", "hierarchical"):
        return _plan_groups(seed, samples, asked)
    notes: list[str] = []
    if asked.sampler == "balanced":
        known = samples.only(samples.known)
        if len(known) < len(samples):
            notes.append(f"balanced: the {len(samples) - len(known):,} negative-only images are left out")
        rows, classes = known.memberships(asked.by_set)
        schedule: Schedule = Balanced(seed, classes, asked.batch_size, len(known))
        if known.have_several:
            schedule = Among(rows, schedule)
        return Plan(known, schedule, asked.batch_size, asked.batch_size, 1, tuple(notes))
    batch_size = min(asked.batch_size, len(samples))
    if batch_size < asked.batch_size:
        notes.append(f"batches of {batch_size}: there are no more than {len(samples)} labelled images")
    return Plan(samples, Shuffled(seed, len(samples), batch_size), batch_size, 1, 1, tuple(notes))


def plan_given_pairs(seed: int, pairs: np.ndarray, targets: np.ndarray, batch_size: int) -> Plan:
    """Batches of pairs that are given; their images are of no class.

    Args:
        pairs: int64 [P, 2], positions of images in the split.
        targets: float32 [P], 0 to 1.
        batch_size: images, two for each pair.
    """
    images, places = np.unique(pairs, return_inverse=True)
    nobodys = Labelled(images, np.full(len(images), -1), (), np.zeros(len(images), dtype=bool))
    count = min(batch_size // 2, len(pairs))
    notes = []
    if 2 * count < batch_size:
        notes.append(f"batches of {2 * count}: there are no more than {count} pairs")
    left = len(pairs) % count
    if left:
        notes.append(
            f"an epoch is of {len(pairs) - left:,} pairs: the {left:,} that fill no batch are others each time"
        )
    schedule = GivenPairs(seed, places.reshape(pairs.shape), targets, count)
    return Plan(nobodys, schedule, 2 * count, 2 * count, 2, tuple(notes))


def begin_with(seed: int, plan: Plan, asked: Batches, least: int, steps: int) -> Plan:
    """A curriculum: classes of `least` samples or more for the first `steps`, then all. What is negative-only comes all
    along.

    Raises:
        Unplannable: there are not two such classes.
    """
    if plan.samples.have_several:
        raise Unplannable("curriculum: is for images with one label each; leave it out")
    counts, labels = plan.samples.counts, plan.samples.labels
    large = (labels < 0) | (counts[labels.clip(min=0)] >= least)
    found = int((counts >= least).sum())
    if found < 2:
        raise Unplannable(f"curriculum.min_per_class: {found} classes have {least} images or more; two are needed")
    places = np.flatnonzero(large)
    first = plan_batches(seed, plan.samples.only(large), asked)
    if first.batch_size != plan.batch_size:
        raise Unplannable(
            f"curriculum.min_per_class: the {found} classes of {least} images or more make batches of "
            f"{first.batch_size}, and all classes of {plan.batch_size}: make the batches smaller"
        )
    note = f"the first {steps:,} steps are of the {found:,} classes with {least} images or more"
    return replace(plan, schedule=Then(Among(places, first.schedule), steps, plan.schedule), notes=(*plan.notes, note))


def _plan_pairs(seed: int, samples: Labelled, asked: Batches) -> Plan:
    try:
        schedule = Pairs(seed, samples.labels, asked.batch_size // 2, asked.positive_share)
    except ValueError as error:
        raise Unplannable(f"sampler: pairs: {error}") from error
    note = f"{schedule.positives:,} pairs of one class and {schedule.negatives:,} of two"
    return Plan(samples, schedule, asked.batch_size, asked.batch_size, 2, (note,))


def _plan_groups(seed: int, samples: Labelled, asked: Batches) -> Plan:
    """P classes with K images each, and a number of negative-only images."""
    samples, notes = _without_classes_of_one(samples, asked)
    known, labels = samples.memberships(asked.by_set)
    counts = np.unique(labels, return_counts=True)[1]
    if len(counts) < 2:
        raise Unplannable(f"{len(counts)} classes have two images or more; two are needed: classes_of_one: repeat")
    classes, images = min(asked.classes_per_batch, len(counts)), asked.images_per_class
    if classes < asked.classes_per_batch:
        notes.append(
            f"batches of {classes} classes with {images} images each: there are no more than {len(counts)} classes"
        )
    few = int((counts < images).sum())
    if few:
        notes.append(
            f"{few} of {len(counts)} classes have fewer than images_per_class = {images} images: a batch repeats "
            "theirs, in other views"
        )
    if asked.sampler == "hierarchical":
        assert samples.parents is not None
        parents = samples.parents[known]
        _check_parents(samples.names, labels, parents)
        try:
            grouped = Hierarchical(seed, labels, parents, classes, images, asked.parents_per_batch)
        except ValueError as error:
            raise Unplannable(f"sampler: hierarchical: {error}") from error
        schedule, batch_size = Among(known, grouped), grouped.batch_size
        if batch_size < classes * images or grouped.parents < len(np.unique(parents)):
            notes.append(
                f"batches of {batch_size // images} classes of {asked.parents_per_batch} classes above, of which "
                f"{grouped.parents} of {len(np.unique(parents))} have enough"
            )
    else:
        grouped = ClassBalanced(seed, labels, classes, images, int(samples.known.sum()))
        schedule, batch_size = Among(known, grouped), classes * images
    # An image with two labels may come under both: anywhere in the batch.
    repeats = batch_size if samples.have_several else images
    if asked.negatives_per_batch:
        rest = np.flatnonzero(~samples.known)
        if len(rest) < asked.negatives_per_batch:
            raise Unplannable(
                f"negatives_per_batch: {asked.negatives_per_batch} is more than the {len(rest)} negative-only images"
            )
        negatives = Among(rest, Shuffled(seed, len(rest), asked.negatives_per_batch))
        return Plan(
            samples, WithMore(schedule, negatives), batch_size + asked.negatives_per_batch, repeats, 1, tuple(notes)
        )
    return Plan(samples, schedule, batch_size, repeats, 1, tuple(notes))


def _check_parents(names: Sequence[str], labels: np.ndarray, parents: np.ndarray) -> None:
    """Whether the images of a class have one class above."""
    both = np.unique(np.stack([labels, parents], axis=1), axis=0)
    twice = both[1:, 0][both[1:, 0] == both[:-1, 0]]
    if len(twice):
        raise Unplannable(f"hierarchy: images of {names[twice[0]]!r} have several classes above; each class needs one")


def _without_classes_of_one(samples: Labelled, asked: Batches) -> tuple[Labelled, list[str]]:
    """What becomes of classes of a single image, which have no positive but other views of it."""
    if samples.have_several and asked.by_set:
        return samples, _note_of_lone_sets(samples, asked)
    alone = np.flatnonzero(samples.counts == 1)
    if not len(alone):
        return samples, []
    listed = ", ".join(repr(samples.names[label]) for label in alone[:FEW_NAMES])
    more = f" and {len(alone) - FEW_NAMES:,} more" if len(alone) > FEW_NAMES else ""
    what = f"{len(alone):,} of {len(samples.counts):,} classes have a single image ({listed}{more})"
    if samples.have_several and asked.classes_of_one != "repeat":
        what += "; where it has other labels it stays under these"
    if asked.classes_of_one == "repeat":
        advice = "classes_of_one: drop leaves them out, negative keeps them as negatives only"
        return samples, [f"{what}, whose only positives are other views of it; {advice}"]
    kept = np.flatnonzero(samples.counts != 1)
    numbers = np.full(len(samples.names) + 1, -1, dtype=np.int64)  # the last one is that of label -1
    numbers[kept] = np.arange(len(kept))
    names = tuple(samples.names[label] for label in kept)
    labels = samples.labels[:, kept] if samples.have_several else numbers[samples.labels]
    rest = replace(samples, labels=labels, names=names)
    if asked.classes_of_one == "negative":
        return rest, [f"{what}: they are negative-only"]
    return rest.only(rest.known | ~samples.known), [f"{what}: they are left out"]


def _note_of_lone_sets(samples: Labelled, asked: Batches) -> list[str]:
    """A word about sets of labels that a single image has: its only positives are other views of it."""
    counts = np.unique(samples.memberships(by_set=True)[1], return_counts=True)[1]
    lone = int((counts == 1).sum())
    if lone and asked.classes_of_one != "repeat":
        raise Unplannable(
            f"classes_of_one: {asked.classes_of_one} is for classes, and batches are of equal sets of labels here "
            "(label_relation); leave it out"
        )
    what = f"{lone:,} of {len(counts):,} sets of labels are of a single image, whose only positives are other views"
    return [f"{what} of it"] if lone else []
