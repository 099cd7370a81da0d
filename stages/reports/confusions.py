"""Confusion matrices, so that ten classes and a thousand are both legible."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_NAMED_CLASSES = 20
"""Up to this many classes the matrix is a table with names; above, a picture beside the list of confused pairs."""
PAIRS = 12


def row_shares(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Counts [C, C] (row: true class) as shares of their row; an empty row stays 0."""
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def confused_pairs(counts: NDArray[np.int64], classes: list[str], most: int = PAIRS) -> list[dict[str, Any]]:
    """The mistakes made most often: {"true", "predicted", "count", "of", "share"}, most frequent first."""
    mistakes = counts.copy()
    np.fill_diagonal(mistakes, 0)
    flat = mistakes.ravel()
    order = np.argsort(-flat, kind="stable")[:most]
    pairs = []
    for true, predicted in (divmod(int(cell), len(classes)) for cell in order if flat[cell] > 0):
        number, of = int(counts[true, predicted]), int(counts[true].sum())
        pair = {"true": classes[true], "predicted": classes[predicted]}
        pairs.append(pair | {"count": number, "of": of, "share": round(number / of, 6)})
    return pairs


def confusion_table(counts: NDArray[np.int64], classes: list[str]) -> list[dict[str, Any]]:
    """Rows of a table with names: {"name", "cells": [{"count", "share", "right"}]}."""
    shares = row_shares(counts)
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
