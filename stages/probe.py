"""How good features are: logistic regression and nearest neighbours on them, with all labels and with few.

Everything that is chosen is chosen on training images; test images are scored once.
"""

import json
from collections.abc import Sequence
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
    Features,
    LogisticPath,
    bootstrap_interval,
    classify,
    fit_logistic_paths,
    held_out,
    label_subset,
    nearest,
    principal_axes,
    read_features,
    stratified_folds,
)
from stages.settings.probe import Probe

FEW_LABELS_PENALTY = 0.1
"""With fewer than two labels a class nothing is left to choose a penalty on: then it is this one (scikit-learn's C = 1
at ten labels). It was not tuned."""
CLASSES_FOR_TOP5 = 6
SCORED, COMPARED = 1e-6, 1e-5
"""Tolerance of the objective, relative: of fits with all labels or on test, and of the many that compare penalties by
folds of a subset."""


def probe(run: Run, settings: Probe) -> None:
    """Write metrics.json and predictions.parquet."""
    features = read_features(run.input("features"))
    if not all(torch.isfinite(bound) for bound in features.features.aminmax()):
        raise NotFinite(f"{run.step}: the features hold infinite numbers or NaN; look at how the encoder was trained")
    train, test = _labelled(run, features, "train"), _labelled(run, features, settings.test_split)
    _check_classes(run, features.classes, train, test)
    solver = Solver(settings, len(features.classes))
    with run.progress(2 + sum(settings.subsets), "measurements") as progress:
        mask = held_out(train.labels.numpy(), train.ids, settings.held_out_fraction, run.seed)
        choice, model = solver.fit(train, [mask])
        logits = model.logits(test.features, 0)
        linear = _score(logits, test.labels, settings.bootstrap_samples, run.seed)
        progress.advance()
        votes = _neighbour_votes(settings, train, test)
        neighbours = {k: _accuracy(predicted, test.labels) for k, predicted in votes.items()}
        progress.advance()
        curve = {}
        for fraction, count in zip(settings.label_fractions, settings.subsets, strict=True):
            subsets = []
            for index in range(count):
                subsets.append(_measure_subset(run.seed, settings, solver, train, test, fraction, index))
                progress.advance()
            curve[f"{100 * fraction:g}pct"] = _summarise(subsets)
    curve["100pct"] = _summarise([Measured(len(train), choice, linear["top1"], neighbours)])
    _warn(run, solver, choice)
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
        "protocol": {
            "train": len(train),
            "test": len(test),
            "test_split": settings.test_split,
            "held_out": choice.held_out,
            "folds": settings.folds,
            "standardised": "train",
            "neighbour_temperature": settings.neighbour_temperature,
            "bootstrap_samples": settings.bootstrap_samples,
            "max_iterations": settings.max_iterations,
            "fits": solver.fits,
            "not_converged": solver.not_converged,
            "converged": solver.not_converged == 0,
        },
        "encoder": features.card["encoder"],
        "classes": features.classes,
    }
    (run.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    _write_predictions(run, test, logits, votes[settings.neighbours[0]])
    run.count(train=len(train), test=len(test), top1=linear["top1"], **{f"knn_{k}": neighbours[k] for k in neighbours})


def _labelled(run: Run, features: Features, split: str) -> Features:
    """The labelled samples of a split, and a word about those that are left out."""
    part = features.select(np.flatnonzero(features.splits == split))
    if not len(part):
        there = ", ".join(dict.fromkeys(features.splits.tolist()))
        raise BadData(
            f"{run.step}: the features have no {split} split, they have {there}; test_split names another, and the "
            "stage shard draws one with splits: drawn and test_fraction"
        )
    rows = np.flatnonzero(part.labels.numpy() >= 0)
    if not len(rows):
        raise BadData(f"{run.step}: no {split} image has a label; a probe needs them (a folder for each class)")
    if len(rows) < len(part):
        run.warn(f"{len(part) - len(rows):,} of {len(part):,} {split} images have no label and are left out")
    return part.select(rows)


def _check_classes(run: Run, classes: Sequence[str], train: Features, test: Features) -> None:
    """A probe tells classes apart: there must be two to learn, and what cannot be learned is said."""
    seen = train.labels.unique()
    if len(seen) < 2:
        only = classes[int(seen[0])]
        raise BadData(f"{run.step}: all {len(train):,} training images are {only!r}; a probe needs two classes")
    affected = ~torch.isin(test.labels, seen)
    if affected.any():
        names = [repr(classes[label]) for label in test.labels[affected].unique().tolist()]
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        run.warn(f"no training image has the class {listed}: {int(affected.sum()):,} test images count as wrong")


@dataclass(frozen=True)
class Choice:
    """A penalty, and how it was come to."""

    penalty: float
    path: list[dict[str, float]]
    """Accuracy on held-out training images for each penalty that was tried; empty: it is the fixed one."""
    held_out: int
    at_edge: bool

    @property
    def fixed(self) -> bool:
        return not self.path


class Solver:
    """Logistic regressions on features that are standardised by the rows of each fit; counts what did not converge."""

    def __init__(self, settings: Probe, classes: int):
        path = settings.penalties
        # Six digits, so that files say 1e-05 and not 9.999999999999999e-06.
        self.penalties = [float(f"{one:.6g}") for one in np.geomspace(path.smallest, path.largest, path.count)]
        self.classes, self.max_iterations = classes, settings.max_iterations
        self.fits = self.not_converged = 0

    def fit(self, part: Features, masks: Sequence[np.ndarray]) -> tuple[Choice, LogisticPath]:
        """Choose a penalty by rows held out of `part`, and fit it to all of them.

        Args:
            masks: bool [N], true for held-out rows: one part, or several folds.
        """
        held = [torch.from_numpy(mask) for mask in masks]
        axes = None
        if all(int((~mask).sum()) >= part.features.shape[1] for mask in held):
            # Found once for all these fits. Where rows are fewer, each fit has a smaller space of its own.
            axes = principal_axes(part.features, standardise=True)
        if len(part) < 2 * len(part.labels.unique()):
            choice = Choice(FEW_LABELS_PENALTY, [], 0, False)
        else:
            choice = self._choose(part, held, axes)
        return choice, self._paths([(part.features, part.labels)], [choice.penalty], axes, SCORED)[0]

    def _choose(self, part: Features, held: Sequence[Tensor], axes: Tensor | None) -> Choice:
        """The penalty that is most often right on held-out rows, the largest of equals."""
        fitted = [(part.features[~mask], part.labels[~mask]) for mask in held]
        paths = self._paths(fitted, self.penalties, axes, SCORED if len(held) == 1 else COMPARED)
        right = torch.zeros(len(self.penalties), dtype=torch.int64)
        for mask, path in zip(held, paths, strict=True):
            right += (path.predict(part.features[mask]) == part.labels[mask]).sum(1)
        scored = sum(int(mask.sum()) for mask in held)
        best = max(range(len(right)), key=lambda index: (int(right[index]), self.penalties[index]))
        path = [
            {"penalty": penalty, "accuracy": count / scored}
            for penalty, count in zip(self.penalties, right.tolist(), strict=True)
        ]
        return Choice(self.penalties[best], path, scored, best in (0, len(right) - 1))

    def _paths(
        self, sets: Sequence[tuple[Tensor, Tensor]], penalties: Sequence[float], axes: Tensor | None, tolerance: float
    ) -> list[LogisticPath]:
        paths = fit_logistic_paths(
            [features for features, _ in sets],
            [labels for _, labels in sets],
            penalties,
            classes=self.classes,
            standardise=True,
            axes=axes,
            max_iterations=self.max_iterations,
            tolerance=tolerance,
        )
        self.fits += sum(len(path.converged) for path in paths)
        self.not_converged += sum(int((~path.converged).sum()) for path in paths)
        return paths


def _warn(run: Run, solver: Solver, choice: Choice) -> None:
    """What a reader of the figures should know."""
    if choice.at_edge:
        run.warn(
            f"the penalty that was chosen, {choice.penalty:g}, is at the edge of the path: a wider one may score "
            "higher (penalties.smallest, penalties.largest)"
        )
    if solver.not_converged:
        run.warn(
            f"{solver.not_converged} of {solver.fits} logistic regressions did not converge within "
            f"{solver.max_iterations} iterations; raise max_iterations"
        )


def _accuracy(predicted: Tensor, labels: Tensor) -> float:
    return (predicted == labels).double().mean().item()


def _score(logits: Tensor, labels: Tensor, bootstrap_samples: int, seed: int) -> dict[str, Any]:
    """Scores of test logits [N, C]; rows of the confusion matrix are labels, columns predictions."""
    classes = logits.shape[1]
    right = logits.argmax(1) == labels
    confusion = torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2).view(classes, classes)
    present = confusion.sum(1) > 0
    scores: dict[str, Any] = {
        "top1": _accuracy(logits.argmax(1), labels),
        "top1_ci95": list(bootstrap_interval(right.numpy(), bootstrap_samples, seed)),
        "mean_per_class": (confusion.diag()[present].double() / confusion.sum(1)[present]).mean().item(),
        "confusion": confusion.tolist(),
    }
    if classes >= CLASSES_FOR_TOP5:
        own = logits.gather(1, labels[:, None])
        # Equal logits take turns, first class first; a class without training images is never among the five.
        ahead = (logits > own) | ((logits == own) & (torch.arange(classes) < labels[:, None]))
        scores["top5"] = ((ahead.sum(1) < 5) & own[:, 0].isfinite()).double().mean().item()
    return scores


def _neighbour_votes(settings: Probe, gallery: Features, queries: Features) -> dict[int, Tensor]:
    """By k: the class that each query's neighbours vote for, int64 [N]."""
    found = nearest(queries.features, gallery.features, max(settings.neighbours))
    classes, temperature = len(gallery.classes), settings.neighbour_temperature
    return {k: classify(found, gallery.labels, k, classes, temperature) for k in settings.neighbours}


@dataclass(frozen=True)
class Measured:
    """Scores with some of the labels; `neighbours` by k."""

    labels: int
    choice: Choice
    top1: float
    neighbours: dict[int, float]


def _measure_subset(
    seed: int, settings: Probe, solver: Solver, train: Features, test: Features, fraction: float, index: int
) -> Measured:
    """Both classifiers on one subset of the labels; its penalty is chosen by folds inside it."""
    part = train.select(label_subset(train.labels.numpy(), train.ids, fraction, seed, index))
    folds = min(settings.folds, len(part))
    fold = stratified_folds(part.labels.numpy(), part.ids, folds, seed, index)
    choice, model = solver.fit(part, [fold == number for number in range(folds)])
    votes = _neighbour_votes(settings, part, test)
    top1 = _accuracy(model.predict(test.features)[0], test.labels)
    return Measured(len(part), choice, top1, {k: _accuracy(predicted, test.labels) for k, predicted in votes.items()})


def _summarise(subsets: Sequence[Measured]) -> dict[str, Any]:
    """One point of the label curve: means over subsets, with their standard deviation where there are several."""

    def scores(values: list[float]) -> dict[str, float]:
        return {"top1": fmean(values)} | ({"sd": stdev(values)} if len(values) > 1 else {})

    return scores([one.top1 for one in subsets]) | {
        "subsets": len(subsets),
        "labels": subsets[0].labels,
        "penalties": [one.choice.penalty for one in subsets],
        "fixed_penalty": subsets[0].choice.fixed,
        "knn": {str(k): scores([one.neighbours[k] for one in subsets]) for k in subsets[0].neighbours},
    }


def _write_predictions(run: Run, test: Features, logits: Tensor, neighbour_predicted: Tensor) -> None:
    probabilities = torch.softmax(logits.double(), dim=1)
    predicted = logits.argmax(1)
    columns = {
        "id": pa.array(test.ids, pa.int64()),
        "key": pa.array(test.keys.tolist(), pa.string()),
        "label": pa.array(test.labels.numpy(), pa.int32()),
        "predicted": pa.array(predicted.numpy(), pa.int32()),
        "probability": pa.array(probabilities.gather(1, predicted[:, None])[:, 0].float().numpy()),
        "probability_of_label": pa.array(probabilities.gather(1, test.labels[:, None])[:, 0].float().numpy()),
        "neighbour_predicted": pa.array(neighbour_predicted.numpy(), pa.int32()),
    }
    pq.write_table(pa.table(columns), run.out / "predictions.parquet", compression="none")
