"""Losses of pairs: positives are pulled together, negatives pushed beyond a margin."""

import torch
from torch import Tensor, nn

from stages.losses.loss import Measured, Task
from stages.losses.mining import PairMining, mine_pairs
from stages.losses.pairwise import Pairs, SummedLoss, at_least_one, block_of, distances_of, padded


class Contrastive(SummedLoss):
    """Contrastive loss (Hadsell et al. 2006, equation 4): d^2 / 2 of positives, max(0, margin - d)^2 / 2 of negatives.

    The mean over positives plus the mean over negatives that are nearer than the margin: of all pairs nearly all are
    negatives, and nearly all of these are far away.

    Args:
        margin: that negatives are to be apart, in distances of unit vectors (0 to 2).
        squared: False is the hinge: d of positives, max(0, margin - d) of negatives.
        mining: see `mine_pairs`.
    """

    def __init__(self, task: Task, memory: int, memory_start: float, margin: float, squared: bool, mining: PairMining):
        super().__init__(task, memory, memory_start, mining)
        self.margin, self.squared, self.mining = margin, squared, mining

    def sums(self, pairs: Pairs) -> Tensor:
        block = block_of(pairs)
        positive, negative = mine_pairs(self.mining, block, pairs.own, self.draws)
        distances = distances_of(block.similarities)
        pulled, is_there = padded(distances, positive > 0)  # 0 where there is none
        near = (self.margin - distances).clamp_min(0)
        inside = (negative * (near.detach() > 0)).sum()
        if self.squared:
            pulled, near = pulled.square() / 2, near.square() / 2
        return torch.stack([pulled.sum(), is_there.sum(), (near * negative).sum(), inside, negative.sum()])

    def conclude(self, sums: Tensor) -> Measured:
        pulled, positives, pushed, inside, negatives = sums
        loss = pulled / at_least_one(positives) + pushed / at_least_one(inside)
        is_idle = (pulled.detach() == 0) & (pushed.detach() == 0)  # nothing is found, or nothing is left to do
        return loss, {
            "active_negatives": inside.detach() / at_least_one(negatives),
            "idle": is_idle.to(loss.dtype),
        }


class Margin(SummedLoss):
    """Margin loss (Wu et al. 2017, equations 6 to 8): max(0, alpha + y (d - beta_class)), y = 1 or -1, a boundary for
    each class learned along. The mean over pairs with a loss; negatives are drawn evenly over distances by default. The
    boundary of a row with several labels is the mean of theirs.

    Args:
        alpha: half of the width between positives and negatives.
        beta: of every class at the start; beta_weight: nu, the price of large ones.
        mining: see `mine_pairs`.
    """

    def __init__(
        self,
        task: Task,
        memory: int,
        memory_start: float,
        alpha: float,
        beta: float,
        beta_weight: float,
        mining: PairMining,
    ):
        super().__init__(task, memory, memory_start, mining)
        self.alpha, self.beta_weight, self.mining = alpha, beta_weight, mining
        self.beta = nn.Parameter(torch.full((len(task.class_counts),), beta))

    def sums(self, pairs: Pairs) -> Tensor:
        block = block_of(pairs)
        positive, negative = mine_pairs(self.mining, block, pairs.own, self.draws)
        distances = distances_of(block.similarities)
        beta = self._boundaries(pairs.labels).to(distances.dtype)[:, None]
        too_far, too_near = (self.alpha + distances - beta).clamp_min(0), (self.alpha - distances + beta).clamp_min(0)
        active_positive, active_negative = positive * (too_far.detach() > 0), negative * (too_near.detach() > 0)
        prices = beta * (active_positive.sum(dim=1, keepdim=True) + active_negative.sum(dim=1, keepdim=True))
        total = (too_far * positive).sum() + (too_near * negative).sum() + self.beta_weight * prices.sum()
        return torch.stack([total, active_positive.sum(), active_negative.sum(), negative.sum()])

    def _boundaries(self, labels: Tensor) -> Tensor:
        """beta of each row, [n]; any, where it has no label."""
        if labels.ndim == 1:
            return self.beta[labels.clamp_min(0)]
        return labels.to(self.beta.dtype) @ self.beta / labels.sum(dim=1).clamp_min(1)

    def conclude(self, sums: Tensor) -> Measured:
        total, positives, inside, negatives = sums
        found = (positives + inside).detach()
        figures = {"active_negatives": inside.detach() / at_least_one(negatives), "idle": (found == 0).to(total.dtype)}
        return total / at_least_one(found), figures | {"beta": self.beta.detach().mean()}
