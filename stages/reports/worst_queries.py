"""The queries of a retrieval that found least, with what they found; and which classes it confuses."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.evaluation.features import FeatureFile
from stages.reports.confusions import confused_pairs
from stages.reports.retrievals import Retrieval

PAIRS = 10


def pick_worst(retrieval: Retrieval, number: int) -> NDArray[np.int64]:
    """Rows of queries with something to find, by falling rank of the nearest of their class, then rising precision."""
    rows = np.flatnonzero(retrieval.relevant > 0)
    order = np.lexsort((rows, retrieval.average_precision[rows], -retrieval.first_rank[rows]))
    return rows[order[:number]]


def worst_queries(retrieval: Retrieval, features: FeatureFile, number: int, neighbours: int) -> dict[str, Any]:
    """The worst queries with their nearest images, as plain data.

    Returns:
        {"splits", "queries": [{"id", "key", "label", "first_rank", "relevant", "average_precision", "right",
        "neighbours": [{"id", "key", "label", "similarity", "right"}]}]}
    """
    pages = []
    for row in pick_worst(retrieval, number).tolist():
        found = []
        listed = (retrieval.neighbours[row, :neighbours], retrieval.similarities[row], retrieval.right[row])
        for place, score, right in zip(*listed, strict=False):
            image = _image(features, int(place))
            found.append(image | {"similarity": round(float(score), 4), "right": bool(right)})
        query = _image(features, int(retrieval.ids[row]))
        query |= {"first_rank": int(retrieval.first_rank[row]), "relevant": int(retrieval.relevant[row])}
        query |= {"average_precision": round(float(retrieval.average_precision[row]), 6)}
        pages.append(query | {"right": sum(one["right"] for one in found), "neighbours": found})
    return {"splits": retrieval.metrics["protocol"]["splits"], "queries": pages}


def nearest_classes(retrieval: Retrieval, features: FeatureFile) -> dict[str, Any]:
    """Class of the query against class of its nearest image, over the classes that are either; of images with one label
    each.

    Returns:
        {"classes": names, "cells": [[class of the query, class of the nearest, count]] above 0, sorted, "pairs": the
        mistakes made most often (see `confused_pairs`), "without_label": queries whose nearest image has none}
    """
    rows = np.flatnonzero(retrieval.relevant > 0)
    nearest = features.labels[np.searchsorted(features.ids, retrieval.neighbours[rows, 0])]
    pairs = np.stack([retrieval.labels[rows], nearest], axis=1)
    labelled = pairs[nearest >= 0]
    involved = np.unique(np.concatenate([retrieval.labels[rows], labelled[:, 1]]))
    names = [retrieval.metrics["classes"][label] for label in involved.tolist()]
    cells, counts = np.unique(np.searchsorted(involved, labelled), axis=0, return_counts=True)
    cells = np.concatenate([cells, counts[:, None]], axis=1)
    return {
        "classes": names,
        "cells": cells.tolist(),
        "pairs": confused_pairs(cells, names, PAIRS),
        "without_label": int((nearest < 0).sum()),
    }


def _image(features: FeatureFile, identity: int) -> dict[str, Any]:
    row = int(np.searchsorted(features.ids, identity))
    names = [features.classes[label] for label in features.label_lists[row]]
    return {"id": identity, "key": features.keys[row], "label": ", ".join(names) or None}
