"""Verification by a trained head of pairs in place of cosines: all pairs of a query and a gallery row, or a sample."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from stages.evaluation.verification import BINS, Counts
from stages.images.order import order

MOST_PAIRS = 2**22
"""Above so many a sample is scored: of 2,048 queries and as many gallery rows it is still all."""
NUMBERS_AT_ONCE = 2**22
"""Of the parts of pairs that are scored at once."""

Parts = tuple[Tensor, Tensor]
Scoring = Callable[[Tensor, Tensor], Tensor]

Numbers = NDArray[np.int64]


class CrossPairs:
    """All pairs of a query and a gallery row, each with its number: first the genuine ones (of one label), then the
    impostors. They are counted exactly and never listed; memory is that of the labels.

    Args:
        queries, gallery: labels, int64 [Q] and [G].
    """

    def __init__(self, queries: Numbers, gallery: Numbers):
        self._rows = np.argsort(gallery, kind="stable")
        ordered = gallery[self._rows]
        # Where the rows of a query's label stand among the ordered ones: from, to.
        self._from, self._to = (np.searchsorted(ordered, queries, side=side) for side in ("left", "right"))
        alike = self._to - self._from
        self._genuine_before = np.concatenate([[0], np.cumsum(alike)])
        self._impostors_before = np.concatenate([[0], np.cumsum(len(gallery) - alike)])
        self.genuine, self.impostors = int(self._genuine_before[-1]), int(self._impostors_before[-1])

    def genuine_at(self, numbers: Numbers) -> tuple[Numbers, Numbers]:
        """Queries and gallery rows, int64 [n] each, of genuine pairs from 0 to `genuine` - 1."""
        query = np.searchsorted(self._genuine_before, numbers, side="right") - 1
        return query, self._rows[self._from[query] + numbers - self._genuine_before[query]]

    def impostors_at(self, numbers: Numbers) -> tuple[Numbers, Numbers]:
        """The same of impostors, counted from 0."""
        query = np.searchsorted(self._impostors_before, numbers, side="right") - 1
        place = numbers - self._impostors_before[query]
        place += np.where(place < self._from[query], 0, self._to[query] - self._from[query])
        return query, self._rows[place]


@dataclass(frozen=True)
class ScoredPairs:
    """What a head says of pairs.

    Attributes:
        genuine, impostors: histograms of `squash`ed scores of both kinds, from -1 to 1: int64 [BINS], as `verify` takes
            them.
        asymmetry: mean over these pairs of |f(a, b) - f(b, a)|, f being a probability; 0 without pairs.
        sampled: whether they are a sample of all pairs.
    """

    genuine: Counts
    impostors: Counts
    asymmetry: float
    sampled: bool


def score_pairs(
    queries: Parts,
    gallery: Parts,
    score: Scoring,
    query_labels: Tensor,
    gallery_labels: Tensor,
    same: Tensor,
    seed: int,
) -> ScoredPairs:
    """Score the pairs that `count_pairs` counts by the mean probability of both orders.

    Where queries and gallery rows make more than MOST_PAIRS, so many are drawn, keyed by the seed and without
    repetition: half of them genuine where there are so many, because these are rare, the rest impostors. Rates of
    errors are of each kind by itself, so that it does not bias them. Of the drawn ones, those that do not count are
    left out.

    Args:
        queries, gallery: what embeddings add to scores as the first of a pair and as the second: [Q, H] and [G, H].
        score: first [n, H], second [n, H] -> [n], the logit of a probability.
        query_labels, gallery_labels: int64 [Q] and [G]; pairs with a label below 0 (unknown) are left out.
        same: int64 [Q], the gallery row that is the query itself, -1: there is none. Of two queries that are both in
            the gallery one pair counts, and none of a query with itself.
    """
    known, there = (torch.nonzero(labels >= 0)[:, 0].numpy() for labels in (query_labels, gallery_labels))
    pairs = CrossPairs(query_labels.numpy()[known], gallery_labels.numpy()[there])
    own, width = same.numpy(), queries[0].shape[1]
    is_query = np.zeros(len(gallery_labels), dtype=bool)
    is_query[own[known][own[known] >= 0]] = True
    sampled = pairs.genuine + pairs.impostors > MOST_PAIRS
    genuine = min(pairs.genuine, MOST_PAIRS // 2) if sampled else pairs.genuine
    impostors = min(pairs.impostors, MOST_PAIRS - genuine) if sampled else pairs.impostors
    kinds = ((0, pairs.genuine, genuine, pairs.genuine_at), (1, pairs.impostors, impostors, pairs.impostors_at))
    counts = [np.zeros(BINS, dtype=np.int64), np.zeros(BINS, dtype=np.int64)]
    difference = 0.0
    for kind, total, wanted, at in kinds:
        for numbers in _numbers(seed, kind, total, wanted, max(1, NUMBERS_AT_ONCE // width)):
            query, row = at(numbers)
            query, row = known[query], there[row]
            itself = own[query]
            counted = (row > itself) | ~is_query[row] & (row != itself)
            query, row = torch.from_numpy(query[counted]), torch.from_numpy(row[counted])
            one, other = score(queries[0][query], gallery[1][row]), score(gallery[0][row], queries[1][query])
            difference += float((one.sigmoid() - other.sigmoid()).abs().double().sum())
            bins = ((squash(one, other).numpy() + 1) * (BINS // 2)).astype(np.int64).clip(0, BINS - 1)
            counts[kind] += np.bincount(bins, minlength=BINS)
    scored = int(counts[0].sum() + counts[1].sum())
    return ScoredPairs(counts[0], counts[1], difference / max(scored, 1), sampled)


def squash(one: Tensor, other: Tensor) -> Tensor:
    """The logit z of the mean of two probabilities, given by their logits, as z / (1 + |z|), float64: from -1 to 1.

    A head that is sure says 0.99999 of most pairs; their order is in the logit, which keeps it in double precision.
    """
    one, other = one.double(), other.double()
    log_yes = torch.logaddexp(F.logsigmoid(one), F.logsigmoid(other))
    log_no = torch.logaddexp(F.logsigmoid(-one), F.logsigmoid(-other))
    return F.softsign(log_yes - log_no)


def probability_of(squashed: float) -> float:
    """The probability that `squash` was given, from -1 (0) to 1 (1)."""
    if abs(squashed) == 1:
        return (squashed + 1) / 2
    return float(torch.sigmoid(torch.tensor(squashed / (1 - abs(squashed)), dtype=torch.float64)))


def _numbers(seed: int, kind: int, total: int, wanted: int, at_once: int) -> Iterator[Numbers]:
    """Numbers of `wanted` of `total` pairs, in parts: all of them as they come, or the first of a keyed permutation."""
    drawn = order(seed, kind, total)
    for begin in range(0, wanted, at_once):
        places = np.arange(begin, min(begin + at_once, wanted))
        yield places if wanted == total else drawn[places]
