"""Multinomial logistic regression over a path of L2 penalties, exact and quick on two cores.

    objective(W, b) = mean_i cross_entropy(W x_i + b, y_i) + penalty / 2 * ||W||^2      (the bias b is not penalised)

so that scikit-learn's C is 1 / (penalty * N). What makes it quick, none of which moves the minimum:

- The objective does not change when features are centred (the bias takes it up) or rotated. They are rotated to their
  principal axes, where the covariance, and nearly the Hessian, is diagonal: `spread * variance + penalty`, `spread`
  being the mean of p (1 - p) at the moment. That diagonal preconditions L-BFGS: ten iterations, not hundreds.
- More dimensions than rows: the features are reduced to the space that the rows span.
- The penalties are solved in waves (stages/evaluation/path.py): a few, well apart, and then those halfway between what
  is solved. Each sets out from a polynomial through its solved neighbours, and with the curvature pairs of the nearest
  of those solved just before, which are corrected exactly for the change of the penalty.
- Small problems (folds of subsets) are solved side by side, S at a time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.evaluation.cross_entropy import Problem
from stages.evaluation.path import Solutions, solve_path

LARGEST_ROTATION = 6000
"""Dimensions (or rows, if fewer) up to which features are rotated: the cost is cubic."""
ROWS_FOR_AXES = 8192
"""Rows, spread over all of them, that principal axes are found from; 16 for each dimension if that is more."""
SMALLEST_VARIANCE = 1e-13
"""Of the largest: what is below is rounding, and left out when features are reduced to the space of their rows."""
BATCH_ELEMENTS = 2**22
"""Features that are put side by side in one batch; above, nothing is left to gain."""


@dataclass(frozen=True)
class LogisticPath:
    """Solutions for P penalties, C classes, D dimensions.

    A class without a row has no finite optimum: its weights are 0 and its bias is minus infinity.
    """

    penalties: Tensor
    """[P], in the order that was asked for."""
    weights: Tensor
    """[P, C, D], of the features as they were given."""
    biases: Tensor
    """[P, C], with mean zero over the classes that have rows."""
    objectives: Tensor
    """[P], float64."""
    iterations: Tensor
    """[P], evaluations of the objective."""
    converged: Tensor
    """[P], whether the objective is estimated to be within the tolerance of its minimum."""

    def logits(self, features: Tensor, index: int) -> Tensor:
        """[N, D] -> [N, C], for the penalty at `index`."""
        return torch.addmm(self.biases[index], features, self.weights[index].T)

    def predict(self, features: Tensor) -> Tensor:
        """Most probable class, the first of equals, for every penalty: [N, D] -> int64 [P, N]."""
        return torch.stack([self.logits(features, index).argmax(1) for index in range(len(self.penalties))])


def fit_logistic_path(
    features: Tensor,
    labels: Tensor,
    penalties: Sequence[float],
    *,
    classes: int | None = None,
    standardise: bool = False,
    max_iterations: int = 500,
    tolerance: float = 1e-6,
) -> LogisticPath:
    """Fit one multinomial logistic regression for each penalty.

    Args:
        features: [N, D], float32 or float64; all arithmetic is in this type.
        labels: int64 [N], 0 to classes - 1.
        penalties: lambda on the mean loss, all above 0, in any order.
        classes: C; one more than the largest label if left out.
        standardise: divide each dimension by its standard deviation over these rows (leaving out constant ones) before
            it is penalised; the weights that come back are for the features as given all the same.
        max_iterations: evaluations of the objective for one penalty.
        tolerance: distance of the objective from its minimum that ends the descent, as estimated (half the Newton
            decrement), relative to the minimum or to what the weights gain over none, whichever is less; the true
            distance stays within about 30 times that, on separable data at the worst.

    Raises:
        ValueError: shapes, labels or penalties that do not fit, or features that are not finite.
    """
    return fit_logistic_paths(
        [features],
        [labels],
        penalties,
        classes=classes,
        standardise=standardise,
        max_iterations=max_iterations,
        tolerance=tolerance,
    )[0]


def fit_logistic_paths(
    features: Sequence[Tensor],
    labels: Sequence[Tensor],
    penalties: Sequence[float],
    *,
    classes: int | None = None,
    standardise: bool = False,
    axes: Tensor | None = None,
    max_iterations: int = 500,
    tolerance: float = 1e-6,
) -> list[LogisticPath]:
    """The same for several sets of rows (subsets, folds), each on its own; small ones are solved side by side.

    Args:
        axes: `principal_axes` of rows like these, [D, D], where finding them for each set anew would take long (folds
            of one set). Any rotation gives the same solutions: only the time depends on it.
    """
    if not penalties or not all(0 < penalty < math.inf for penalty in penalties):
        raise ValueError(f"penalties must be numbers above 0, not {list(penalties)}")
    for rows, targets in zip(features, labels, strict=True):
        _check(rows, targets, classes)
    count = classes or 1 + max(int(targets.max()) for targets in labels)
    descending = sorted({float(penalty) for penalty in penalties}, reverse=True)
    places = torch.tensor([descending.index(penalty) for penalty in penalties], device=features[0].device)
    paths: list[LogisticPath] = []
    batch: list[tuple[Prepared, Tensor]] = []
    for index, (rows, targets) in enumerate(zip(features, labels, strict=True)):
        batch.append((prepare(rows, standardise, axes), targets))
        size = max(prepared.features.numel() for prepared, _ in batch)
        if index == len(features) - 1 or (len(batch) + 1) * size > BATCH_ELEMENTS:
            problem = Problem([one.features for one, _ in batch], [one for _, one in batch], count)
            solutions = solve_path(problem, descending, max_iterations, tolerance)
            paths += [
                _unprepare(solutions, index, one, penalties, places, problem.absent[index])
                for index, (one, _) in enumerate(batch)
            ]
            batch = []
    return paths


def _check(features: Tensor, labels: Tensor, classes: int | None) -> None:
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise ValueError(f"features [N, D] and labels [N] do not fit: {[*features.shape]} and {[*labels.shape]}")
    smallest, largest = int(labels.min()), int(labels.max())
    if smallest < 0 or (classes is not None and largest >= classes):
        raise ValueError(f"labels must be from 0 to one less than the classes, not from {smallest} to {largest}")
    if not all(torch.isfinite(bound) for bound in features.aminmax()):  # NaN goes through, and nothing is copied
        raise ValueError("features hold infinite numbers or NaN")


@dataclass(frozen=True)
class Prepared:
    """Features [N, R] that the solver sees, and how its weights lead back: W = (w @ axes^T) * scale."""

    features: Tensor
    axes: Tensor | None  # [D, R], orthonormal columns
    mean: Tensor  # [D]
    scale: Tensor  # [D]

    def restore(self, variables: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [..., D], and biases [...] in float64, of the features as they were given: from [..., R + 1]."""
        weights = variables[..., : self.features.shape[1]]
        if self.axes is not None:
            weights = weights @ self.axes.T
        weights = weights * self.scale
        return weights, variables[..., -1].double() - weights.double() @ self.mean.double()


def principal_axes(features: Tensor, standardise: bool = False) -> Tensor | None:
    """Orthonormal columns [D, D] along which the features [N, D] vary, smallest first; None where D is too large."""
    if features.shape[1] > LARGEST_ROTATION:
        return None
    mean, scale = _mean_and_scale(features, standardise)
    return _axes((features - mean).mul_(scale))


def _axes(rows: Tensor) -> Tensor:
    """Eigenvectors of the covariance of centred rows [N, D], or of as many as tell what it is about: [D, D]."""
    few = max(ROWS_FOR_AXES, 16 * rows.shape[1])
    return torch.linalg.eigh(_product(rows[:: max(1, len(rows) // few)])).eigenvectors.to(rows.dtype)


def _mean_and_scale(features: Tensor, standardise: bool) -> tuple[Tensor, Tensor]:
    mean, deviation = mean_and_deviation(features)
    scale = torch.where(deviation > 0, 1 / deviation, 0) if standardise else torch.ones_like(mean)
    return mean.to(features.dtype), scale.to(features.dtype)


def prepare(features: Tensor, standardise: bool, axes: Tensor | None) -> Prepared:
    """Centre, scale and rotate to principal axes (fewer than dimensions if rows are fewer): [N, D] -> [N, R].

    Args:
        axes: `principal_axes` of rows like these; None: they are found.
    """
    mean, scale = _mean_and_scale(features, standardise)
    rows = (features - mean).mul_(scale)
    count, dimensions = rows.shape
    if min(count, dimensions) > LARGEST_ROTATION:
        return Prepared(rows, None, mean, scale)
    if axes is None and dimensions <= count:
        axes = _axes(rows)
    if axes is not None:
        return Prepared(rows @ axes, axes, mean, scale)
    variances, left = torch.linalg.eigh(_product(rows.T))
    kept = variances > SMALLEST_VARIANCE * variances[-1]
    lengths = variances[kept].sqrt()
    left = left[:, kept]
    axes = (rows.T.double() @ left) / lengths
    return Prepared((left * lengths).to(rows.dtype), axes.to(rows.dtype), mean, scale)


def _product(rows: Tensor) -> Tensor:
    """rows^T rows in float64, [D, D], without a float64 copy of all rows."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    # Where rows are few, exactness decides what counts as rounding; where they are many, only the axes matter.
    exact = len(rows) <= 2 * rows.shape[1] or rows.shape[1] <= 512
    for part in rows.split(4096):
        part = part.double() if exact else part
        total += part.T @ part
    return total


def mean_and_deviation(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (of all rows, as a population) of each dimension in float64; [N, D] -> [D], [D].

    A dimension that varies by no more than rounding has deviation 0.
    """
    mean = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    square = torch.zeros_like(mean)
    for part in features.split(4096):  # a sum in float64 copies what it sums
        mean += part.sum(0, dtype=torch.float64) / len(features)
    for part in features.split(4096):
        square += (part - mean).pow_(2).sum(0)
    deviation = (square / len(features)).sqrt()
    return mean, torch.where(deviation > 4 * torch.finfo(features.dtype).eps * mean.abs(), deviation, 0)


def _unprepare(
    solutions: Solutions, index: int, prepared: Prepared, penalties: Sequence[float], places: Tensor, absent: Tensor
) -> LogisticPath:
    """The solutions of one set, for the features as they were given and the penalties in the order they were."""
    weights, biases = prepared.restore(solutions.variables[places, index])  # [P, C, R + 1]
    biases -= biases[:, absent == 0].mean(1, keepdim=True)
    return LogisticPath(
        torch.tensor(penalties, dtype=torch.float64),
        weights,
        biases.to(weights.dtype) + absent,
        solutions.objectives[places, index],
        solutions.iterations[places, index],
        solutions.converged[places, index],
    )
