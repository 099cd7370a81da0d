"""A table of pairs of images, with how alike the two are."""

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import normpath
from pathlib import Path

import numpy as np

from stages.sources.candidates import SourceError
from stages.sources.table import load_csv

COLUMNS = ("a", "b", "target")


@dataclass(frozen=True)
class PairTable:
    """Pairs as they stand in a file.

    Attributes:
        names: of the two images of each pair: paths relative to the source, the keys of shards.
        targets: float64 [P], 0 (nothing in common) to 1 (alike).
        lines: of the file, on which each pair ends.
    """

    path: Path
    names: list[tuple[str, str]]
    targets: np.ndarray
    lines: list[int]

    def __len__(self) -> int:
        return len(self.names)

    def among(self, keys: Sequence[str]) -> np.ndarray:
        """Where the two of each pair stand in `keys`, int64 [P, 2]; -1 for one that is not there."""
        places = {key: place for place, key in enumerate(keys)}
        return np.array([[places.get(name, -1) for name in pair] for pair in self.names], dtype=np.int64)


def read_pairs(path: Path) -> PairTable:
    """Read a CSV file with the columns `a`, `b` and `target`; others are passed over.

    Args:
        path: UTF-8, a header in its first line; comma, semicolon or tab between cells.

    Raises:
        SourceError: no such file, not a table, a column that is missing, a pair that lacks an image, or a target that
            is no number from 0 to 1.
    """
    if not path.is_file():
        raise SourceError(f"there is no file {path}: pairs need a CSV file with the columns {', '.join(COLUMNS)}")
    table = load_csv(path)
    lacking = [name for name in COLUMNS if name not in table.header]
    if lacking:
        raise SourceError(
            f"{path} has no column {lacking[0]!r}; pairs need {', '.join(COLUMNS)}, and its columns are: "
            f"{', '.join(table.header)}"
        )
    left, right, target = (table.header.index(name) for name in COLUMNS)
    names, targets = [], []
    for row, line in zip(table.rows, table.lines, strict=True):
        if not row[left].strip() or not row[right].strip():
            raise SourceError(f"{path}, line {line}: a pair is of two images, and one of the cells is empty")
        names.append((normpath(row[left].strip()), normpath(row[right].strip())))
        targets.append(_target(row[target], f"{path}, line {line}"))
    return PairTable(path, names, np.array(targets), table.lines)


def _target(text: str, place: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise SourceError(f"{place}: the target {text!r} is no number") from error
    if not 0 <= value <= 1:  # NaN neither
        raise SourceError(f"{place}: the target {text} is not from 0 (nothing in common) to 1 (alike)")
    return value
