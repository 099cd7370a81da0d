"""Features of an `embed` artifact, read in blocks: little memory, however many images there are."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stages.reports.artifacts import read_json

BLOCK_NUMBERS = 4_000_000
"""Feature values that are in memory at once."""


class Features:
    """Rows of features.parquet, in the order of the file.

    Attributes:
        card: features.json.
        ids, labels: int64 [N]; a label is -1 where there is none.
        splits: str [N].
    """

    def __init__(self, folder: Path):
        self.path = folder / "features.parquet"
        self.card = read_json(folder / "features.json")
        columns = pq.read_table(self.path, columns=["id", "split", "label"])
        self.ids: NDArray[np.int64] = columns["id"].to_numpy()
        self.labels: NDArray[np.int64] = columns["label"].to_numpy().astype(np.int64)
        self.splits: NDArray[np.str_] = np.asarray(columns["split"].to_pylist(), dtype=np.str_)

    @property
    def dimension(self) -> int:
        return int(self.card["dimension"])

    @property
    def classes(self) -> list[str]:
        return self.card["classes"]

    @cached_property
    def keys(self) -> list[str]:
        return pq.read_table(self.path, columns=["key"])["key"].to_pylist()

    def positions(self, split: str) -> NDArray[np.int64]:
        """Rows of the file that belong to a split."""
        return np.flatnonzero(self.splits == split)

    def blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """The whole file as (first row, features [B, D])."""
        start, size = 0, max(1, BLOCK_NUMBERS // self.dimension)
        for batch in pq.ParquetFile(self.path).iter_batches(batch_size=size, columns=["features"]):
            block = batch.column(0).flatten().to_numpy().reshape(batch.num_rows, self.dimension)
            yield start, block
            start += batch.num_rows

    def rows(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Features [n, D] of rows of the file, in the order asked for."""
        found = np.empty((len(positions), self.dimension), dtype=np.float32)
        for start, block in self.blocks():
            inside = (positions >= start) & (positions < start + len(block))
            found[inside] = block[positions[inside] - start]
        return found
