"""Queries and the gallery that they are asked of, and what is done to both for an open set."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.evaluation.features import Features
from stages.evaluation.retrieval import count_related, count_relevant
from stages.labels import ANY_SHARED, LabelRelation


class TooFewIdentities(ValueError):
    """There are not two identities, one to be known and one to be new; the message counts them."""

    exit_code = 6


@dataclass(frozen=True)
class QuerySets:
    """Queries [Q] and gallery [G], and which row of the gallery a query is itself."""

    queries: Features
    gallery: Features
    same: Tensor
    """int64 [Q], -1: the query is not in the gallery."""
    relation: LabelRelation = ANY_SHARED
    """Of several labels."""

    @cached_property
    def relevant(self) -> NDArray[np.int64]:
        """[Q], gallery rows of the query's label (of several: that belong to it), itself left out."""
        return count_related(self.queries.relating, self.relation.against(self.gallery.relating), self.same)

    @property
    def drawn_whole(self) -> NDArray[np.int64] | None:
        """[Q], what an interval draws whole: identities; of several labels declared groups, or None: single queries."""
        if self.queries.label_sets is None:
            return self.queries.labels.numpy()
        return self.queries.groups if self.queries.has_groups else None

    @property
    def searched(self) -> NDArray[np.int64]:
        """[Q], gallery rows that each query is compared with."""
        return len(self.gallery) - (self.same >= 0).numpy().astype(np.int64)

    def sharing_a_group(self) -> int:
        """Queries that have an image of their own declared group in the gallery, beside themselves."""
        if not self.queries.has_groups:
            return 0
        return int((count_relevant(self.queries.groups, self.gallery.groups, self.same.numpy()) > 0).sum())

    def without(self, labels: NDArray[np.int64]) -> "QuerySets":
        """Neither queries nor gallery rows of some labels."""
        queries = np.flatnonzero(~np.isin(self.queries.labels.numpy(), labels))
        gallery = np.flatnonzero(~np.isin(self.gallery.labels.numpy(), labels))
        return pair_sets(self.queries.select(queries), self.gallery.select(gallery))

    def with_new(self, share: float, seed: int) -> "QuerySets":
        """The gallery without a share of the identities, so that queries of these are new.

        They are drawn from those that have another image for one of their queries: at least one of them, and not all.

        Raises:
            TooFewIdentities: fewer than two of these.
        """
        identities = np.unique(self.queries.labels.numpy()[self.relevant > 0])
        if len(identities) < 2:
            raise TooFewIdentities(f"an open set of {len(identities)} classes with two images or more")
        count = min(max(1, round(share * len(identities))), len(identities) - 1)
        new = np.random.Generator(np.random.PCG64(seed)).permutation(identities)[:count]
        kept = np.flatnonzero(~np.isin(self.gallery.labels.numpy(), new))
        return pair_sets(self.queries, self.gallery.select(kept))


def pair_sets(queries: Features, gallery: Features, relation: LabelRelation = ANY_SHARED) -> QuerySets:
    """Find each query in the gallery by its id."""
    order = np.argsort(gallery.ids)
    ordered = gallery.ids[order]
    place = np.searchsorted(ordered, queries.ids)
    inside = place < len(ordered)
    inside[inside] = ordered[place[inside]] == queries.ids[inside]
    same = np.full(len(queries), -1)
    same[inside] = order[place[inside]]
    return QuerySets(queries, gallery, torch.from_numpy(same), relation)
