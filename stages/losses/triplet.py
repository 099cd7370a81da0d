"""Triplet loss: a positive is to be nearer than a negative, by a margin."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stages.losses.gather import mean_over_processes
from stages.losses.loss import Measured, Task
from stages.losses.mining import TripletMining, mine_pairs, mine_triplets
from stages.losses.pairwise import Block, Pairs, PairwiseLoss, at_least_one, block_of, distances_of, padded


class Triplet(PairwiseLoss):
    """Triplet loss on unit vectors, by unsquared Euclidean distance: the mean over the triplets that are mined.

    `hard` is the batch-hard loss (Hermans et al. 2017, equation 5). `all` takes every triplet of the batch, as the mean
    over those with a loss (their section 3.2: the mean over all is washed out by those without). `multi_similarity`
    takes every positive with every negative that `mine_pairs` keeps.

    Args:
        margin: that a negative is to be farther away than a positive; `soft` puts log(1 + exp(x)) in place of
            max(0, margin + x).
        mining: see `mine_triplets`.
    """

    def __init__(
        self,
        task: Task,
        memory: int,
        memory_start: float,
        margin: float | Literal["soft"],
        mining: TripletMining,
    ):
        super().__init__(task, memory, memory_start, mining)
        self.margin, self.mining = margin, mining
        self.value_at_a_point = math.log(2) if margin == "soft" else margin

    def measure_pairs(self, pairs: Pairs) -> Measured:
        if self.mining in ("all", "multi_similarity"):
            return self._many(pairs)
        mined = mine_triplets(self.mining, pairs, self.draws)
        anchors = pairs.rows[mined.anchor]
        # Only what was mined is measured with a gradient, and by differences: exact where two rows are close.
        to_positive = _distances(anchors, pairs.columns[mined.positive])
        to_negative = _distances(anchors, pairs.columns[mined.negative])
        violation = to_positive - to_negative
        losses = F.softplus(violation) if self.margin == "soft" else (self.margin + violation).clamp_min(0)
        threshold = 0.0 if self.margin == "soft" else -self.margin
        active = (violation.detach() > threshold).to(losses.dtype)
        counts = mean_over_processes(torch.stack([mined.weight.sum(), (active * mined.weight).sum()]))
        triplets = at_least_one(counts[0])
        loss = mean_over_processes((losses * mined.weight).sum()) / triplets
        return loss, {"active_triplets": counts[1] / triplets, "idle": self._idle(counts[0], counts[1])}

    def _idle(self, triplets: Tensor, active: Tensor) -> Tensor:
        """1 where there is nothing to learn from, else 0: with a hinge, where no triplet has a loss."""
        return ((triplets if self.margin == "soft" else active) == 0).to(triplets.dtype)

    def _many(self, pairs: Pairs) -> Measured:
        """Every positive with every negative, of all pairs or of those that are mined."""
        of_chunk = self._soft_sums if self.margin == "soft" else self._hinge_sums
        chunks = [*pairs.chunks()]
        if len(chunks) == 1:
            sums = of_chunk(pairs)
        else:
            sums = torch.stack([checkpoint(of_chunk, chunk, use_reentrant=False) for chunk in chunks]).sum(dim=0)
        total, active, triplets = mean_over_processes(sums)
        figures = {
            "active_triplets": active.detach() / at_least_one(triplets),
            "idle": self._idle(triplets.detach(), active.detach()),
        }
        is_of_active = self.mining == "all" and self.margin != "soft"
        return total / at_least_one(active if is_of_active else triplets), figures

    def _block(self, pairs: Pairs) -> Block:
        block = block_of(pairs)
        if self.mining == "all":
            return block
        positive, negative = mine_pairs("multi_similarity", block, pairs.own, None)
        return Block(block.similarities, positive > 0, negative > 0)

    def _hinge_sums(self, pairs: Pairs) -> Tensor:
        """Sum over the triplets of some rows, and how many there are, with a loss and in all: [3].

        No triplet is looked at. The sum of max(0, c_p - d_n), with c_p the margin and the distance to a positive, is
        linear in the distances while each keeps its place: c_p counts once for every negative that is nearer than it,
        d_n, with a minus, for every c_p that is beyond it. Both follow from each negative's place among a row's sorted
        c_p, of which there are few.
        """
        assert self.margin != "soft"
        block = self._block(pairs)
        distances = distances_of(block.similarities)
        with torch.no_grad():
            to_positive, is_there = padded(distances, block.positive)  # [n, K]
            bounds, order = (to_positive + self.margin).masked_fill(~is_there, -torch.inf).sort(dim=1)
            places = torch.searchsorted(bounds, distances, right=True)  # [n, M]: from here on they are beyond
            negative = block.negative.to(distances.dtype)
            at_places = distances.new_zeros(len(bounds), bounds.shape[1] + 1).scatter_add_(1, places, negative)
            nearer = torch.empty_like(bounds).scatter_(1, order, at_places.cumsum(dim=1)[:, :-1])[is_there]
            often = (places - bounds.shape[1]) * negative  # of each negative: minus the c_p beyond it
            often[block.positive] = nearer
            active = nearer.sum()
            triplets = (is_there.sum(dim=1) * negative.sum(dim=1)).sum()
        total = self.margin * active + (often * distances).sum()
        return torch.stack([total, active, triplets])

    def _soft_sums(self, pairs: Pairs) -> Tensor:
        """The same of log(1 + exp(x)), which every triplet has: one positive of each row at a time."""
        block = self._block(pairs)
        distances = distances_of(block.similarities)
        to_positive, is_there = padded(distances, block.positive)
        sums = []
        for turn in range(to_positive.shape[1]):
            if to_positive.shape[1] == 1 or not torch.is_grad_enabled():
                sums.append(_soft_turn(to_positive, is_there, distances, block, turn))
            else:
                sums.append(checkpoint(_soft_turn, to_positive, is_there, distances, block, turn, use_reentrant=False))
        return torch.stack(sums).sum(dim=0)


def _soft_turn(to_positive: Tensor, is_there: Tensor, distances: Tensor, block: Block, turn: int) -> Tensor:
    violation = to_positive[:, turn, None] - distances
    counted = (block.negative & is_there[:, turn, None]).to(distances.dtype)
    active = (violation.detach() > 0).to(distances.dtype) * counted
    return torch.stack([(F.softplus(violation) * counted).sum(), active.sum(), counted.sum()])


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    """[T, D], [T, D] -> Euclidean distances [T]; where two rows are one, the derivative is 0."""
    return torch.linalg.vector_norm(rows - others, dim=1)
