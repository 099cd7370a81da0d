"""Which pairs and triplets of a batch are worth learning from. Nothing here has a gradient."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from stages.losses.draws import Draws
from stages.losses.pairwise import Block, Pairs, block_of, distances_of, padded

PairMining = Literal["all", "hard", "easy_positive", "multi_similarity", "distance_weighted"]
TripletMining = Literal["all", "hard", "semi_hard", "easy_positive", "multi_similarity", "distance_weighted"]

SIMILARITY_MARGIN = 0.1
"""epsilon of multi-similarity mining (Wang et al. 2019, section 4.1)."""
SMALLEST_DISTANCE = 0.5
"""Nearer negatives are drawn as if they were so far away (Wu et al. 2017, section 4; lambda in their equation 5)."""
LARGEST_DISTANCE = 1.4
"""Farther ones are not drawn by `distance_weighted` (as in the authors' code): they have no loss."""


class Triplets(NamedTuple):
    """Rows and columns, int64 [T] each, and weights [T]: 0 where an anchor has no positive or no negative."""

    anchor: Tensor
    positive: Tensor
    negative: Tensor
    weight: Tensor


@torch.no_grad()
def mine_pairs(kind: PairMining, block: Block, own: Tensor, draws: Draws | None) -> tuple[Tensor, Tensor]:
    """How often each pair of a block counts, as positive and as negative: [n, M] each. own: as of `Pairs`.

    - hard: of each anchor the farthest positive and the nearest negative.
    - easy_positive: the nearest positive and the nearest negative (Xuan et al. 2020).
    - multi_similarity: negatives more similar than the least similar positive minus epsilon, positives less similar
      than the most similar negative plus epsilon (Wang et al. 2019, section 4.1).
    - distance_weighted: every positive, and for each of them one negative, drawn evenly over distances (Wu et al.
      2017, section 4).
    """
    similarities, positive, negative = block
    of_dtype = (positive.to(similarities.dtype), negative.to(similarities.dtype))
    if kind == "all":
        return of_dtype
    least = similarities.masked_fill(~positive, torch.inf).amin(dim=1, keepdim=True)
    most = similarities.masked_fill(~negative, -torch.inf).amax(dim=1, keepdim=True)
    if kind == "multi_similarity":
        kept_positive = positive & (similarities < most + SIMILARITY_MARGIN)
        kept_negative = negative & (similarities > least - SIMILARITY_MARGIN)
        return kept_positive.to(similarities.dtype), kept_negative.to(similarities.dtype)
    if kind == "distance_weighted":
        assert draws is not None
        drawn, found = _draw_by_distance(block, own, draws)
        counts = torch.zeros_like(similarities).scatter_add_(1, drawn, found.to(similarities.dtype))
        return of_dtype[0], counts
    masked = similarities.masked_fill(~positive, torch.inf if kind == "hard" else -torch.inf)
    chosen = masked.argmin(dim=1) if kind == "hard" else masked.argmax(dim=1)
    nearest = similarities.masked_fill(~negative, -torch.inf).argmax(dim=1)
    return _only(chosen, positive, similarities), _only(nearest, negative, similarities)


@torch.no_grad()
def mine_triplets(kind: TripletMining, pairs: Pairs, draws: Draws | None) -> Triplets:
    """Triplets of the rows of a process; `all` and `multi_similarity` are not listed here: they may be very many.

    - hard: for each anchor the farthest positive and the nearest negative (Hermans et al. 2017, equation 5).
    - semi_hard: for each pair of anchor and positive the nearest negative that is farther than the positive, or if
      there is none the farthest negative (Schroff et al. 2015, section 3.2).
    - easy_positive: for each anchor the nearest positive, and the nearest negative that is farther than it, else the
      farthest (Xuan et al. 2020, "Improved embeddings with easy positive triplet mining", EPSHN).
    - distance_weighted: for each pair of anchor and positive a negative, drawn as in `mine_pairs`.
    """
    assert kind not in ("all", "multi_similarity")
    found = [_mine_chunk(kind, chunk, draws) for chunk in pairs.chunks()]
    first = pairs.own[0]  # rows are numbered from this process's first
    starts = (chunk.own[0] - first for chunk in pairs.chunks())
    anchors = torch.cat([start + one.anchor for one, start in zip(found, starts, strict=True)])
    return Triplets(anchors, *(torch.cat(parts) for parts in list(zip(*found, strict=True))[1:]))


def _mine_chunk(kind: TripletMining, pairs: Pairs, draws: Draws | None) -> Triplets:
    block = block_of(pairs)
    similarities, positive, negative = block
    anchors = torch.arange(len(similarities), device=similarities.device)
    if kind in ("hard", "easy_positive"):
        if kind == "hard":
            chosen = similarities.masked_fill(~positive, torch.inf).argmin(dim=1)
            nearest = similarities.masked_fill(~negative, -torch.inf).argmax(dim=1)
        else:
            chosen = similarities.masked_fill(~positive, -torch.inf).argmax(dim=1)
            nearest = _semi_hard(block, similarities.gather(1, chosen[:, None]))[:, 0]
        usable = positive.any(dim=1) & negative.any(dim=1)
        return Triplets(anchors, chosen, nearest, usable.to(similarities.dtype))
    anchor, chosen = positive.nonzero().unbind(dim=1)
    if kind == "semi_hard":
        usable = negative.any(dim=1)[anchor]
        to_positive, is_there = padded(similarities, positive)
        return Triplets(anchor, chosen, _semi_hard(block, to_positive)[is_there], usable.to(similarities.dtype))
    assert draws is not None
    drawn, found = _draw_by_distance(block, pairs.own, draws)
    turn = (positive.cumsum(dim=1) - 1)[anchor, chosen]  # which of the anchor's positives it is
    return Triplets(anchor, chosen, drawn[anchor, turn], found[anchor, turn].to(similarities.dtype))


def _semi_hard(block: Block, to_positive: Tensor) -> Tensor:
    """For each row and each of K similarities the nearest negative that is farther, else the farthest: int64 [n, K]"""
    ordered, columns = (-block.similarities).masked_fill(~block.negative, torch.inf).sort(dim=1)  # nearest first
    places = torch.searchsorted(ordered, -to_positive.contiguous(), right=True)
    farthest = (block.negative.sum(dim=1, keepdim=True) - 1).clamp_min(0)
    return columns.gather(1, torch.minimum(places, farthest))


def _draw_by_distance(block: Block, own: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """For each row as many negatives as it has positives, drawn with weights 1 / q(d): int64 [n, K], valid bool [n, K].

    q(d) ~ d^(D - 2) (1 - d^2 / 4)^((D - 3) / 2) is the density of distances of random points on the sphere (Wu et al.
    2017, equation 3). Where all negatives are beyond LARGEST_DISTANCE each may be drawn.
    """
    positives = block.positive.sum(dim=1)
    slots = max(1, int(positives.max()))
    distances = distances_of(block.similarities.double()).clamp_min(SMALLEST_DISTANCE)
    dimension = draws.dimension
    across = (1 - distances.square() / 4).clamp_min(1e-8)
    log_density = (dimension - 2) * distances.log() + (dimension - 3) / 2 * across.log()
    near = block.negative & (distances < LARGEST_DISTANCE)
    allowed = torch.where(near.any(dim=1, keepdim=True), near, block.negative)
    logits = (-log_density).masked_fill(~allowed, -torch.inf)
    weights = (logits - logits.amax(dim=1, keepdim=True).clamp_min(-1e300)).exp()
    sums = weights.cumsum(dim=1)
    uniform = draws.uniforms(own, slots)
    drawn = torch.searchsorted(sums, uniform * sums[:, -1:], right=True).clamp_max(sums.shape[1] - 1)
    valid = (torch.arange(slots, device=own.device) < positives[:, None]) & (sums[:, -1:] > 0)
    return drawn, valid


def _only(columns: Tensor, mask: Tensor, like: Tensor) -> Tensor:
    """1 at one column of each row where the mask is set there, 0 elsewhere: [n, M]."""
    one = torch.zeros_like(like).scatter_(1, columns[:, None], 1.0)
    return one * mask
