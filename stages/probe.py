"""How good features are: logistic regression and nearest neighbours on them, with all labels and with few.

Everything that is chosen is chosen on training images; test images are scored once. Where images have several labels it
is one logistic regression a label, and thresholds that say from which score on an image has it.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline.errors import BadData, NotFinite
from pipeline.run import Run
from stages.evaluation import (
    TEST_IMAGES_SEEN,
    Choice,
    Fair,
    FeatureFile,
    Features,
    LabelPlan,
    LabelSets,
    Linear,
    ProbeLabels,
    Solver,
    accuracy,
    classify,
    fold_labels,
    held_out,
    label_targets,
    linear_figures,
    measure_linear,
    measure_neighbours,
    nearest,
    neighbour_figures,
    pseudo_labelled_test_images,
    read_features,
    score,
    spaced_penalties,
    stratified_folds,
    subset_size,
    transfer,
)
from stages.settings.probe import Probe

FEW_GROUPS = 10
"""Test images of fewer groups than this hardly say how far a score would move with others."""


class Unscorable(BadData):
    """There are not the labels that a probe needs."""


def probe(run: Run, settings: Probe) -> None:
    """Write metrics.json and predictions.parquet."""
    features = read_features(run.input("features"))
    if not all(torch.isfinite(bound) for bound in features.features.aminmax()):
        raise NotFinite(f"{run.step}: the features hold infinite numbers or NaN; look at how the encoder was trained")
    scored = np.isin(features.splits, ["train", settings.test_split])
    measure = _measure_several if (features.label_counts[scored] > 1).any() else _measure_one
    try:
        measure(run, settings, features)
    except Unscorable as reason:
        if settings.without_labels == "fail":
            raise
        _pass(run, features, str(reason).removeprefix(f"{run.step}: "))


def _measure_one(run: Run, settings: Probe, features: Features) -> None:
    """Images with one label each."""
    train, test = _labelled(run, features, "train"), _labelled(run, features, settings.test_split)
    _check_classes(run, features.classes, train, test)
    if settings.transfer:
        run.say("transfer is for images with several labels; it is left out")
    path = settings.penalties
    solver = Solver(path.smallest, path.largest, path.count, len(features.classes), settings.max_iterations)
    at_hand = ProbeLabels(
        train.labels.numpy(), train.ids, train.keys, train.classes, run.seed, train.card["encoder"]["labels_seen"]
    )
    plan = _plan(run, settings, at_hand)
    with run.progress(2 + sum(len(fair.indices) for fair in plan.values()), "measurements") as progress:
        mask = held_out(at_hand.labels, train.ids, settings.held_out_fraction, run.seed, _groups(train))
        choice, model = solver.fit(train, [mask & ~at_hand.known])
        logits = model.logits(test.features, 0)
        linear = score(logits, test.labels, settings.bootstrap_samples, run.seed, _groups(test))
        progress.advance()
        votes = _neighbour_votes(settings, train, test)
        neighbours = {k: accuracy(predicted, test.labels) for k, predicted in votes.items()}
        progress.advance()
        curve = _label_curve(run, settings, solver, plan, at_hand, train, test, progress.advance)
    everything = at_hand.fair(1, 1)
    curve["100pct"] = _summarise(settings, len(train), everything, [Measured(choice, linear["top1"], neighbours)])
    _warn(run, settings, solver, choice, train, at_hand)
    _tell_of_lone_classes(run, train, train.labels.numpy(), train.groups)
    metrics = {
        "linear": linear
        | {
            "penalty": choice.penalty,
            "fixed_penalty": choice.fixed,
            "penalty_at_edge": choice.at_edge,
            "path": choice.path,
        },
        "knn": {str(k): {"top1": neighbours[k], "k_used": min(k, len(train))} for k in settings.neighbours},
        "label_curve": curve,
        "protocol": _protocol(run, settings, solver, choice, train, test)
        | {"encoder_saw_other_labels": at_hand.saw_others},
        "encoder": features.card["encoder"],
        "classes": features.classes,
    }
    (run.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    _write_predictions(run, test, logits, votes[settings.neighbours[0]])
    run.count(train=len(train), test=len(test), top1=linear["top1"], **{f"knn_{k}": neighbours[k] for k in neighbours})


def _protocol(
    run: Run, settings: Probe, solver: Solver, choice: Choice, train: Features, test: Features
) -> dict[str, Any]:
    """How the scores came about."""
    return {
        "train": len(train),
        "test": len(test),
        "test_split": settings.test_split,
        "groups": _count_groups(run, train, test),
        "largest_class": int(train.labels.bincount().max()),
        "held_out": choice.held_out,
        "folds": settings.folds,
        "standardised": "train",
        "neighbour_temperature": settings.neighbour_temperature,
        "bootstrap_samples": settings.bootstrap_samples,
        "max_iterations": settings.max_iterations,
        "fits": solver.fits,
        "not_converged": solver.not_converged,
        "converged": solver.not_converged == 0,
    }


def _pass(run: Run, features: Features, reason: str) -> None:
    """Write a metrics.json that says why there is no score; the report then shows the features' health instead."""
    run.warn(f"no probe: {reason.partition(';')[0]}")
    metrics = {"without_labels": reason, "encoder": features.card["encoder"], "classes": features.classes}
    (run.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    run.count(samples=len(features))


def _labelled(run: Run, features: Features, split: str) -> Features:
    """The labelled samples of a split, and a word about those that are left out."""
    part = features.select(np.flatnonzero(features.splits == split))
    if not len(part):
        there = ", ".join(dict.fromkeys(features.splits.tolist()))
        raise Unscorable(
            f"{run.step}: the features have no {split} split, they have {there}; test_split names another, and the "
            "stage shard draws one with splits: drawn and test_fraction"
        )
    rows = np.flatnonzero(part.label_counts > 0)
    if not len(rows):
        raise Unscorable(
            f"{run.step}: no {split} image has a label; a probe needs them (a folder for each class); "
            "`without_labels: pass` goes on without"
        )
    if len(rows) < len(part):
        run.warn(f"{len(part) - len(rows):,} of {len(part):,} {split} images have no label and are left out")
    return part.select(rows)


def _check_classes(run: Run, classes: Sequence[str], train: Features, test: Features) -> None:
    """A probe tells classes apart: there must be two to learn, and what cannot be learned is said."""
    seen = train.labels.unique()
    if len(seen) < 2:
        only = classes[int(seen[0])]
        raise Unscorable(
            f"{run.step}: all {len(train):,} training images are {only!r}; a probe needs two classes; "
            "`without_labels: pass` goes on without"
        )
    affected = ~torch.isin(test.labels, seen)
    if affected.any():
        listed = _names(classes, test.labels[affected].unique().tolist())
        run.warn(f"no training image has the class {listed}: {int(affected.sum()):,} test images count as wrong")


def _groups(part: Features) -> np.ndarray | None:
    return part.groups if part.has_groups else None


def _count_groups(run: Run, train: Features, test: Features) -> dict[str, int] | None:
    """How many groups there are, and what they make impossible; None where none was declared."""
    if not train.has_groups:
        return None
    train_groups, test_groups = np.unique(train.groups), np.unique(test.groups)
    shared = int(np.isin(test.groups, train_groups).sum())
    if shared:
        run.warn(
            f"{shared:,} of {len(test):,} test images are of a group that has training images too: the scores flatter"
        )
    if len(test_groups) < FEW_GROUPS:
        run.warn(
            f"the {len(test):,} test images are of {len(test_groups)} groups: too few for an interval to be relied on"
        )
    return {"train": len(train_groups), "test": len(test_groups), "test_images_shared": shared}


def _tell_of_lone_classes(run: Run, train: Features, labels: np.ndarray, groups: np.ndarray) -> None:
    """A word about classes whose training images are of one group: label and group of each, int64 [n]."""
    counts = np.bincount(np.unique(np.stack([labels, groups]), axis=1)[0])
    alone = np.flatnonzero((counts == 1) & (np.bincount(labels) > 1)).tolist()
    if train.has_groups and alone:
        run.warn(
            f"all training images of {_names(train.classes, alone)} are of one group, which stays whole: such a class "
            "is missing either in a held-out part or in what is fitted beside it, and has no say in the penalty"
        )


def _names(classes: Sequence[str], labels: Sequence[int]) -> str:
    """The first five of some classes."""
    names = [repr(classes[label]) for label in labels]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _plan(run: Run, settings: Probe, at_hand: ProbeLabels) -> dict[float, Fair]:
    """The subsets of each share of the labels that are measured, and a word about what is not as one would think."""
    labels, plan = at_hand.labels, {}
    classes = len(np.unique(labels))
    for fraction, count in zip(settings.label_fractions, settings.subsets, strict=True):
        fair = plan[fraction] = at_hand.fair(fraction, count)
        if round(fraction * len(labels)) < classes:
            run.say(
                f"{fraction:.3g} of {len(labels):,} labels are fewer than the {classes:,} classes: one of each makes "
                f"{classes / len(labels):.1%}"
            )
        if not fair.indices:
            run.say(
                f"label curve: nothing is measured at {100 * fraction:g}% of the labels, because the encoder saw "
                f"others ({100 * fair.saw:.4g}% of all)"
            )
    return plan


def _warn(run: Run, settings: Probe, solver: Solver, choice: Choice, train: Features, at_hand: ProbeLabels) -> None:
    """What a reader of the figures should know."""
    _warn_of_edge(run, choice.penalty, choice.at_edge)
    _warn_of_test_images(run, train)
    if at_hand.saw_others:
        run.warn(
            "the encoder was fine-tuned on labels that are not among those at hand: if test images of this probe were "
            "among them (as where the same images are split anew), its scores flatter"
        )
    if choice.fixed and at_hand.known.any():
        run.say(f"the encoder learned from the labels that could choose the penalty: it is {choice.penalty:g}, fixed")
    elif choice.fixed and len(train) >= 2 * len(train.labels.unique()):
        run.warn(
            f"no group of training images can be held out without losing a class: the penalty is {choice.penalty:g}, "
            "fixed beforehand"
        )
    _warn_of_iterations(run, settings, solver.not_converged, solver.fits)
    largest = int(train.labels.bincount().max())
    beyond = [k for k in settings.neighbours if k > largest]
    if beyond:
        run.say(
            f"k = {', '.join(map(str, beyond))} is more than the {largest:,} training images of the largest class: "
            "other classes always vote too (neighbours)"
        )


def _warn_of_edge(run: Run, penalty: float, at_edge: bool) -> None:
    if at_edge:
        run.warn(
            f"the penalty that was chosen, {penalty:g}, is at the edge of the path: a wider one may score higher "
            "(penalties.smallest, penalties.largest)"
        )


def _warn_of_test_images(run: Run, train: Features) -> None:
    if pseudo_labelled_test_images(train.card["encoder"]["labels_seen"]):
        run.warn(TEST_IMAGES_SEEN)


def _warn_of_iterations(run: Run, settings: Probe, not_converged: int, fits: int) -> None:
    if not_converged:
        run.warn(
            f"{not_converged} of {fits} logistic regressions did not converge within {settings.max_iterations} "
            "iterations; raise max_iterations"
        )


def _neighbour_votes(settings: Probe, gallery: Features, queries: Features) -> dict[int, Tensor]:
    """By k: the class that each query's neighbours vote for, int64 [N]."""
    found = nearest(queries.features, gallery.features, max(settings.neighbours))
    classes, temperature = len(gallery.classes), settings.neighbour_temperature
    return {k: classify(found, gallery.labels, k, classes, temperature) for k in settings.neighbours}


@dataclass(frozen=True)
class Measured:
    """Scores with some of the labels; `neighbours` by k."""

    choice: Choice
    top1: float
    neighbours: dict[int, float]


def _label_curve(
    run: Run,
    settings: Probe,
    solver: Solver,
    plan: dict[float, Fair],
    at_hand: ProbeLabels,
    train: Features,
    test: Features,
    advance: Callable[[], None],
) -> dict[str, Any]:
    """Both classifiers on the subsets of each share of the labels, by `1pct`, `10pct`, ..."""
    curve, measured = {}, {}
    for fraction, fair in plan.items():
        count = subset_size(at_hand.labels, fraction)
        for index in fair.indices:
            # Shares below one label a class hold the same subset: it is measured once.
            if (count, index) not in measured:
                rows = at_hand.rows(fraction, index)
                part = train.select(rows)
                masks = [mask & ~at_hand.known[rows] for mask in _folds(run.seed, settings, part, index)]
                measured[count, index] = _measure_subset(settings, solver, part, masks, test)
            advance()
        subsets = [measured[count, index] for index in fair.indices]
        curve[f"{100 * fraction:g}pct"] = _summarise(settings, count, fair, subsets)
    return curve


def _folds(seed: int, settings: Probe, part: Features, index: int) -> list[np.ndarray]:
    """Folds of a subset of the labels, bool [N] each; none where there are no two groups to part."""
    folds = min(settings.folds, len(np.unique(part.groups)))
    if folds < 2:
        return []
    fold = stratified_folds(part.labels.numpy(), part.ids, folds, seed, index, _groups(part))
    return [fold == number for number in range(folds)]


def _measure_subset(
    settings: Probe, solver: Solver, part: Features, masks: Sequence[np.ndarray], test: Features
) -> Measured:
    """Both classifiers on one subset of the labels; its penalty is chosen by folds inside it."""
    choice, model = solver.fit(part, masks)
    votes = _neighbour_votes(settings, part, test)
    top1 = accuracy(model.predict(test.features)[0], test.labels)
    return Measured(choice, top1, {k: accuracy(predicted, test.labels) for k, predicted in votes.items()})


def _summarise(settings: Probe, labels: int, fair: Fair, subsets: Sequence[Measured]) -> dict[str, Any]:
    """One point of the label curve: means over subsets, with their standard deviation where there are several.

    Without a fair subset the scores are None.
    """

    def scores(values: list[float]) -> dict[str, Any]:
        mean = {"top1": fmean(values) if values else None}
        return mean | ({"sd": stdev(values)} if len(values) > 1 else {}) | {"by_subset": values}

    return scores([one.top1 for one in subsets]) | {
        "subsets": len(subsets),
        "subset_indices": list(fair.indices),
        "encoder_saw": fair.saw,
        "encoder_saw_exactly": fair.exact,
        "labels": labels,
        "penalties": [one.choice.penalty for one in subsets],
        "fixed_penalty": bool(subsets) and subsets[0].choice.fixed,
        "knn": {str(k): scores([one.neighbours[k] for one in subsets]) for k in settings.neighbours},
    }


def _write_predictions(run: Run, test: Features, logits: Tensor, neighbour_predicted: Tensor) -> None:
    probabilities = torch.softmax(logits.double(), dim=1)
    predicted = logits.argmax(1)
    columns = {
        "id": pa.array(test.ids, pa.int64()),
        "key": pa.array(test.keys.tolist(), pa.string()),
        "group": pa.array(test.groups, pa.int64()),
        "label": pa.array(test.labels.numpy(), pa.int32()),
        "predicted": pa.array(predicted.numpy(), pa.int32()),
        "probability": pa.array(probabilities.gather(1, predicted[:, None])[:, 0].float().numpy()),
        "probability_of_label": pa.array(probabilities.gather(1, test.labels[:, None])[:, 0].float().numpy()),
        "neighbour_predicted": pa.array(neighbour_predicted.numpy(), pa.int32()),
    }
    pq.write_table(pa.table(columns), run.out / "predictions.parquet", compression="none")


def _measure_several(run: Run, settings: Probe, features: Features) -> None:
    """Images of which some have several labels."""
    targets = label_targets(FeatureFile(run.input("features")))
    train, test = (
        LabelSets(part, targets[np.isin(features.ids, part.ids)])
        for part in (_labelled(run, features, split) for split in ("train", settings.test_split))
    )
    plan = _label_plan(run, settings)
    _check_label_sets(run, train, test)
    folds = fold_labels(train, plan)
    if not folds.judged.any():
        raise Unscorable(
            f"{run.step}: the images of each label lie in one fold: none can be judged out of fold; a label needs "
            "training images of two groups"
        )
    run.say("several labels an image: one classifier a label, thresholds out of fold; no label curve (label_fractions)")
    with run.progress(2, "measurements") as progress:
        linear = measure_linear(train, test, folds, plan)
        progress.advance()
        near = measure_neighbours(train, test, folds, plan)
        progress.advance()
    figures = linear_figures(linear, train, test, plan)
    neighbours = {
        str(k): neighbour_figures(scores, test) | {"k_used": min(k, len(train))} for k, scores in near.votes.items()
    }
    metrics: dict[str, Any] = {"several_labels": True, "linear": figures, "knn": neighbours}
    if settings.transfer:
        metrics["transfer"] = transfer(linear, near, train, test, folds, plan)
    metrics["protocol"] = _label_protocol(run, settings, train, test, linear, folds.fold)
    metrics |= {"encoder": features.card["encoder"], "classes": features.classes}
    _warn_of_label_sets(run, settings, linear, train, folds.judged)
    (run.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    _write_label_predictions(run, test, linear, near.votes[settings.neighbours[0]].predicted)
    headline = {name: figures[name] for name in ("map", "macro_f1")}
    run.count(train=len(train), test=len(test), **headline, **{f"knn_{k}": neighbours[k]["map"] for k in neighbours})


def _label_plan(run: Run, settings: Probe) -> LabelPlan:
    path = settings.penalties
    return LabelPlan(
        spaced_penalties(path.smallest, path.largest, path.count),
        settings.max_iterations,
        settings.folds,
        settings.thresholds,
        settings.neighbours,
        settings.neighbour_temperature,
        settings.transfer,
        settings.bootstrap_samples,
        run.seed,
    )


def _check_label_sets(run: Run, train: LabelSets, test: LabelSets) -> None:
    """Some label must be learnable, and what cannot be learned is said."""
    counts, classes = train.targets.sum(0), train.features.classes
    if not ((counts > 0) & (counts < len(train))).any():
        raise Unscorable(
            f"{run.step}: all {len(train):,} training images have the same labels; a probe needs images with and "
            "without a label; `without_labels: pass` goes on without"
        )
    if len(np.unique(train.features.groups)) < 2:
        raise Unscorable(
            f"{run.step}: all {len(train):,} training images are of one group: nothing can be held out to choose "
            "thresholds on; `without_labels: pass` goes on without"
        )
    lost = np.flatnonzero((counts == 0) & test.targets.any(0)).tolist()
    if lost:
        affected = int(test.targets[:, lost].any(1).sum())
        run.warn(
            f"no training image has the label {_names(classes, lost)}: it is named for none of the {affected:,} test "
            "images that have it, and counts with an F1 of 0"
        )
    unasked = np.flatnonzero((counts > 0) & ~test.targets.any(0)).tolist()
    if unasked:
        run.warn(f"no test image has the label {_names(classes, unasked)}: it has no part in the means over labels")


def _warn_of_label_sets(run: Run, settings: Probe, linear: Linear, train: LabelSets, judged: np.ndarray) -> None:
    """What a reader of the figures should know."""
    classes, rows, labels = train.features.classes, *np.nonzero(train.targets)
    _tell_of_lone_classes(run, train.features, labels, train.features.groups[rows])
    alone = np.flatnonzero(train.targets.any(0) & ~judged).tolist()
    if alone:
        run.warn(
            f"{_names(classes, alone)} cannot be judged out of fold, with images in one fold only: such a label has "
            "the threshold of all"
        )
    _warn_of_edge(run, linear.penalty, linear.at_edge)
    _warn_of_test_images(run, train.features)
    if train.features.card["encoder"]["labels_seen"]:
        run.warn(
            "the encoder was fine-tuned on labels: if training images of this probe were among them, penalty and "
            "thresholds are chosen on what it knows by heart; if test images were, its scores flatter"
        )
    _warn_of_iterations(run, settings, linear.not_converged, linear.fits)


def _label_protocol(
    run: Run, settings: Probe, train: LabelSets, test: LabelSets, linear: Linear, fold: np.ndarray
) -> dict[str, Any]:
    """How the scores came about."""
    return {
        "train": len(train),
        "test": len(test),
        "test_split": settings.test_split,
        "labels_per_train_image": float(train.targets.sum(1).mean()),
        "groups": _count_groups(run, train.features, test.features),
        "folds": int(fold.max()) + 1,
        "stratified": "iteratively",
        "penalty_by": "mean average precision out of fold",
        "standardised": "train",
        "neighbour_temperature": settings.neighbour_temperature,
        "bootstrap_samples": settings.bootstrap_samples,
        "max_iterations": settings.max_iterations,
        "fits": linear.fits,
        "not_converged": linear.not_converged,
        "converged": linear.not_converged == 0,
        "encoder_saw_labels": bool(train.features.card["encoder"]["labels_seen"]),
    }


def _write_label_predictions(run: Run, test: LabelSets, linear: Linear, neighbour_predicted: np.ndarray) -> None:
    """A row a test image; lists of labels, and a probability for each class."""

    def lists(chosen: np.ndarray) -> pa.Array:
        return pa.array([np.flatnonzero(row) for row in chosen], pa.list_(pa.int32()))

    features = test.features
    scores = pa.array(linear.scores.test.astype(np.float32).ravel())
    columns = {
        "id": pa.array(features.ids, pa.int64()),
        "key": pa.array(features.keys.tolist(), pa.string()),
        "group": pa.array(features.groups, pa.int64()),
        "labels": lists(test.targets),
        "predicted": lists(linear.scores.predicted),
        "scores": pa.FixedSizeListArray.from_arrays(scores, len(features.classes)),
        "neighbour_predicted": lists(neighbour_predicted),
    }
    pq.write_table(pa.table(columns), run.out / "predictions.parquet", compression="none")
