"""Some of the near-duplicates that sharding found, to look at."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SHOWN = 12


def some_pairs(file: Path) -> list[dict[str, Any]]:
    """A few rows of near_duplicates.parquet, evenly over the distances; those across splits before the others."""
    table = pq.read_table(file)
    is_across = np.not_equal(table["split"].to_pylist(), table["other_split"].to_pylist())
    shown: list[dict[str, Any]] = []
    for rows in (table.filter(pa.array(is_across)), table.filter(pa.array(~is_across))):
        count = min(SHOWN - len(shown), rows.num_rows)
        places = np.linspace(0, rows.num_rows - 1, count).round().astype(np.int64)
        shown += rows.take(places).to_pylist()
    return shown


def ids_by_split(pairs: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Ids of the images of the pairs, by split."""
    found: dict[str, list[int]] = {}
    for pair in pairs:
        found.setdefault(pair["split"], []).append(pair["id"])
        found.setdefault(pair["other_split"], []).append(pair["other_id"])
    return found
