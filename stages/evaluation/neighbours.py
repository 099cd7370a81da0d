"""Exact nearest neighbours by cosine similarity, in bounded memory, and the classifier that votes with them."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

TILE_QUERIES = 512
TILE_GALLERY = 65536
LARGEST_VOTES = 2**24
"""Queries times classes whose votes are in memory at once."""


class Neighbours(NamedTuple):
    """The k most similar gallery rows of each query, best first, the smaller index first among equals."""

    similarity: Tensor
    """[Q, k], cosine, from -1 to 1."""
    index: Tensor
    """int64 [Q, k], rows of the gallery."""


def nearest(queries: Tensor, gallery: Tensor, k: int, decimals: int | None = None) -> Neighbours:
    """Exact k nearest neighbours by cosine similarity; k is capped at the size of the gallery.

    Args:
        queries: [Q, D] floats, of any length; a row of zeros has similarity 0 with everything.
        gallery: [G, D].
        decimals: similarities are rounded to so many before they are compared, so that what differs only by the order
            of additions is equal.

    Raises:
        ValueError: dimensions that differ, an empty gallery, or k below 1.
    """
    if queries.shape[1:] != gallery.shape[1:] or gallery.ndim != 2 or not len(gallery) or k < 1:
        raise ValueError(f"no {k} nearest of {[*queries.shape]} in {[*gallery.shape]}")
    k = min(k, len(gallery))
    # Normalised once: [G, D] again. Queries are normalised tile by tile.
    gallery = torch.nn.functional.normalize(gallery, dim=1)
    found = [
        _nearest_of_tile(torch.nn.functional.normalize(tile, dim=1), gallery, k, decimals)
        for tile in queries.split(TILE_QUERIES)
    ]
    if not found:
        return Neighbours(queries.new_zeros(0, k), torch.zeros(0, k, dtype=torch.int64))
    return Neighbours(torch.cat([one.similarity for one in found]), torch.cat([one.index for one in found]))


def _nearest_of_tile(queries: Tensor, gallery: Tensor, k: int, decimals: int | None) -> Neighbours:
    """Walk the gallery in tiles, keeping the best so far: first in each merge, and a stable sort leaves them so."""
    best = None
    for begin in range(0, len(gallery), TILE_GALLERY):
        similarity = queries @ gallery[begin : begin + TILE_GALLERY].T
        tile = _largest(similarity if decimals is None else similarity.round(decimals=decimals), k)
        tile = Neighbours(tile.similarity, tile.index + begin)
        if best is not None:
            tile = Neighbours(*(torch.cat(pair, 1) for pair in zip(best, tile, strict=True)))
            similarity, order = tile.similarity.sort(dim=1, descending=True, stable=True)
            tile = Neighbours(similarity[:, :k], tile.index.gather(1, order[:, :k]))
        best = tile
    assert best is not None
    return best


def _largest(similarity: Tensor, k: int) -> Neighbours:
    """The k largest of each row [Q, G], by value and then by column; top-k alone leaves the choice of equals open."""
    k = min(k, similarity.shape[1])
    values, columns = similarity.topk(min(k + 1, similarity.shape[1]), dim=1)
    tied = values[:, k - 1] == values[:, -1] if k < similarity.shape[1] else values.new_zeros(len(values)).bool()
    columns, order = columns[:, :k].sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    if tied.any():
        full, order = similarity[tied].sort(dim=1, descending=True, stable=True)
        values[tied], columns[tied] = full[:, :k], order[:, :k]
    return Neighbours(values, columns)


def classify(neighbours: Neighbours, labels: Tensor, k: int, classes: int, temperature: float = 0.1) -> Tensor:
    """Class by the votes of the k nearest, each weighing exp(similarity / temperature) (Wu et al. 2018, section 3.4).

    Args:
        neighbours: at least k of them, or the whole gallery.
        labels: int64 [G], of the gallery.

    Returns:
        int64 [Q]; of equal votes the smallest class.
    """
    predicted = torch.empty(len(neighbours.index), dtype=torch.int64)
    size = max(1, LARGEST_VOTES // classes)
    for begin in range(0, len(predicted), size):
        part = slice(begin, begin + size)
        similarity = neighbours.similarity[part, :k].double()
        # Relative to the best neighbour: the same ranking, and nothing overflows at small temperatures.
        weights = torch.exp((similarity - similarity[:, :1]) / temperature)
        votes = weights.new_zeros(len(similarity), classes)
        votes.scatter_add_(1, labels[neighbours.index[part, :k]], weights)
        predicted[part] = torch.from_numpy(np.argmax(votes.cpu().numpy(), axis=1))
    return predicted


def label_votes(neighbours: Neighbours, targets: Tensor, k: int, temperature: float = 0.1) -> Tensor:
    """Share of the votes of the k nearest that each label has; votes weigh as in `classify`.

    Args:
        neighbours: at least k of them, or the whole gallery.
        targets: bool [G, C], which labels the gallery has.

    Returns:
        float64 [Q, C], from 0 to 1, to five decimals: what differs by rounding only is equal, and ranks equal.
    """
    votes = torch.zeros(len(neighbours.index), targets.shape[1], dtype=torch.float64)
    size = max(1, LARGEST_VOTES // max(1, targets.shape[1] * min(k, neighbours.index.shape[1])))
    for begin in range(0, len(votes), size):
        part = slice(begin, begin + size)
        similarity = neighbours.similarity[part, :k].double()
        weights = torch.exp((similarity - similarity[:, :1]) / temperature)
        weights /= weights.sum(1, keepdim=True)
        found = targets[neighbours.index[part, :k]].double()  # [q, k, C]
        votes[part] = torch.bmm(weights[:, None], found)[:, 0]
    return votes.round_(decimals=5)
