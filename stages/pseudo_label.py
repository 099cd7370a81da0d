"""Classes for images without a label, by a classifier of features: pseudo-labels (Lee 2013), once and for all as in
noisy student (Xie et al. 2020), which trains another network on those that are confident.

The classifier is the logistic regression of the stage `probe`, not its neighbours: with few labels it is right more
often on features of SimCLR, and its probabilities are finely graded, where the votes of a few neighbours are equal for
many images. Everything is chosen on labelled training images: the penalty by folds, and the threshold on answers out of
fold. Hidden labels and those of test images have no say; of the former it is counted how many pseudo-labels are right.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import BadData, NotFinite, UsageError
from pipeline.run import Run
from stages.evaluation import (
    Choice,
    Features,
    ProbeLabels,
    Solver,
    choose_confidence,
    confidence_curve,
    labels_digest,
    precision_from,
    pseudo_labelled_test_images,
    read_features,
    stratified_folds,
)
from stages.images.pseudo_labels import images_digest, take_confident, write_pseudo_labels
from stages.settings.pseudo_label import PseudoLabel

MOST_CLASSES = 20
"""Rows of the table for a terminal; metrics.json has all classes."""


@dataclass(frozen=True)
class Images:
    """What is learned from and what gets a class.

    Attributes:
        labelled: training images whose labels are used.
        candidates: images without a label, with a hidden one, and test images where they are asked for; -1 is the label
            of each, whatever is known of it.
        hidden: int64 [N], the hidden labels of candidates; -1 where there is none, and of test images. Nothing is
            chosen by them.
        known: bool [labelled], labels that the encoder itself learned from: none of them can tell what it is worth.
    """

    labelled: Features
    candidates: Features
    hidden: np.ndarray
    known: np.ndarray


@dataclass(frozen=True)
class Believed:
    """From which probability on an answer is believed.

    Attributes:
        threshold: None: no answer is.
        confidences, right: [n], of the answers out of fold.
    """

    threshold: float | None
    confidences: np.ndarray
    right: np.ndarray


def pseudo_label(run: Run, settings: PseudoLabel) -> None:
    """Write pseudo_labels.parquet and metrics.json."""
    features = read_features(run.input("features"))
    if not all(torch.isfinite(bound) for bound in features.features.aminmax()):
        raise NotFinite(f"{run.step}: the features hold infinite numbers or NaN; look at how the encoder was trained")
    if settings.include_test:
        _check_test_images(run, features)
    images = _images(run, settings, features)
    path = settings.penalties
    solver = Solver(path.smallest, path.largest, path.count, len(features.classes), settings.max_iterations)
    folds = _folds(run, settings, images)
    with run.progress(3, "fits") as progress:
        choice, model = solver.fit(images.labelled, [fold & ~images.known for fold in folds])
        progress.advance()
        believed = _believe(run, settings, solver, images, folds, choice)
        progress.advance()
        labels, confidences = _answers(model.logits(images.candidates.features, 0))
        progress.advance()
    taken = take_confident(labels, confidences, believed.threshold, settings.per_class)
    found = images.candidates.select(taken)
    write_pseudo_labels(
        run.out, found.ids, found.keys.tolist(), found.splits.tolist(), labels[taken], confidences[taken],
        features.classes,
    )  # fmt: skip
    counts = _count(images, labels, taken)
    metrics = {"table": _table(features.classes, counts)} | _metrics(run, settings, images, choice, believed, counts)
    metrics |= {
        "labels_seen": [*features.card["encoder"]["labels_seen"], _own_entry(run, settings, images.labelled)],
        "images": images_digest(
            features.ids.tolist(), features.keys.tolist(), features.splits.tolist(), features.classes
        ),
        "not_converged": solver.not_converged,
    }
    (run.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    _tell(run, settings, features, choice, solver, metrics)


def _check_test_images(run: Run, features: Features) -> None:
    """Raises UsageError where there are none, or where none can be of a class that the classifier knows."""
    if not (features.splits == "test").any():
        raise UsageError(f"{run.step}.include_test: the features have no test split; leave it out")
    digest = run.inputs("features")[0].made_from.get("shards")
    shards = [one for one in run.ancestors() if one.stage == "shard" and one.digest == digest]
    if any(one.settings["split_by"] == "class" for one in shards):
        # The precision out of fold cannot see it: it is of training images.
        raise UsageError(
            f"{run.step}.include_test: {shards[0].step} has split_by: class, so that no test image is of a class of "
            "train, and each would get a wrong one: leave include_test out"
        )


def _images(run: Run, settings: PseudoLabel, features: Features) -> Images:
    """Raises BadData where there is nothing to learn from, or nothing to give a class to."""
    train = features.select(np.flatnonzero(features.splits == "train"))
    if (train.label_counts > 1).any():
        raise BadData(f"{run.step}: images with several labels; pseudo-labels are of images with one class each")
    rows = np.flatnonzero(train.label_counts > 0)
    if not len(rows):
        raise BadData(f"{run.step}: no training image has a label; some need one (a folder for each class)")
    whole = train.select(rows)
    labels = whole.labels.numpy()
    if len(np.unique(labels)) < 2:
        only = features.classes[labels[0]]
        raise BadData(f"{run.step}: all {len(labels):,} labelled training images are {only!r}; two classes are needed")
    at_hand = ProbeLabels(
        labels, whole.ids, whole.keys, features.classes, run.seed, features.card["encoder"]["labels_seen"]
    )
    _check_encoder(run, settings, at_hand)
    chosen = at_hand.rows(settings.label_fraction, settings.label_subset)
    is_train = features.splits == "train"
    is_candidate = is_train & ~np.isin(features.ids, whole.ids[chosen])
    if settings.include_test:
        is_candidate |= features.splits == "test"
    places = np.flatnonzero(is_candidate)
    if not len(places):
        raise BadData(
            f"{run.step}: all {len(train):,} training images have a label that is learned: there is none to give a "
            "class to; label_fraction below 1 hides some"
        )
    return Images(
        whole.select(chosen),
        replace(features.select(places), labels=torch.full((len(places),), -1)),
        np.where(is_train, features.labels.numpy(), -1)[places],
        at_hand.known[chosen],
    )


def _check_encoder(run: Run, settings: PseudoLabel, at_hand: ProbeLabels) -> None:
    """Labels that are hidden here must not come in by way of features."""
    fair = at_hand.fair(settings.label_fraction, settings.label_subset + 1)
    if settings.label_fraction < 1 and settings.label_subset not in fair.indices:
        raise UsageError(
            f"{run.step}.features: their encoder learned from labels that label_fraction {settings.label_fraction:g} "
            f"hides ({100 * fair.saw:.4g}% of all were seen): take an encoder without labels, or of this subset"
        )
    if at_hand.saw_others:
        run.warn(
            "the encoder was fine-tuned on labels that are not among those at hand: if they were of images that get a "
            "class here, it is no news to it"
        )


def _folds(run: Run, settings: PseudoLabel, images: Images) -> list[np.ndarray]:
    """Folds of the labelled images, bool [n] each; none where their answers could choose nothing."""
    part = images.labelled
    groups = part.groups if part.has_groups else None
    folds = min(settings.folds, len(np.unique(part.groups)))
    reason = ""
    if folds < 2:
        reason = "all labelled images are of one group"
    elif images.known.all():
        reason = f"the encoder learned from all {len(part):,} labels"
    if not reason:
        fold = stratified_folds(part.labels.numpy(), part.ids, folds, run.seed, settings.label_subset, groups)
        return [fold == number for number in range(folds)]
    if settings.threshold is None:
        raise UsageError(f"{run.step}.threshold: {reason}, so that none can choose it out of fold: give one")
    run.warn(f"{reason}: nothing is known of the precision of the threshold {settings.threshold:g}")
    return []


def _believe(
    run: Run, settings: PseudoLabel, solver: Solver, images: Images, folds: Sequence[np.ndarray], choice: Choice
) -> Believed:
    """The threshold, and what is known of it out of fold."""
    if not folds:
        return Believed(settings.threshold, np.zeros(0), np.zeros(0, dtype=bool))
    part = images.labelled
    labels, confidences = _answers(solver.out_of_fold(part, folds, choice.penalty))
    unknown = ~images.known
    right = (labels == part.labels.numpy())[unknown]
    confidences = confidences[unknown]
    if settings.threshold is not None:
        return Believed(settings.threshold, confidences, right)
    threshold = choose_confidence(confidences, right, settings.precision)
    if threshold is None:
        best = max(one["precision"] for one in confidence_curve(confidences, right))
        run.warn(
            f"no threshold reaches a precision of {settings.precision:g} out of fold, on {len(right):,} labelled "
            f"images ({best:.3f} at most): there are no pseudo-labels; lower precision, or give a threshold"
        )
    return Believed(threshold, confidences, right)


def _answers(logits: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Most probable class, int64 [N], and its probability, float64 [N]; of logits [N, C]."""
    best, labels = torch.softmax(logits.double(), dim=1).max(dim=1)
    return labels.numpy(), best.numpy()


def _count(images: Images, labels: np.ndarray, taken: np.ndarray) -> dict[str, np.ndarray]:
    """Images of each class, int64 [C]: labelled, given it in train and in test, and of these with a hidden label, and
    with one that is the same."""
    given, truth, is_test = labels[taken], images.hidden[taken], images.candidates.splits[taken] == "test"
    members = {
        "labelled": images.labelled.labels.numpy(),
        "train": given[~is_test],
        "test": given[is_test],
        "hidden": given[truth >= 0],
        "right": given[truth == given],
    }
    classes = len(images.labelled.classes)
    return {key: np.bincount(found, minlength=classes) for key, found in members.items()}


def _metrics(
    run: Run, settings: PseudoLabel, images: Images, choice: Choice, believed: Believed, counts: dict[str, np.ndarray]
) -> dict[str, Any]:
    """What is said of the pseudo-labels."""
    splits = images.candidates.splits
    labelled, train, test = (counts[key].tolist() for key in ("labelled", "train", "test"))
    hidden, right = int(counts["hidden"].sum()), int(counts["right"].sum())
    precision = coverage = None
    if believed.threshold is not None and len(believed.right):
        precision, coverage = precision_from(believed.confidences, believed.right, believed.threshold)
    return {
        "threshold": believed.threshold,
        "threshold_chosen": settings.threshold is None,
        "precision_asked": settings.precision if settings.threshold is None else None,
        "out_of_fold": {
            "images": len(believed.right),
            "precision": precision,
            "coverage": coverage,
            "curve": confidence_curve(believed.confidences, believed.right),
        },
        "candidates": {split: int((splits == split).sum()) for split in ("train", "test")},
        "counts": {"labelled": sum(labelled), "train": sum(train), "test": sum(test)},
        "by_class": [
            dict(zip(("name", "labelled", "train", "test"), one, strict=True))
            for one in zip(images.labelled.classes, labelled, train, test, strict=True)
        ],
        "hidden_labels": {"images": hidden, "right": right, "precision": right / hidden if hidden else None},
        "include_test": settings.include_test,
        "label_fraction": settings.label_fraction,
        "label_subset": settings.label_subset if settings.label_fraction < 1 else 0,
        "seed": run.seed,
        "penalty": choice.penalty,
        "fixed_penalty": choice.fixed,
        "penalty_at_edge": choice.at_edge,
        "path": choice.path,
    }


def _table(classes: Sequence[str], counts: dict[str, np.ndarray]) -> dict[str, list[Any]]:
    """For a terminal: the classes that were given most, in their order, and all together."""
    shown = sorted(np.argsort(-counts["train"] - counts["test"], kind="stable")[:MOST_CLASSES].tolist())
    found = [(classes[label], [int(one[label]) for one in counts.values()]) for label in shown]
    found.append((f"all {len(classes):,} classes", [int(one.sum()) for one in counts.values()]))
    return {
        "columns": ["class", "labelled", "pseudo-labelled", "of them test images", "hidden labels, right"],
        "rows": [
            [name, labelled, train + test, test, f"{right} of {hidden}"]
            for name, (labelled, train, test, hidden, right) in found
        ],
    }


def _own_entry(run: Run, settings: PseudoLabel, part: Features) -> dict[str, Any]:
    """What the classifier saw, as an entry of `labels_seen`."""
    names = [part.classes[label] for label in part.labels.tolist()]
    return {
        "loss": "logistic_regression",
        "fraction": settings.label_fraction,
        "subset": settings.label_subset if settings.label_fraction < 1 else 0,
        "seed": run.seed,
        "samples": len(part),
        "digest": labels_digest(part.keys.tolist(), names),
    }


def _tell(
    run: Run, settings: PseudoLabel, features: Features, choice: Choice, solver: Solver, metrics: dict[str, Any]
) -> None:
    """What a reader of the figures should know."""
    counts, candidates, hidden = metrics["counts"], metrics["candidates"], metrics["hidden_labels"]
    number, of = counts["train"] + counts["test"], candidates["train"] + candidates["test"]
    if metrics["threshold"] is not None:
        known = metrics["out_of_fold"]
        how = "given"
        if known["images"]:
            precision = "no answer" if known["precision"] is None else f"a precision of {known['precision']:.3f}"
            how = f"out of fold {precision} on {known['coverage']:.1%} of {known['images']:,} labelled images"
        run.say(f"threshold {metrics['threshold']:.6g} ({how}): {number:,} of {of:,} images get a class")
        if not number:
            run.warn("no image is above the threshold: there are no pseudo-labels, and a fine-tuning uses labels only")
    if hidden["precision"] is not None:
        run.say(
            f"of {hidden['images']:,} with a hidden label {hidden['precision']:.1%} are right; nothing is chosen by it"
        )
    if counts["test"]:
        run.warn(f"{counts['test']:,} of them are test images: whatever is trained with them is transductive")
    if pseudo_labelled_test_images(features.card["encoder"]["labels_seen"]):
        run.warn("the encoder of these features was trained on test images with pseudo-labels: transductive")
    if choice.at_edge:
        run.warn(
            f"the penalty that was chosen, {choice.penalty:g}, is at the edge of the path (penalties.smallest, "
            "penalties.largest)"
        )
    if solver.not_converged:
        run.warn(
            f"{solver.not_converged} of {solver.fits} logistic regressions did not converge within "
            f"{settings.max_iterations} iterations; raise max_iterations"
        )
    run.count(labelled=counts["labelled"], pseudo_labelled=number, test_images=counts["test"])
