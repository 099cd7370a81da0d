"""Features as the stage `embed` writes them: features.parquet and features.json."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor


@dataclass(frozen=True)
class Features:
    """One row a sample, in order of id."""

    features: Tensor
    """float32 [N, D]."""
    labels: Tensor
    """int64 [N], -1: none."""
    ids: np.ndarray
    """int64 [N]."""
    keys: np.ndarray
    """str [N], path relative to the source."""
    splits: np.ndarray
    """str [N], train, val or test."""
    classes: list[str]
    """Names by label; empty if nothing is labelled."""
    card: dict[str, Any]
    """features.json: encoder, dimension, counts."""

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: np.ndarray) -> "Features":
        """Those rows (positions, int64): a view where they are consecutive."""
        consecutive = len(rows) > 0 and bool((np.diff(rows) == 1).all())
        taken = slice(int(rows[0]), int(rows[-1]) + 1) if consecutive else torch.from_numpy(rows)
        return Features(
            self.features[taken],
            self.labels[taken],
            self.ids[rows],
            self.keys[rows],
            self.splits[rows],
            self.classes,
            self.card,
        )


def read_features(folder: Path) -> Features:
    """All of an embed artifact's features, read group by group: memory is that of the features, once.

    Args:
        folder: the artifact's files.

    Raises:
        ValueError: a table that is not of this kind.
    """
    card = json.loads((folder / "features.json").read_text(encoding="utf-8"))
    table = pq.ParquetFile(folder / "features.parquet")
    rows, dimension = table.metadata.num_rows, card["dimension"]
    features = torch.empty(rows, dimension)
    begin = 0
    for batch in table.iter_batches(batch_size=4096, columns=["features"]):
        values = batch.column(0).flatten().to_numpy(zero_copy_only=False)
        if len(values) != len(batch) * dimension:
            raise ValueError(f"features.parquet in {folder} does not hold rows of {dimension} numbers")
        features[begin : begin + len(batch)] = torch.from_numpy(values.copy()).view(-1, dimension)
        begin += len(batch)
    columns = table.read(columns=["id", "key", "split", "label"])
    return Features(
        features,
        torch.from_numpy(columns["label"].to_numpy().astype(np.int64)),
        columns["id"].to_numpy(),
        np.asarray(columns["key"].to_pylist(), dtype=str),
        np.asarray(columns["split"].to_pylist(), dtype=str),
        card["classes"],
        card,
    )
