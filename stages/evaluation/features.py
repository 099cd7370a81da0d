"""Features as the stage `embed` writes them: features.parquet and features.json."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.images.index import ATTRIBUTE, NoSuchAttribute
from stages.labels.sets import name_rows

BLOCK_NUMBERS = 4_000_000
"""Feature values that are in memory at once."""
FORMAT = 1
COLUMNS = ("id", "split", "label", "labels", "group")
"""Beside keys and features."""


class UnreadableFeatures(ValueError):
    """The file is not what this version of the stage `embed` writes."""

    exit_code = 4


class FeatureFile:
    """features.parquet read in blocks: little memory, however many images there are.

    Attributes:
        card: features.json.
        ids, labels: int64 [N]; a label is -1 where there is none, and where there are several.
        splits: str [N].
        label_counts: int64 [N], labels of each sample.
        groups: int64 [N], equal for samples of one declared group; any other sample has a number of its own.
        has_groups: whether a group is declared for any sample.

    Raises:
        UnreadableFeatures: an older version wrote the file.
    """

    def __init__(self, folder: Path):
        self.path = folder / "features.parquet"
        self.card = _read_card(folder / "features.json")
        columns = _read_columns(self.path, self.dimension)
        self.ids: NDArray[np.int64] = columns["id"].to_numpy()
        self.labels: NDArray[np.int64] = columns["label"].to_numpy().astype(np.int64)
        self.splits: NDArray[np.str_] = np.asarray(columns["split"].to_pylist(), dtype=np.str_)
        self.label_counts: NDArray[np.int64] = np.array(
            [len(one) for one in columns["labels"].to_pylist()], dtype=np.int64
        )
        self.has_groups = columns["group"].null_count < len(columns)
        self.groups = _number(columns["group"])

    @property
    def dimension(self) -> int:
        return int(self.card["dimension"])

    @property
    def classes(self) -> list[str]:
        return self.card["classes"]

    @cached_property
    def keys(self) -> list[str]:
        return pq.read_table(self.path, columns=["key"])["key"].to_pylist()

    @cached_property
    def label_lists(self) -> list[list[int]]:
        """All labels of each sample, [N]."""
        return pq.read_table(self.path, columns=["labels"])["labels"].to_pylist()

    def attribute(self, name: str) -> list[str | None]:
        """A further column of the source (`columns.attributes` of the stage shard), [N]; None without a value.

        Raises:
            NoSuchAttribute: lists those that there are.
        """
        columns = pq.read_schema(self.path).names
        present = [one.removeprefix(ATTRIBUTE) for one in columns if one.startswith(ATTRIBUTE)]
        if name not in present:
            raise NoSuchAttribute(self.path, name, present)
        return pq.read_table(self.path, columns=[f"{ATTRIBUTE}{name}"])[f"{ATTRIBUTE}{name}"].to_pylist()

    def positions(self, split: str) -> NDArray[np.int64]:
        """Rows of the file that belong to a split."""
        return np.flatnonzero(self.splits == split)

    def labels_of(self, split: str) -> NDArray[np.int64]:
        """Labels that samples of a split have, alone or among several: int64, ascending."""
        lists = self.label_lists
        return np.array(sorted({label for row in self.positions(split) for label in lists[row]}), dtype=np.int64)

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


@dataclass(frozen=True)
class Features:
    """One row a sample, in order of id."""

    features: Tensor
    """float32 [N, D]."""
    labels: Tensor
    """int64 [N], -1: none, or several."""
    label_counts: np.ndarray
    """int64 [N], labels of each sample."""
    groups: np.ndarray
    """int64 [N], equal for samples of one group; a sample without one has a number of its own."""
    has_groups: bool
    """Whether groups were declared."""
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
    label_sets: Tensor | None = None
    """bool [N, C], where they are asked for: all labels of each sample."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def relating(self) -> Tensor:
        """Labels by which samples belong together: `label_sets` where there are, else `labels`."""
        return self.labels if self.label_sets is None else self.label_sets

    @property
    def names(self) -> list[str | None]:
        """The labels of each sample in words: all of them where `label_sets` are there."""
        if self.label_sets is None:
            return name_rows(([label] if label >= 0 else [] for label in self.labels.tolist()), self.classes)
        return name_rows((np.flatnonzero(row).tolist() for row in self.label_sets.numpy()), self.classes)

    def select(self, rows: np.ndarray) -> "Features":
        """Those rows (positions, int64): a view where they are consecutive."""
        consecutive = len(rows) > 0 and bool((np.diff(rows) == 1).all())
        taken = slice(int(rows[0]), int(rows[-1]) + 1) if consecutive else torch.from_numpy(rows)
        return Features(
            self.features[taken],
            self.labels[taken],
            self.label_counts[rows],
            self.groups[rows],
            self.has_groups,
            self.ids[rows],
            self.keys[rows],
            self.splits[rows],
            self.classes,
            self.card,
            None if self.label_sets is None else self.label_sets[taken],
        )


def read_features(folder: Path) -> Features:
    """All of an embed artifact's features, read block by block: memory is that of the features, once.

    Args:
        folder: the artifact's files.
    """
    file = FeatureFile(folder)
    features = torch.empty(len(file.ids), file.dimension)
    for start, block in file.blocks():
        features[start : start + len(block)] = torch.from_numpy(block.copy())
    return Features(
        features,
        torch.from_numpy(file.labels),
        file.label_counts,
        file.groups,
        file.has_groups,
        file.ids,
        np.asarray(file.keys, dtype=str),
        file.splits,
        file.classes,
        file.card,
    )


def _read_card(path: Path) -> dict[str, Any]:
    """features.json; raises UnreadableFeatures, which names the field."""
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        if card.get("format", FORMAT) != FORMAT:
            raise ValueError(f"format: {card['format']!r} is not {FORMAT}")
        if type(card["dimension"]) is not int or card["dimension"] < 1:
            raise ValueError(f"dimension: {card['dimension']!r} is no count")
        if not isinstance(card["classes"], list) or not all(isinstance(one, str) for one in card["classes"]):
            raise ValueError("classes: each is a text")
    except KeyError as error:
        raise UnreadableFeatures(f"cannot read {path}: {error} is missing") from error
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UnreadableFeatures(f"cannot read {path}: {error}") from error
    return card


def _read_columns(path: Path, dimension: int) -> pa.Table:
    """What is held in memory of features.parquet; raises UnreadableFeatures."""
    try:
        schema = pq.read_schema(path)
        lacking = [name for name in (*COLUMNS, "features") if name not in schema.names]
        if lacking:
            raise UnreadableFeatures(
                f"{path} has no column {lacking[0]!r}: an older version wrote it; run the stage embed again"
            )
        kind = schema.field("features").type
        if not (pa.types.is_fixed_size_list(kind) and kind.list_size == dimension and kind.value_type == pa.float32()):
            raise UnreadableFeatures(f"{path}: features: is {kind}, and features.json says {dimension} numbers a row")
        return pq.read_table(path, columns=[*COLUMNS])
    except (OSError, pa.ArrowException) as error:
        raise UnreadableFeatures(f"cannot read {path}: {' '.join(str(error).split())}") from error


def _number(names: pa.ChunkedArray) -> NDArray[np.int64]:
    """Groups as numbers: names by first appearance, then one for each sample without a name."""
    numbers = names.combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)  # NaN without a name
    missing = np.isnan(numbers)
    found = np.where(missing, 0, numbers).astype(np.int64)
    found[missing] = found.max(initial=-1, where=~missing) + 1 + np.arange(missing.sum())
    return found
