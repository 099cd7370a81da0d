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
WIDE = 512
"""Dimensions from which the product with rows first is quicker, the transposition of its result included (measured)."""


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
        self.variances = torch.stack([
            F.pad((part * part).mean(0), (0, columns - part.shape[1])) for part in features
        ])  # fmt: skip

    def start(self) -> Tensor:
        """No weights, and the biases that fit the class counts: the solution of an infinite penalty, [S, K]."""
        sets, _, columns = self.features.shape
        variables = self.features.new_zeros(sets, self.classes, columns + 1)
        variables[..., -1] = torch.where(self.shares > 0, self.shares.log(), 0)
        return variables.flatten(1)

    def penalised(self) -> Tensor:
        """1 for a weight, 0 for a bias: [K]."""
        mask = self.features.new_ones(self.classes, self.features.shape[2] + 1)
        mask[:, -1] = 0
        return mask.flatten()

    def evaluate(self, variables: Tensor, penalty: float) -> Evaluation:
        """Objective, gradient and rough Hessian diagonal at [S, K]: two products over the rows."""
        sets, rows, columns = self.features.shape
        variables = variables.view(sets, self.classes, columns + 1)
        weights, biases = variables[..., :-1].contiguous(), variables[..., -1:] + self.absent[..., None]
        value = penalty / 2 * weights.double().pow(2).sum((1, 2))
        gradient = torch.zeros_like(variables)
        slope = penalty * weights
        slope_biases = value.new_zeros(sets, self.classes)
        spread = torch.zeros_like(value)
        size = max(256, CHUNK_ELEMENTS // (sets * max(columns, self.classes)))
        for begin in range(0, rows, size):
            part = slice(begin, begin + size)
            features, row_weights = self.features[:, part], self.row_weights[:, part]
            logits = _logits(features, weights, biases)
            loss, chunk_spread = _softmax(logits, self.labels[:, None, part], row_weights[:, None])
            value += loss
            spread += chunk_spread
            slope.baddbmm_(logits, features)
            slope_biases += logits.sum(2, dtype=torch.float64)
        gradient[..., :-1], gradient[..., -1] = slope, slope_biases
        mean_spread = (spread / self.classes).clamp_min(1e-12).to(weights.dtype)[:, None, None]
        variances = F.pad(self.variances, (0, 1), value=1.0)[:, None]
        curvature = (mean_spread * variances).expand_as(variables) + penalty * self.penalised().view_as(variables[0])
        return Evaluation(value, gradient.flatten(1), curvature.clamp_min(1e-30).flatten(1))


def _logits(features: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    """[S, n, R], [S, C, R], [S, C, 1] -> [S, C, n]"""
    if features.shape[2] < WIDE:
        return torch.baddbmm(biases, weights, features.transpose(1, 2))
    return torch.baddbmm(biases.transpose(1, 2), features, weights.transpose(1, 2)).transpose(1, 2).contiguous()


def _softmax(logits: Tensor, labels: Tensor, row_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits [S, C, n] in place into the derivative of the weighted cross-entropy by them.

    Returns the weighted cross-entropy [S] and the weighted sum of p (1 - p) over classes [S], both in float64.
    """
    logits -= logits.gather(1, labels)  # the label's own logit is 0 now
    largest = logits.amax(1, keepdim=True)
    logits.sub_(largest).exp_()
    own = torch.exp(-largest)
    logits.scatter_(1, labels, 0)
    others = logits.sum(1, keepdim=True)
    total = others + own
    # own - 1 is exactly 0 where the label's logit is the largest, so that small losses keep their digits.
    loss = ((largest + torch.log1p(others + (own - 1))) * row_weights).sum((1, 2), dtype=torch.float64)
    missed = others / total
    squares = (logits * logits).sum(1, keepdim=True) / (total * total)
    spread = ((2 * missed - missed * missed - squares) * row_weights).sum((1, 2), dtype=torch.float64)
    logits *= row_weights / total
    logits.scatter_(1, labels, -(missed * row_weights))
    return loss, spread
