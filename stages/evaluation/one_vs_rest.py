"""Logistic regressions for images with several labels, one a class against the rest, over a path of L2 penalties."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.evaluation.binary_cross_entropy import BinaryProblem
from stages.evaluation.logistic import prepare
from stages.evaluation.path import solve_path


@dataclass(frozen=True)
class OneVsRest:
    """Solutions for P penalties, C classes, D dimensions.

    A class that every row has, or none, has no finite optimum: its weights are 0 and its bias is plus or minus
    infinity.
    """

    penalties: Tensor
    """[P], in the order that was asked for."""
    weights: Tensor
    """[P, C, D], of the features as they were given."""
    biases: Tensor
    """[P, C]."""
    objectives: Tensor
    """[P, C], float64."""
    iterations: Tensor
    """[P, C], evaluations of the objective."""
    converged: Tensor
    """[P, C], whether the objective is estimated to be within the tolerance of its minimum."""

    def probabilities(self, features: Tensor, index: int) -> Tensor:
        """Of each label, in float64, for the penalty at `index`: [N, D] -> [N, C]."""
        return torch.addmm(self.biases[index], features, self.weights[index].T).double().sigmoid_()


def fit_one_vs_rest(
    features: Tensor,
    targets: Tensor,
    penalties: Sequence[float],
    *,
    standardise: bool = False,
    axes: Tensor | None = None,
    max_iterations: int = 500,
    tolerance: float = 1e-6,
) -> OneVsRest:
    """Fit one logistic regression for each class and penalty; scikit-learn's C is 1 / (penalty * N).

    Args:
        features: [N, D], float32 or float64; all arithmetic is in this type.
        targets: bool [N, C], whether a row has a label.
        penalties, standardise, axes, max_iterations: as for `fit_logistic_paths`.
        tolerance: as there, of each class; where a small penalty hardly holds the weights back the true distance was
            up to 120 times that.

    Raises:
        ValueError: shapes or penalties that do not fit, or features that are not finite.
    """
    if not penalties or not all(0 < penalty < math.inf for penalty in penalties):
        raise ValueError(f"penalties must be numbers above 0, not {list(penalties)}")
    if features.ndim != 2 or targets.ndim != 2 or len(targets) != len(features) or not len(features):
        raise ValueError(f"features [N, D] and targets [N, C] do not fit: {[*features.shape]} and {[*targets.shape]}")
    if not all(torch.isfinite(bound) for bound in features.aminmax()):
        raise ValueError("features hold infinite numbers or NaN")
    descending = sorted({float(penalty) for penalty in penalties}, reverse=True)
    places = torch.tensor([descending.index(penalty) for penalty in penalties])
    count, (classes, dimensions) = len(penalties), (targets.shape[1], features.shape[1])
    shares = targets.double().mean(0)
    weights = features.new_zeros(count, classes, dimensions)
    biases = torch.logit(shares).to(features.dtype).expand(count, -1).clone()
    objectives = torch.zeros(count, classes, dtype=torch.float64)
    iterations = torch.zeros(count, classes, dtype=torch.int64)
    converged = torch.ones(count, classes, dtype=torch.bool)
    solved = torch.where((shares > 0) & (shares < 1))[0]
    if len(solved):
        prepared = prepare(features, standardise, axes)
        found = solve_path(BinaryProblem(prepared.features, targets[:, solved]), descending, max_iterations, tolerance)
        restored, their_biases = prepared.restore(found.variables[places, :, 0])  # [P, C, R + 1]
        weights[:, solved], biases[:, solved] = restored, their_biases.to(features.dtype)
        objectives[:, solved], iterations[:, solved] = found.objectives[places], found.iterations[places]
        converged[:, solved] = found.converged[places]
    return OneVsRest(torch.tensor(penalties, dtype=torch.float64), weights, biases, objectives, iterations, converged)
