"""Pairs of similar descriptors, in memory that does not grow with the number of pairs.

Exact up to a number of images; beyond, by cells (an inverted file, Sivic and Zisserman 2003), in time n^1.5.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from stages.images.fingerprints import mirrored

PARTNERS = 16
"""An image keeps this many, the most similar ones, of every split."""
LEAST_SIMILARITY = 0.6
"""Cosine; a near-duplicate has more in 98 of 100 cases."""

EXACT_UP_TO = 200_000
"""Images of the two splits together; more are searched by cells."""
CELLS_PER_ROOT = 4
PROBES = 16
"""Cells that are looked into for each image, of 4 times the root of their images."""

QUERIES_AT_ONCE = 512
GALLERY_AT_ONCE = 8192


class Pairs(NamedTuple):
    """Pairs of images by position. query, gallery: int64 [P]; is_mirrored: bool [P], the query is to be mirrored."""

    query: Tensor
    gallery: Tensor
    is_mirrored: Tensor


def similar_pairs(
    queries: Tensor, gallery: Tensor | None, groups: Tensor | None, advance: Callable[[int], None], *, is_exact: bool
) -> Pairs:
    """For each query the most similar images, as they are and mirrored.

    Args:
        queries: [Q, D] descriptors of a split.
        gallery: [G, D] of another; None: pairs within the split, each of them once, the lower position as the query.
        groups: int64 [Q]; images of a group are no pair. Only within a split.
        advance: called with the number of queries that are done.
        is_exact: look at all pairs, not only into the cells next to a query.

    Returns:
        at most PARTNERS pairs a query, of at least LEAST_SIMILARITY, sorted; both ways of a pair may be there.
    """
    best = _Best(len(queries))
    within = gallery is None
    gallery = queries if gallery is None else gallery
    blocks = _all(len(queries), len(gallery), within) if is_exact else _by_cells(queries, gallery)
    for rows, columns, done in blocks:
        for is_mirrored in (False, True) if len(rows) and len(columns) else ():
            asked = mirrored(queries[rows]) if is_mirrored else queries[rows]
            similarity = asked @ gallery[columns].T
            if within and columns[0] <= rows[-1]:
                similarity.masked_fill_(columns[None] <= rows[:, None], -1)
            if groups is not None:
                similarity.masked_fill_(groups[rows][:, None] == groups[columns][None], -1)
            best.offer(rows, columns, similarity, is_mirrored)
        advance(done)
    return best.pairs()


class _Best:
    """The most similar partners of each query so far: similarity and 2 * position + (1 if mirrored)."""

    def __init__(self, queries: int):
        self._similarity = torch.full((queries, PARTNERS), LEAST_SIMILARITY)
        self._partner = torch.full((queries, PARTNERS), -1)

    def offer(self, rows: Tensor, columns: Tensor, similarity: Tensor, is_mirrored: bool) -> None:
        """Take what is better from a block [len(rows), len(columns)]; among equals the first stays."""
        places, hits = (similarity > self._similarity[rows, -1:]).nonzero(as_tuple=True)
        if not len(places):
            return
        # The few hits of each row, side by side.
        counts = places.bincount(minlength=len(rows))
        slots = torch.arange(len(places)) - (counts.cumsum(0) - counts)[places]
        width = int(counts.max())
        values = torch.full((len(rows), width), -1.0)
        partners = torch.full((len(rows), width), -1)
        # Rounded, so that the order in which a processor adds does not decide between copies.
        values[places, slots] = similarity[places, hits].round(decimals=5)
        partners[places, slots] = 2 * columns[hits] + int(is_mirrored)
        values = torch.cat([self._similarity[rows], values], dim=1)
        partners = torch.cat([self._partner[rows], partners], dim=1)
        values, order = values.sort(dim=1, descending=True, stable=True)
        self._similarity[rows] = values[:, :PARTNERS]
        self._partner[rows] = partners.gather(1, order[:, :PARTNERS])

    def pairs(self) -> Pairs:
        partners = self._partner.sort(dim=1).values
        query, slot = (partners >= 0).nonzero(as_tuple=True)
        found = partners[query, slot]
        return Pairs(query, found // 2, found % 2 == 1)


def _all(queries: int, gallery: int, within: bool) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Blocks of queries and gallery, positions of both, that cover all pairs; and queries done since the last one."""
    for start in range(0, queries, QUERIES_AT_ONCE):
        rows = torch.arange(start, min(start + QUERIES_AT_ONCE, queries))
        first = start // GALLERY_AT_ONCE * GALLERY_AT_ONCE if within else 0
        for begin in range(first, gallery, GALLERY_AT_ONCE):
            end = min(begin + GALLERY_AT_ONCE, gallery)
            yield rows, torch.arange(begin, end), len(rows) if end == gallery else 0


def _by_cells(queries: Tensor, gallery: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Blocks of a cell of the gallery and the queries that look into it.

    Cells are the images nearest to one of some that were drawn; a query looks into those next to it.
    """
    count = min(len(gallery), int(CELLS_PER_ROOT * len(gallery) ** 0.5))
    drawn = torch.randperm(len(gallery), generator=torch.Generator().manual_seed(0))[:count]
    pivots = gallery[drawn.sort().values]
    cell_of = torch.cat([(part @ pivots.T).argmax(dim=1) for part in gallery.split(QUERIES_AT_ONCE)])
    members, bounds = _lists(cell_of, count)
    # A mirrored query lies elsewhere: half of the probes are for it.
    probes = torch.cat(
        [
            torch.cat(
                [(one @ pivots.T).topk(min(PROBES // 2, count), dim=1).indices for one in (part, mirrored(part))], 1
            )
            for part in queries.split(QUERIES_AT_ONCE)
        ]
    )
    asking, asking_bounds = _lists(probes.flatten(), count)
    asking = asking // probes.shape[1]
    done = 0
    for cell in range(count):
        inside = members[bounds[cell] : bounds[cell + 1]]
        rows = asking[asking_bounds[cell] : asking_bounds[cell + 1]].unique()
        for part in rows.split(QUERIES_AT_ONCE):
            for columns in inside.split(GALLERY_AT_ONCE):
                yield part, columns, 0
        reached = len(queries) * (cell + 1) // count
        yield rows[:0], inside[:0], reached - done
        done = reached


def _lists(cells: Tensor, count: int) -> tuple[Tensor, list[int]]:
    """Positions by cell, increasing within each, and where each cell's begin and end."""
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), cells.bincount(minlength=count).cumsum(0)])
    return cells.argsort(stable=True), bounds.tolist()
