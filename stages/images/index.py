"""The index of an artifact of shards: where every sample lies, and what it must be."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.failpoints import reach

INDEX_FILE = "index.parquet"
SUMMARY_FILE = "shards.json"
REJECTED_FILE = "rejected.jsonl"
MANIFEST_FILE, FILES_FOLDER = "manifest.json", "files"
"""Of an artifact in a store: the digests of its files, and beside it the folder that these are in."""
FORMAT = 1
NO_LABEL = -1
MOST, MOST_CHANNELS = 2**40, 4096
FORMATS = ("jpg", "png", "npy")
SHARD_NAME = re.compile(r"[\w-][\w.-]*")
"""A file beside the index."""
ATTRIBUTE = "attribute."
"""Before the name of an attribute: its column, of text, in the index and beside features."""

SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("split", pa.string()),
        ("shard", pa.string()),
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("format", pa.string()),
        ("label", pa.int32()),
        ("labels", pa.list_(pa.int32())),
        ("group", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("xxh3", pa.uint64()),
    ]
)


class DamagedShard(Exception):
    """Shards or their index are not as they were written."""

    exit_code = 4

    def __init__(self, what: str):
        super().__init__(f"{what}; `simclr run RECIPE STEP --force` makes the shards again")


class NewerShards(ValueError):
    """A newer version wrote them."""

    exit_code = 4


class NoSuchAttribute(ValueError):
    """Images have no attribute of that name."""

    exit_code = 2

    def __init__(self, where: Path, name: str, present: Iterable[str]):
        listed = ", ".join(present) or "none"
        super().__init__(
            f"{where} has no attribute {name!r}; it has {listed}: name it in columns.attributes of the stage shard"
        )


class Row(NamedTuple):
    """A sample in the index.

    Attributes:
        split, shard, key: split, file name of the tar, path of the image relative to the source; of a tile,
            `path#top,left`.
        offset, size: place of the image's bytes in the tar.
        format: `jpg`, `png`, or `npy` where images have neither 1 nor 3 channels.
        label: position in the list of classes; NO_LABEL without one, and where there are several.
        labels: all positions in the list of classes, increasing.
        group: what the sample shares with others of its patient, video or parent image; None where none is declared.
        height, width: in pixels.
        xxh3: 64-bit hash of the image's bytes.
        attributes: what else is known of the image, text or None, a value for each name that `rows_table` is given.
    """

    split: str
    shard: str
    key: str
    offset: int
    size: int
    format: str
    label: int
    labels: Sequence[int]
    group: str | None
    height: int
    width: int
    xxh3: int
    attributes: Sequence[str | None] = ()


def rows_table(rows: Sequence[Row], attributes: Sequence[str] = ()) -> pa.Table:
    """The rows as a table, still without ids, with a column for each of these attributes."""
    *columns, values = zip(*rows, strict=True) if rows else [()] * len(Row._fields)
    columns += zip(*values, strict=True) if rows else [()] * len(attributes)
    names = [*Row._fields[:-1], *(f"{ATTRIBUTE}{name}" for name in attributes)]
    schema = pa.schema([_field(name) for name in names])
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema=schema
    )


def describe_groups_and_labels(index: pa.Table) -> dict[str, Any]:
    """For shards.json, of all splits: how many groups are declared (None: none), and if a sample has several labels."""
    groups = len(index["group"].drop_null().unique())
    labels = [chunk.value_lengths().to_numpy() for chunk in index["labels"].chunks]
    return {"groups": groups or None, "several_labels": any((lengths > 1).any() for lengths in labels)}


def describe_attributes(index: pa.Table) -> dict[str, Any]:
    """For shards.json, of all splits: how many values each attribute has, and how many samples none; empty without."""
    columns = {name.removeprefix(ATTRIBUTE): index[name] for name in index.column_names if name.startswith(ATTRIBUTE)}
    found = {
        name: {"distinct": len(column.drop_null().unique()), "missing": column.null_count}
        for name, column in columns.items()
    }
    return {"attributes": found} if found else {}


def write_index(folder: Path, tables: Iterable[pa.Table]) -> pa.Table:
    """Number all rows in the order given, and write them; returns the index."""
    reach("shard.packed")
    rows = pa.concat_tables(tables)
    schema = pa.schema([SCHEMA.field("id"), *(_field(name) for name in rows.column_names)])
    index = rows.add_column(0, schema.field("id"), pa.array(np.arange(rows.num_rows))).cast(schema)
    pq.write_table(index, folder / INDEX_FILE, compression="zstd")
    reach("shard.indexed")
    return index


def read_index(folder: Path, split: str | Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a split, or of several, in the order of the index.

    Args:
        columns: those that are wanted, all but attributes by default. Names of shards and formats then come as
            dictionaries.

    Raises:
        DamagedShard: it cannot be read, or is not the one that was published.
    """
    fields = SCHEMA if columns is None else [_as_dictionary(_field(name)) for name in columns]
    repeated = [field.name for field in fields if pa.types.is_dictionary(field.type)]
    require_published(folder / INDEX_FILE)
    try:
        return pq.read_table(
            folder / INDEX_FILE,
            columns=columns,
            filters=[("split", "=", split) if isinstance(split, str) else ("split", "in", [*split])],
            schema=pa.schema([*fields, *([] if columns is None or "split" in columns else [SCHEMA.field("split")])]),
            read_dictionary=repeated,
        )
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise DamagedShard(f"cannot read {folder / INDEX_FILE}: {' '.join(str(error).split())}") from error


def _field(name: str) -> pa.Field:
    """Of the index, by name of the column."""
    return pa.field(name, pa.string()) if name.startswith(ATTRIBUTE) else SCHEMA.field(name)


def _as_dictionary(field: pa.Field) -> pa.Field:
    """Of names that many rows share, a number each and the names once."""
    return field.with_type(pa.dictionary(pa.int32(), pa.string())) if field.name in ("shard", "format") else field


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write shards.json."""
    text = json.dumps({"format": FORMAT} | summary, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / SUMMARY_FILE).write_text(text + "\n", encoding="utf-8")


def read_summary(folder: Path) -> dict[str, Any]:
    """Read shards.json.

    Raises:
        DamagedShard: it is missing, no JSON, not the one that was published, or says what the stage does not write.
        NewerShards: a newer version wrote it.
    """
    require_published(folder / SUMMARY_FILE)
    try:
        summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
        if summary["format"] > FORMAT:
            raise NewerShards(
                f"{folder / SUMMARY_FILE} has format {summary['format']}; this version reads up to {FORMAT}"
            )
        _check_summary(summary)
    except NewerShards:
        raise
    except KeyError as error:
        raise DamagedShard(f"cannot read {folder / SUMMARY_FILE}: {error} is missing") from error
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedShard(f"cannot read {folder / SUMMARY_FILE}: {error}") from error
    return summary


def require_published(path: Path) -> None:
    """Hold a file of an artifact against the manifest of a store: what it says of samples has no other check.

    Nothing happens where there is no manifest: while shards are made, and where they were copied to by hand.

    Raises:
        DamagedShard: the file or the manifest cannot be read, or they do not fit together.
    """
    folder = path.parent.resolve()
    manifest = folder.parent / MANIFEST_FILE
    if folder.name != FILES_FOLDER or not manifest.exists():
        return
    try:
        published = json.loads(manifest.read_bytes())["files"][path.name]["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedShard(f"{manifest} does not tell what {path.name} was ({error!r})") from error
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DamagedShard(f"cannot read {path}: {error}") from error
    if found != published:
        raise DamagedShard(f"{path} is damaged: its content is not that of {manifest}")


def _check_summary(summary: dict[str, Any]) -> None:
    """Raise ValueError, KeyError or TypeError where what readers rely on is of another kind."""
    if not all(isinstance(name, str) for name in summary["classes"]):
        raise ValueError("classes: each is a text")
    for split, part in summary["splits"].items():
        for name in ("samples", "max_height", "max_width"):
            if type(part[name]) is not int or not 0 < part[name] < MOST:
                raise ValueError(f"splits.{split}.{name}: {part[name]!r} is no count")
    if type(summary.get("channels", 3)) is not int or not 0 < summary.get("channels", 3) <= MOST_CHANNELS:
        raise ValueError(f"channels: {summary['channels']!r} is no count")
    if not isinstance(summary.get("attributes", {}), dict):
        raise ValueError("attributes: is no object")
