"""Losses that weigh all similarities of an anchor at once."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from stages.labels import is_labelled
from stages.losses.loss import SOFTPLUS_FROM, Measured, Task
from stages.losses.mining import PairMining, mine_pairs
from stages.losses.pairwise import LEAST_LOG, Pairs, SummedLoss, at_least_one, block_of, padded


class MultiSimilarity(SummedLoss):
    """Multi-similarity loss (Wang et al. 2019, equation 10), the mean over all rows that are labelled:

        log(1 + sum over positives of exp(-alpha (s - base))) / alpha
        + log(1 + sum over negatives of exp(beta (s - base))) / beta

    Args:
        alpha, beta: how much hard positives and negatives stand out.
        base: lambda, the similarity that parts both.
        mining: see `mine_pairs`; the paper's is `multi_similarity`.
    """

    def __init__(
        self,
        task: Task,
        memory: int,
        memory_start: float,
        alpha: float,
        beta: float,
        base: float,
        mining: PairMining,
    ):
        super().__init__(task, memory, memory_start)
        self.alpha, self.beta, self.base, self.mining = alpha, beta, base, mining

    def sums(self, pairs: Pairs) -> Tensor:
        block = block_of(pairs)
        positive, negative = mine_pairs(self.mining, block, pairs.own, None)
        above = block.similarities - self.base
        pulled = _log_one_plus_sum(*padded(-self.alpha * above, positive > 0)) / self.alpha
        pushed = _log_one_plus_sum(self.beta * above, negative > 0) / self.beta
        known = is_labelled(pairs.labels).to(above.dtype)
        return torch.stack([((pulled + pushed) * known).sum(), known.sum(), positive.sum(), negative.sum()])

    def conclude(self, sums: Tensor) -> Measured:
        total, rows, positives, negatives = sums
        found = (positives + negatives).detach()
        figures = {"pairs_per_row": found / at_least_one(rows), "idle": (found == 0).to(total.dtype)}
        return total / at_least_one(rows), figures


class Circle(SummedLoss):
    """Circle loss (Sun et al. 2020, equation 6, with the weights of equation 5), the mean over rows with both kinds:

        log(1 + sum over negatives of exp(scale a_n (s_n - margin))
                x sum over positives of exp(-scale a_p (s_p - 1 + margin)))

    a_n = max(0, s_n + margin) and a_p = max(0, 1 + margin - s_p) have no gradient: what is far from where it should be
    is pulled the more.

    Args:
        margin: 0 to 1.
        scale: gamma.
    """

    def __init__(self, task: Task, memory: int, memory_start: float, margin: float, scale: float):
        super().__init__(task, memory, memory_start)
        self.margin, self.scale = margin, scale

    def sums(self, pairs: Pairs) -> Tensor:
        similarities, positive, negative = block_of(pairs)
        of_positives, is_there = padded(similarities, positive)
        to_negative = self.scale * (similarities.detach() + self.margin).clamp_min(0) * (similarities - self.margin)
        to_positive = (
            -self.scale * (1 + self.margin - of_positives.detach()).clamp_min(0) * (of_positives - 1 + self.margin)
        )
        usable = is_there.any(dim=1) & negative.any(dim=1)
        exponents = _log_sum(to_negative, negative) + _log_sum(to_positive, is_there)
        losses = F.softplus(exponents, threshold=SOFTPLUS_FROM) * usable
        return torch.stack([losses.sum(), usable.sum().to(losses.dtype)])

    def conclude(self, sums: Tensor) -> Measured:
        total, rows = sums
        return total / at_least_one(rows), {"idle": (rows.detach() == 0).to(total.dtype)}


class _LogSum(torch.autograd.Function):
    """With exponentials kept for the backward pass, which torch's logsumexp would compute again. They are to base 2:
    where the result nears 0 torch's exp takes 20 to 100 times as long on CPUs, exp2 does not.
    """

    @staticmethod
    def forward(ctx: Any, exponents: Tensor, mask: Tensor) -> Tensor:
        values = torch.where(mask, exponents, LEAST_LOG)
        largest = values.amax(dim=1, keepdim=True)
        totals = values.sub_(largest).mul_(1 / math.log(2)).exp2_().sum(dim=1, keepdim=True)
        ctx.save_for_backward(values, totals, largest)
        return (totals.log() + largest)[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        values, totals, largest = ctx.saved_tensors
        return values * (gradient[:, None] / totals * (largest > LEAST_LOG)), None


def _log_sum(exponents: Tensor, mask: Tensor) -> Tensor:
    """log of the sum of exp over what is in the mask: [n, M] -> [n]; LEAST_LOG, about, where that is nothing."""
    return _LogSum.apply(exponents, mask)


def _log_one_plus_sum(exponents: Tensor, mask: Tensor) -> Tensor:
    """log(1 + sum of exp over what is in the mask): [n, M] -> [n]"""
    return F.softplus(_log_sum(exponents, mask), threshold=SOFTPLUS_FROM)
