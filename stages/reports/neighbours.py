"""A few images and their nearest in the gallery, found in one pass over the features."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stages.evaluation.features import FeatureFile
from stages.evaluation.neighbours import nearest


def pick_queries(labels: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    """Positions of images to look at: drawn evenly over the classes, the same ones each time.

    Args:
        labels: int64 [N]; -1 where there is none.
    """
    order = np.random.default_rng(0).permutation(len(labels))
    rounds = np.empty(len(labels), dtype=np.int64)
    seen: dict[int, int] = {}
    for position in order:
        label = int(labels[position])
        rounds[position] = seen.get(label, 0)
        seen[label] = rounds[position] + 1
    # First one of every class, then a second one of every class: sorting is stable, so the draw decides within.
    chosen = order[np.argsort(rounds[order], kind="stable")][:number]
    return chosen[np.lexsort((chosen, labels[chosen]))]


def nearest_in_file(
    features: FeatureFile, queries: NDArray[np.int64], gallery: NDArray[np.bool_], count: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The nearest gallery rows of each query by cosine similarity; a query is never its own neighbour.

    Args:
        queries: int64 [Q], rows of the file.
        gallery: bool [N], the rows of the file that may be found.

    Returns:
        rows int64 [Q, K] and similarities [Q, K], nearest first, the smaller row first among equals; K = count or what
        the gallery holds. In double precision and rounded, so that the number of threads does not decide between two.
    """
    wanted = torch.from_numpy(features.rows(queries)).double()
    rows, similarities = np.empty((len(queries), 0), dtype=np.int64), np.empty((len(queries), 0))
    for start, block in features.blocks():
        candidates = np.flatnonzero(gallery[start : start + len(block)])
        if len(candidates):
            # One more than asked for: a query may find itself.
            found = nearest(wanted, torch.from_numpy(block[candidates]).double(), count + 1, decimals=6)
            rows = np.concatenate([rows, start + candidates[found.index.numpy()]], axis=1)
            similarities = np.concatenate([similarities, found.similarity.numpy()], axis=1)
    similarities[rows == queries[:, None]] = -np.inf
    others = gallery.sum() - bool(gallery[queries].any())
    best = np.lexsort((rows, -similarities), axis=1)[:, : min(count, others)]
    return np.take_along_axis(rows, best, 1), np.take_along_axis(similarities, best, 1)


def neighbour_pages(
    features: FeatureFile, queries: NDArray[np.int64], gallery_split: str, count: int
) -> dict[str, Any]:
    """Queries with their nearest images of a split, as plain data.

    Returns:
        {"gallery", "gallery_images", "queries": [{"id", "key", "label", "right", "neighbours": [{"id", "key",
        "label", "similarity", "right"}]}]}; label is None where there is none, right where there is not exactly one.
    """
    gallery = features.splits == gallery_split
    rows, similarities = nearest_in_file(features, queries, gallery, count)
    pages = []
    for query, found, scores in zip(queries, rows, similarities, strict=True):
        label = int(features.labels[query])
        neighbours = [
            {
                **_image(features, row),
                "similarity": round(float(score), 4),
                "right": None if label < 0 else int(features.labels[row]) == label,
            }
            for row, score in zip(found, scores, strict=True)
        ]
        right = None if label < 0 else sum(bool(neighbour["right"]) for neighbour in neighbours)
        pages.append({**_image(features, query), "right": right, "neighbours": neighbours})
    return {"gallery": gallery_split, "gallery_images": int(gallery.sum()), "queries": pages}


def shown_ids(pages: Sequence[dict[str, Any]]) -> list[int]:
    """Ids of all images that the pages show, each once, in order."""
    ids = {query["id"] for page in pages for query in page["queries"]}
    ids |= {found["id"] for page in pages for query in page["queries"] for found in query["neighbours"]}
    return sorted(ids)


def _image(features: FeatureFile, row: int) -> dict[str, Any]:
    names = [features.classes[label] for label in features.label_lists[row]]
    return {"id": int(features.ids[row]), "key": features.keys[row], "label": ", ".join(names) or None}
