"""What features say of images with several labels each: one logistic regression a label, and neighbours that vote.

Whatever is chosen (penalty, thresholds, the cosine above which labels are transferred) is chosen on training images by
models that were fitted without them: out of fold. Test images are scored once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.evaluation.features import FeatureFile, Features
from stages.evaluation.label_scores import count, label_table, mean_average_precision, score_labels
from stages.evaluation.label_transfer import Nearest, choose_cosine, transfer_figures
from stages.evaluation.logistic import principal_axes
from stages.evaluation.neighbours import label_votes, nearest
from stages.evaluation.one_vs_rest import OneVsRest, fit_one_vs_rest
from stages.evaluation.penalty import COMPARED, SCORED
from stages.evaluation.stratification import iterative_folds
from stages.evaluation.thresholds import Kind, Thresholds, choose_thresholds
from stages.labels.sets import multi_hot


@dataclass(frozen=True)
class LabelSets:
    """Samples, and which labels each of them has.

    Attributes:
        targets: bool [N, C].
    """

    features: Features
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.features)

    @property
    def groups(self) -> np.ndarray | None:
        return self.features.groups if self.features.has_groups else None


def label_targets(file: FeatureFile) -> np.ndarray:
    """Which labels each sample has, bool [N, C]."""
    return multi_hot(file.label_lists, len(file.classes))


@dataclass(frozen=True)
class LabelPlan:
    """How labels are measured; the fields are settings of the stage `probe`."""

    penalties: Sequence[float]
    max_iterations: int
    folds: int
    thresholds: Kind
    neighbours: Sequence[int]
    neighbour_temperature: float
    transfer: bool
    bootstrap_samples: int
    seed: int


@dataclass(frozen=True)
class Folds:
    """Training images in parts that are held out in turn.

    Attributes:
        fold: int64 [N].
        judged: bool [C], labels that images of two folds have: whatever fold is held out, the rest knows them.
    """

    fold: np.ndarray
    judged: np.ndarray

    def masks(self) -> list[np.ndarray]:
        """Bool [N] each, true for what is held out."""
        return [self.fold == number for number in range(int(self.fold.max()) + 1)]


def fold_labels(train: LabelSets, plan: LabelPlan) -> Folds:
    """Iteratively stratified folds of whole groups; fewer than planned where there are fewer groups.

    Raises:
        ValueError: there are no two groups.
    """
    folds = min(plan.folds, len(np.unique(train.features.groups)))
    fold = iterative_folds(train.targets, train.features.ids, folds, plan.seed, train.groups)
    there = np.stack([train.targets[fold == number].any(0) for number in range(folds)])
    return Folds(fold, there.sum(0) >= 2)


@dataclass(frozen=True)
class Scores:
    """Scores of labels: of training images out of fold [N, C], of test images [T, C], and from where on a label is said
    to be there."""

    out_of_fold: np.ndarray
    test: np.ndarray
    thresholds: Thresholds

    @property
    def predicted(self) -> np.ndarray:
        """Of test images, bool [T, C]."""
        return self.thresholds.apply(self.test)


@dataclass(frozen=True)
class Linear:
    """Logistic regressions with the penalty that was chosen.

    Attributes:
        path: mean average precision out of fold for each penalty that was tried.
    """

    scores: Scores
    penalty: float
    path: list[dict[str, float]]
    at_edge: bool
    fits: int
    not_converged: int


def measure_linear(train: LabelSets, test: LabelSets, folds: Folds, plan: LabelPlan) -> Linear:
    """Choose a penalty and thresholds out of fold, and score test images by a fit to all training images.

    The penalty is that of the highest mean average precision of the labels that can be judged, the largest of equals:
    what the probe reports. All its models of a fold are fitted to the other folds, and standardised by them.
    """
    features, targets = train.features.features, torch.from_numpy(train.targets)
    masks = [torch.from_numpy(mask) for mask in folds.masks()]
    axes = None
    if all(int((~mask).sum()) >= features.shape[1] for mask in masks):
        axes = principal_axes(features, standardise=True)

    def fit(rows: Tensor, penalties: Sequence[float], tolerance: float) -> OneVsRest:
        return fit_one_vs_rest(
            features[rows],
            targets[rows],
            penalties,
            standardise=True,
            axes=axes,
            max_iterations=plan.max_iterations,
            tolerance=tolerance,
        )

    paths = [fit(~mask, plan.penalties, COMPARED) for mask in masks]

    def out_of_fold(index: int) -> np.ndarray:
        scores = np.empty(targets.shape)
        for mask, path in zip(masks, paths, strict=True):
            scores[mask.numpy()] = path.probabilities(features[mask], index).numpy()
        return scores

    judged = folds.judged
    means = [
        mean_average_precision(out_of_fold(index)[:, judged], train.targets[:, judged])
        for index in range(len(plan.penalties))
    ]
    best = max(range(len(means)), key=lambda index: (means[index], plan.penalties[index]))
    model = fit(torch.ones(len(targets), dtype=torch.bool), [plan.penalties[best]], SCORED)
    scores = _scores(out_of_fold(best), model.probabilities(test.features.features, 0).numpy(), train, folds, plan)
    converged = torch.cat([one.converged.flatten() for one in (*paths, model)])
    return Linear(
        scores,
        plan.penalties[best],
        [{"penalty": penalty, "map": mean} for penalty, mean in zip(plan.penalties, means, strict=True)],
        best in (0, len(means) - 1),
        len(converged),
        int((~converged).sum()),
    )


def _scores(out_of_fold: np.ndarray, test: np.ndarray, train: LabelSets, folds: Folds, plan: LabelPlan) -> Scores:
    return Scores(out_of_fold, test, choose_thresholds(plan.thresholds, out_of_fold, train.targets, folds.judged))


@dataclass(frozen=True)
class Neighbourhood:
    """Votes by k, and the nearest training image of each image, of another fold for those of train."""

    votes: dict[int, Scores]
    nearest_out_of_fold: Nearest
    nearest_of_test: Nearest


def measure_neighbours(train: LabelSets, test: LabelSets, folds: Folds, plan: LabelPlan) -> Neighbourhood:
    """Votes of the nearest training images for each label; of training images those of the other folds vote."""
    features, targets = train.features.features, torch.from_numpy(train.targets)
    out_of_fold = {k: np.empty(targets.shape) for k in plan.neighbours}
    nearest_labels, similarity = np.empty(targets.shape, dtype=bool), np.empty(len(targets), dtype=np.float32)
    for mask in folds.masks():
        held = torch.from_numpy(mask)
        found, others = nearest(features[held], features[~held], max(plan.neighbours)), targets[~held]
        for k, scores in out_of_fold.items():
            scores[mask] = label_votes(found, others, k, plan.neighbour_temperature).numpy()
        nearest_labels[mask], similarity[mask] = others[found.index[:, 0]].numpy(), found.similarity[:, 0].numpy()
    found = nearest(test.features.features, features, max(plan.neighbours))
    votes = {
        k: _scores(scores, label_votes(found, targets, k, plan.neighbour_temperature).numpy(), train, folds, plan)
        for k, scores in out_of_fold.items()
    }
    of_test = Nearest(found.similarity[:, 0].numpy(), targets[found.index[:, 0]].numpy())
    return Neighbourhood(votes, Nearest(similarity, nearest_labels), of_test)


def linear_figures(linear: Linear, train: LabelSets, test: LabelSets, plan: LabelPlan) -> dict[str, Any]:
    """What metrics.json says of the logistic regressions."""
    scores = linear.scores
    return {
        **score_labels(scores.test, scores.predicted, test.targets, plan.bootstrap_samples, plan.seed, test.groups),
        "penalty": linear.penalty,
        "penalty_at_edge": linear.at_edge,
        "path": linear.path,
        "thresholds": _threshold_figures(scores.thresholds),
        "per_class": label_table(
            train.features.classes,
            scores.test,
            scores.predicted,
            test.targets,
            train.targets.sum(0),
            scores.thresholds.values,
        ),
    }


def neighbour_figures(scores: Scores, test: LabelSets) -> dict[str, Any]:
    """What metrics.json says of the votes of k neighbours."""
    counts = count(scores.predicted, test.targets)
    return {
        "map": mean_average_precision(scores.test, test.targets),
        "macro_f1": float(counts.macro_f1),
        "micro_f1": float(counts.micro_f1),
        "thresholds": _threshold_figures(scores.thresholds),
    }


def transfer(
    linear: Linear, near: Neighbourhood, train: LabelSets, test: LabelSets, folds: Folds, plan: LabelPlan
) -> Any:
    """What metrics.json says of labels that nearest neighbours overwrite."""
    predicted = linear.scores.thresholds.apply(linear.scores.out_of_fold)
    threshold = choose_cosine(near.nearest_out_of_fold, predicted, train.targets)
    return transfer_figures(
        near.nearest_of_test,
        linear.scores.predicted,
        test.targets,
        threshold,
        plan.bootstrap_samples,
        plan.seed,
        test.groups,
    )


def _threshold_figures(thresholds: Thresholds) -> dict[str, Any]:
    """In the order of the classes; None for one that no training image has."""
    values = [value if np.isfinite(value) else None for value in thresholds.values.tolist()]
    return {"kind": thresholds.kind, "global": thresholds.overall, "per_class": values}
