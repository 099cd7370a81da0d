"""Confusions, so that ten classes and thousands are both legible."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_NAMED_CLASSES = 20
"""Up to this many classes the matrix is a table with names; above, a picture beside the list of confused pairs."""
MOST_PICTURED_CLASSES = 400
"""Above this many a cell of the picture is smaller than a pixel of the page: then there are the pairs alone."""
PAIRS = 12


def confusion_cells(linear: dict[str, Any]) -> NDArray[np.int64]:
    """What a probe's `linear` holds of confusions, as [K, 3]: true class, predicted class, count above 0, sorted."""
    if "confusion_cells" in linear:
        return np.asarray(linear["confusion_cells"], dtype=np.int64).reshape(-1, 3)
    counts = np.asarray(linear["confusion"], dtype=np.int64)
    rows, columns = np.nonzero(counts)
    return np.stack([rows, columns, counts[rows, columns]], axis=1)


def row_shares(cells: NDArray[np.int64], classes: int) -> NDArray[np.float64]:
    """Counts as shares of their true class, [C, C]; a class without an image stays 0."""
    counts = np.zeros((classes, classes))
    counts[cells[:, 0], cells[:, 1]] = cells[:, 2]
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def confused_pairs(cells: NDArray[np.int64], classes: list[str], most: int = PAIRS) -> list[dict[str, Any]]:
    """The mistakes made most often: {"true", "predicted", "count", "of", "share"}, most frequent first."""
    images = np.bincount(cells[:, 0], weights=cells[:, 2], minlength=len(classes)).astype(np.int64)
    mistakes = cells[cells[:, 0] != cells[:, 1]]
    pairs = []
    for true, predicted, number in mistakes[np.argsort(-mistakes[:, 2], kind="stable")][:most].tolist():
        of = int(images[true])
        pair = {"true": classes[true], "predicted": classes[predicted]}
        pairs.append(pair | {"count": number, "of": of, "share": round(number / of, 6)})
    return pairs


def confusion_table(cells: NDArray[np.int64], classes: list[str]) -> list[dict[str, Any]]:
    """Rows of a table with names: {"name", "cells": [{"count", "share", "right"}]}."""
    shares = row_shares(cells, len(classes))
    counts = np.zeros(shares.shape, dtype=np.int64)
    counts[cells[:, 0], cells[:, 1]] = cells[:, 2]
    return [
        {
            "name": name,
            "cells": [
                {"count": int(counts[row, column]), "share": float(shares[row, column]), "right": row == column}
                for column in range(len(classes))
            ],
        }
        for row, name in enumerate(classes)
    ]
