"""The objective of multinomial logistic regression, for several sets of rows at once: value, gradient, curvature.

Precision: float32 features take float32 products and float64 sums. The probability that a sample misses is summed over
the other classes, never taken as 1 - p, so that separable data keep their digits at the smallest penalties.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.evaluation.lbfgs import Evaluation

CHUNK_ELEMENTS = 2**21
"""Features, or logits, that are at work at once."""


class Problem:
    """S sets of rows of equal shape, [S, N, R], short ones padded by rows and columns that count nothing.

    The variables [S, K] are weights and biases [S, C, R + 1] in one row for each set.
    """

    def __init__(self, features: Sequence[Tensor], labels: Sequence[Tensor], classes: int):
        sets, rows, columns = len(features), max(map(len, features)), max(part.shape[1] for part in features)
        like = features[0]
        self.classes = classes
        if sets == 1:
            self.features = like[None]
        else:
            self.features = like.new_zeros(sets, rows, columns)
        self.labels = torch.zeros(sets, rows, dtype=torch.int64, device=like.device)
        self.row_weights = like.new_zeros(sets, rows)
        self.absent = like.new_full((sets, classes), -torch.inf)  # added to the biases of classes without a row
        self.shares = torch.zeros_like(self.absent)
        for index, (part, targets) in enumerate(zip(features, labels, strict=True)):
            if sets > 1:
                self.features[index, : len(part), : part.shape[1]] = part
            self.labels[index] = targets[0]  # of padding: a class that is there, so that nothing infinite arises
            self.labels[index, : len(part)] = targets
            self.row_weights[index, : len(part)] = 1 / len(part)
            counts = torch.bincount(targets, minlength=classes)
            self.absent[index, counts > 0] = 0
            self.shares[index] = counts / len(part)
        self.prior_losses = torch.special.entr(self.shares.double()).sum(1)  # without weights, [S]
        self.variances = torch.stack([
            F.pad((part * part).mean(0), (0, columns - part.shape[1])) for part in features
        ])  # fmt: skip

    @property
    def rows_of_weights(self) -> int:
        return self.classes

    @property
    def elements(self) -> int:
        """Variables, or logits if more, of all sets at one penalty."""
        sets, rows, columns = self.features.shape
        return sets * self.classes * max(columns + 1, rows)

    def start(self) -> Tensor:
        """No weights, and the biases that fit the class counts: the solution of an infinite penalty, [S, K]."""
        sets, _, columns = self.features.shape
        variables = self.features.new_zeros(sets, self.classes, columns + 1)
        present = self.shares > 0
        biases = torch.where(present, self.shares.log(), 0)
        # With mean zero, so that equal ones are 0, and do not drown what weights of a millionth tell.
        biases -= biases.sum(1, keepdim=True) / present.sum(1, keepdim=True)
        variables[..., -1] = torch.where(present, biases, 0)
        return variables.flatten(1)

    def penalised(self) -> Tensor:
        """1 for a weight, 0 for a bias: [K]."""
        mask = self.features.new_ones(self.classes, self.features.shape[2] + 1)
        mask[:, -1] = 0
        return mask.flatten()

    def evaluate(self, variables: Tensor, sets: Tensor, penalties: Tensor) -> Evaluation:
        """Objectives, gradients and rough Hessian diagonals of A problems: two products over the rows of all sets.

        Args:
            variables: [A, K].
            sets: int64 [A], increasing: whose rows.
            penalties: [A].
        """
        count, rows, columns = self.features.shape
        variables = variables.view(len(sets), self.classes, columns + 1)
        # The problems of one set stand side by side, in P slots: [S, P * C, R] times [S, R, n] is one product a set.
        slots = torch.arange(len(sets), device=sets.device) - torch.searchsorted(sets, sets)
        width = int(slots.max()) + 1
        packed = variables.new_zeros(count, width, self.classes, columns + 1)
        packed[sets, slots] = variables
        packed[..., -1] += self.absent[:, None]
        weights = packed[..., :-1].flatten(1, 2)
        biases = packed[..., -1:].flatten(1, 2)
        slope = torch.zeros_like(weights)
        slope_biases = weights.new_zeros(count, width, self.classes, dtype=torch.float64)
        value = weights.new_zeros(count, width, dtype=torch.float64)
        spread = torch.zeros_like(value)
        size = max(256, CHUNK_ELEMENTS // (count * max(columns, width * self.classes)))
        for begin in range(0, rows, size):
            part = slice(begin, begin + size)
            features, row_weights = self.features[:, part], self.row_weights[:, None, None, part]
            logits = torch.baddbmm(biases, weights, features.mT)  # [S, P * C, n]
            by_class = logits.view(count, width, self.classes, -1)
            labels = self.labels[:, None, None, part].expand(-1, width, -1, -1)
            loss, chunk_spread = _softmax(by_class, labels, row_weights)
            value += loss
            spread += chunk_spread
            slope.baddbmm_(logits, features)
            slope_biases += by_class.sum(3, dtype=torch.float64)
        value, spread, slope_biases = value[sets, slots], spread[sets, slots], slope_biases[sets, slots]
        weights, slope = variables[..., :-1], slope.view(count, width, self.classes, columns)[sets, slots]
        value += penalties / 2 * weights.double().square().sum((1, 2))
        penalties = penalties.to(weights.dtype)[:, None, None]
        gradient, curvature = torch.empty_like(variables), torch.empty_like(variables)
        gradient[..., :-1], gradient[..., -1] = torch.add(slope, penalties * weights), slope_biases
        mean_spread = (spread / self.classes).clamp_min(1e-12).to(weights.dtype)[:, None, None]
        curvature[..., :-1], curvature[..., -1:] = mean_spread * self.variances[sets, None] + penalties, mean_spread
        return Evaluation(value, gradient.flatten(1), curvature.clamp_min(1e-30).flatten(1))


def _softmax(logits: Tensor, labels: Tensor, row_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits [S, P, C, n] in place into the derivative of the weighted cross-entropy by them.

    Returns the weighted cross-entropy [S, P] and the weighted sum of p (1 - p) over classes, both in float64.
    """
    own = logits.gather(2, labels)
    largest = logits.amax(2, keepdim=True)
    logits.sub_(largest).exp_()
    gap = largest.sub_(own)  # exactly 0 where the label's own logit is the largest: small losses keep their digits
    own_exponential = torch.exp(-gap)
    logits.scatter_(2, labels, 0)
    others = logits.sum(2, keepdim=True)
    total = others + own_exponential
    loss = ((gap + torch.log1p(others + (own_exponential - 1))) * row_weights).sum((2, 3), dtype=torch.float64)
    missed = others / total
    squares = (logits * logits).sum(2, keepdim=True) / (total * total)
    spread = ((2 * missed - missed * missed - squares) * row_weights).sum((2, 3), dtype=torch.float64)
    logits *= row_weights / total
    logits.scatter_(2, labels, -(missed * row_weights))
    return loss, spread
