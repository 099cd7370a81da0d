"""How well the nearest of a gallery are those that a query wants: ranks, precision at R, average precision."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.evaluation.neighbours import Neighbours
from stages.evaluation.similarity import (
    NEVER,
    TILE_PAIRS,
    order_keys,
    over_tiles,
    payload_of,
    similarity_of,
)
from stages.labels import ANY_SHARED, Against, LabelRelation

SHORT_LIST = 5
"""Places of the list that MAP@5 looks at."""


@dataclass(frozen=True)
class Ranking:
    """What a ranking of the gallery gives each query; with no relevant row all is 0, and no mean should count it."""

    relevant: NDArray[np.int64]
    """[Q], R: gallery rows with the label of the query, or of several labels that belong to it; without the query."""
    first: NDArray[np.int64]
    """[Q], the rank of the nearest relevant row, from 1; 0: there is none."""
    r_precision: NDArray[np.float64]
    """[Q], share of relevant rows among the R nearest (Musgrave et al. 2020)."""
    average_precision_at_r: NDArray[np.float64]
    """[Q], 1/R times the sum of precision(i) over the relevant i among the R nearest (MAP@R: Musgrave et al. 2020)."""
    average_precision_at_5: NDArray[np.float64]
    """[Q], the sum of precision(i) over the relevant i among the 5 nearest, divided by min(R, 5)."""
    neighbours: Neighbours
    """The nearest rows of each query without itself, best first."""
    right: NDArray[np.bool_]
    """[Q, K], which of these are relevant."""

    @property
    def has_relevant(self) -> NDArray[np.bool_]:
        return self.relevant > 0

    @property
    def reciprocal_rank(self) -> NDArray[np.float64]:
        """[Q], 1 / first; its mean is MRR."""
        return np.divide(1, self.first, out=np.zeros(len(self.first)), where=self.has_relevant)

    def hits(self, k: int) -> NDArray[np.bool_]:
        """bool [Q], whether a relevant row is among the k nearest.

        Its mean is Recall@k (Jegou et al. 2011; Song et al. 2016), which is CMC at rank k.
        """
        return self.has_relevant & (self.first <= k)


def rank_gallery(
    queries: Tensor,
    gallery: Tensor,
    query_labels: Tensor,
    gallery_labels: Tensor,
    same: Tensor | None = None,
    neighbours: int = 10,
    relation: LabelRelation = ANY_SHARED,
) -> Ranking:
    """Rank the gallery for each query by cosine similarity in float32, the smaller row first among equals; exact.

    Memory is that of `similarity.TILE_PAIRS` pairs a thread, however many queries there are. Of each query's keys only
    the R nearest (at least the short list and the neighbours) are put in order; the rank of the first relevant row is
    counted.

    Args:
        queries: [Q, D], of any length.
        gallery: [G, D].
        query_labels, gallery_labels: int64 [Q] and [G]; below 0: unknown, relevant to nothing. Or bool [Q, C] and
            [G, C], several labels each.
        same: int64 [Q], the gallery row that is the query itself, which does not count; -1: there is none.
        neighbours: rows to return for each query, at most all that count for every query.
        relation: of several labels: what belongs together is relevant.

    Raises:
        ValueError: dimensions that differ, or an empty gallery.
    """
    own = np.full(len(queries), -1) if same is None else same.numpy()
    related = relation.against(gallery_labels)
    relevant, first = (np.zeros(len(queries), dtype=np.int64) for _ in range(2))
    at_r, mean_at_r, mean_at_5 = (np.zeros(len(queries)) for _ in range(3))
    kept = min(neighbours, len(gallery) - bool((own >= 0).any()))
    index = np.empty((len(queries), kept), dtype=np.int64)
    similarity = np.empty((len(queries), kept), dtype=np.float32)
    right = np.empty((len(queries), kept), dtype=bool)
    # The lowest bit of a key says whether its row is relevant.
    columns = 2 * np.arange(len(gallery), dtype=np.int64)

    def measure(rows: slice, tile: NDArray[np.float32]) -> None:
        is_relevant = related.of(query_labels[rows]).numpy()
        excluded = np.flatnonzero(own[rows] >= 0)
        themselves = excluded, own[rows][excluded]
        is_relevant[themselves] = False
        relevant[rows] = np.count_nonzero(is_relevant, axis=1)
        keys = order_keys(tile, columns | is_relevant)
        keys[themselves] = NEVER
        first[rows] = _first_ranks(keys)
        nearest = _smallest(keys, max(SHORT_LIST, kept, int(relevant[rows].max())))
        hits = (nearest & 1).astype(bool)
        at_r[rows], mean_at_r[rows] = _up_to(hits, relevant[rows], relevant[rows])
        listed = np.minimum(relevant[rows], SHORT_LIST)
        mean_at_5[rows] = _up_to(hits, np.full(len(hits), SHORT_LIST), listed)[1]
        index[rows] = payload_of(nearest[:, :kept]) >> 1
        similarity[rows], right[rows] = similarity_of(nearest[:, :kept]), hits[:, :kept]

    for _ in over_tiles(queries, gallery, measure):
        pass
    found = Neighbours(torch.from_numpy(similarity), torch.from_numpy(index))
    return Ranking(relevant, first, at_r, mean_at_r, mean_at_5, found, right)


def count_related(query_labels: Tensor, gallery: Against, same: Tensor) -> NDArray[np.int64]:
    """For each query the gallery rows that belong to it, itself left out: int64 [Q].

    Args:
        query_labels: int64 [Q], or bool [Q, C].
        gallery: the relation to labels of the gallery.
        same: int64 [Q], the gallery row that is the query itself; -1: there is none.
    """
    if query_labels.ndim == 1:
        return count_relevant(query_labels.numpy(), gallery.columns.numpy(), same.numpy())
    counts = np.zeros(len(query_labels), dtype=np.int64)
    size = max(1, TILE_PAIRS // max(1, len(gallery.columns)))
    for begin in range(0, len(query_labels), size):
        related = gallery.of(query_labels[begin : begin + size]).numpy()
        own = same[begin : begin + size].numpy()
        present = np.flatnonzero(own >= 0)
        related[present, own[present]] = False
        counts[begin : begin + size] = related.sum(axis=1)
    return counts


def count_relevant(
    query_labels: NDArray[np.int64], gallery_labels: NDArray[np.int64], same: NDArray[np.int64]
) -> NDArray[np.int64]:
    """For each query the gallery rows of its label, itself left out; 0 where the label is unknown: int64 [Q]."""
    known = query_labels >= 0
    classes = int(max(query_labels.max(initial=-1), gallery_labels.max(initial=-1))) + 1
    sizes = np.bincount(gallery_labels[gallery_labels >= 0], minlength=classes)
    counts = np.zeros(len(query_labels), dtype=np.int64)
    counts[known] = sizes[query_labels[known]]
    present = np.flatnonzero(known & (same >= 0))
    counts[present] -= gallery_labels[same[present]] == query_labels[present]
    return counts


def _first_ranks(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rank of the smallest key whose lowest bit is set, int64 [B]; 0: there is none."""
    best = np.where(keys & 1, keys, NEVER).min(axis=1)
    ranks = np.count_nonzero(keys <= best[:, None], axis=1)
    return np.where(best == NEVER, 0, ranks)


def _smallest(keys: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The `count` smallest keys of each row, ascending; all, if there are fewer."""
    if count < keys.shape[1]:
        keys = np.partition(keys, count - 1, axis=1)[:, :count]
    return np.sort(keys, axis=1)


def _up_to(
    hits: NDArray[np.bool_], last: NDArray[np.int64], divisor: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of ranked rows [B, K] up to rank `last` [B]: hits, and the sum of precision at hits, both over `divisor` [B]."""
    ranks = np.arange(1, hits.shape[1] + 1)
    counted = hits & (ranks <= last[:, None])
    precision = counted.cumsum(axis=1) / ranks
    over = np.maximum(divisor, 1)
    return counted.sum(axis=1) / over, (precision * counted).sum(axis=1) / over
