"""The objectives of C logistic regressions, one a class against the rest: value, gradient, curvature.

    objective_c(w, b) = mean_i log(1 + exp(-s_ic (w x_i + b))) + penalty / 2 * ||w||^2    (s: 1 with the label, else -1)

They share nothing but the rows, so that each is a problem of its own: a frequent class does not wait for a rare one,
and the rare one is solved as exactly, relative to its own small loss.
"""

import torch
from torch import Tensor

from stages.evaluation.lbfgs import Evaluation

CHUNK_ELEMENTS = 2**21
"""Features, or logits, that are at work at once."""


class BinaryProblem:
    """C problems of K = R + 1 variables, weights and a bias. See stages/evaluation/path.py: Objective.

    Args:
        features: [N, R], centred.
        targets: bool [N, C]; each class has rows with it and rows without, or there is no finite optimum.
    """

    classes = 1

    def __init__(self, features: Tensor, targets: Tensor):
        self.features = features
        # The sign of a logit that is wrong, class by class: [C, N].
        self.signs = torch.where(targets.T.contiguous(), -1.0, 1.0).to(features.dtype)
        self.shares = targets.double().mean(0)  # [C]
        self.prior_losses = torch.special.entr(self.shares) + torch.special.entr(1 - self.shares)
        self.variances = (features * features).mean(0)

    @property
    def rows_of_weights(self) -> int:
        return len(self.signs)

    @property
    def elements(self) -> int:
        return len(self.signs) * max(self.features.shape[1] + 1, len(self.features))

    def start(self) -> Tensor:
        """No weights, and the biases that fit the class counts: the solution of an infinite penalty, [C, K]."""
        variables = self.features.new_zeros(len(self.signs), self.features.shape[1] + 1)
        variables[:, -1] = torch.logit(self.shares)
        return variables

    def penalised(self) -> Tensor:
        """1 for a weight, 0 for a bias: [K]."""
        mask = self.features.new_ones(self.features.shape[1] + 1)
        mask[-1] = 0
        return mask

    def evaluate(self, variables: Tensor, sets: Tensor, penalties: Tensor) -> Evaluation:
        """Objectives, gradients and rough Hessian diagonals of A problems: two products over the rows.

        Args:
            variables: [A, K].
            sets: int64 [A], the class of each.
            penalties: [A].
        """
        rows, columns = self.features.shape
        weights, biases = variables[:, :-1], variables[:, -1:]
        slope = torch.zeros_like(weights)
        value = weights.new_zeros(len(sets), dtype=torch.float64)
        slope_biases, spread = torch.zeros_like(value), torch.zeros_like(value)
        size = max(256, CHUNK_ELEMENTS // max(columns, len(sets)))
        for begin in range(0, rows, size):
            chunk = slice(begin, begin + size)
            features, signs = self.features[chunk], self.signs[sets, chunk]
            # Above 0 where the class is told wrong; nothing is ever taken as 1 - p, so that small losses keep digits.
            wrong = torch.addmm(biases, weights, features.T).mul_(signs)  # [A, n]
            missed = torch.sigmoid(wrong)
            value += torch.nn.functional.softplus(wrong).sum(1, dtype=torch.float64)
            spread += (missed * torch.sigmoid(wrong.neg_())).sum(1, dtype=torch.float64)
            missed *= signs
            slope.addmm_(missed, features)
            slope_biases += missed.sum(1, dtype=torch.float64)
        value = value / rows + penalties / 2 * weights.double().square().sum(1)
        penalties = penalties.to(weights.dtype)[:, None]
        gradient, curvature = torch.empty_like(variables), torch.empty_like(variables)
        gradient[:, :-1], gradient[:, -1] = slope / rows + penalties * weights, slope_biases / rows
        mean_spread = (spread / rows).clamp_min(1e-12).to(weights.dtype)[:, None]
        curvature[:, :-1], curvature[:, -1:] = mean_spread * self.variances + penalties, mean_spread
        return Evaluation(value, gradient, curvature.clamp_min(1e-30))
