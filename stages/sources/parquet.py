"""Tables of images in Parquet: paths, or bytes as Hugging Face datasets keep them (a struct of bytes and path)."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.sources.candidates import Absent, Readable, Source, SourceError
from stages.sources.columns import Columns, Reading, Record, choose_columns, describe, make_candidates
from stages.sources.files import find_files, splits_of_files
from stages.sources.table import NO_IMAGE, image_paths, require_inside

KIND = "parquet"
LARGE_GROUP_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class ParquetCell:
    """The bytes of an image in a Parquet file.

    Attributes:
        column: its name; of a struct, with `.bytes` behind it.
        row: within the row group.
    """

    path: str
    row_group: int
    column: str
    row: int
    size_bytes: int

    def read(self) -> bytes:
        content = _column(self.path, self.row_group, self.column)[self.row].as_py()
        if content is None:
            raise OSError("the row has no bytes")
        return content


def read_parquet(location: Path, images_root: Path | None, reading: Reading) -> Source:
    """Images in the rows of Parquet files, in their order, or that these name.

    Args:
        location: a file, a folder of files, or a pattern. Without a split column, files whose names begin with train,
            val or test (or that lie in such a folder) are of that split.
        images_root: folder that paths in the table are relative to; None: the one that holds the files.

    Raises:
        SourceError: no such file, no Parquet, a column that is missing or of no use, a split that is none, or a path
            that leaves the folder.
    """
    folder, names = find_files(location, ".parquet", KIND)
    files = [_open(folder, name) for name in names]
    columns = _choose(files, location, reading)
    splits = [None] * len(files) if columns.split is not None else splits_of_files(names, reading.splits, KIND)
    root = Path(os.path.abspath(images_root or folder))
    digits = max(6, len(str(sum(file.metadata.num_rows for file in files))))
    records: list[Record] = []
    places: list[tuple[str, int]] = []
    for file, split in zip(files, splits, strict=True):
        for number, (image, values) in enumerate(_rows(file, columns)):
            row = f"{len(records):0{digits}d}"
            if isinstance(image, _Embedded):
                key = f"{row}/{image.name}" if image.name else row
                content: str | Readable = image.cell
            else:
                require_inside(image, root, str(columns.image), f"{file.path}, row {number:,}")
                key, content = (os.path.normpath(image), image) if image else (f"row {row}", Absent(NO_IMAGE))
            given: dict[str, Any] = {"split": split} | values
            records.append(Record(key, content, **given))
            places.append((file.name, number))
    candidates, remarks = make_candidates(
        records, columns, reading, lambda number: f"{places[number][0]}, row {places[number][1]:,}"
    )
    note = describe(columns, files[0].schema.names)
    return Source(root, candidates, Counter(), (*remarks, *_large_groups(files)), (note,), columns.attributes)


def list_parquet(location: str, images_root: str | None, image_column: str | None) -> tuple[int, dict[str, str]]:
    """How many rows Parquet files have, and the path of each image that they name, by its name there."""
    folder, names = find_files(Path(location), ".parquet", KIND)
    files = [_open(folder, name) for name in names]
    columns = _choose(files, Path(location), Reading(Columns(image=image_column), labels=False, splits="drawn"))
    paths: dict[str, str] = {}
    root = os.path.abspath(images_root or folder)
    for file in files:
        images = [one if isinstance(one, str) else None for one in _images(file, str(columns.image))]
        for number, image in enumerate(images):
            require_inside(image, root, str(columns.image), f"{file.path}, row {number:,}")
        paths |= image_paths(images, root)
    return sum(file.metadata.num_rows for file in files), paths


@dataclass(frozen=True)
class _File:
    """What is known of a Parquet file, which is not kept open: there may be thousands."""

    path: Path
    name: str
    metadata: pq.FileMetaData
    schema: pa.Schema


@dataclass(frozen=True, slots=True)
class _Embedded:
    """An image whose bytes are in the file, with the name it once had, if it is known."""

    cell: ParquetCell
    name: str | None


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())}") from error


def _open(folder: Path, name: str) -> _File:
    with _opened(folder / name) as file:
        return _File(folder / name, name, file.metadata, file.schema_arrow)


def _choose(files: Sequence[_File], location: Path, reading: Reading) -> Columns:
    first = files[0]
    for file in files:
        if file.schema.names != first.schema.names:
            raise SourceError(f"{location}: {file.name} has other columns than {first.name}: take them one at a time")
    if not sum(file.metadata.num_rows for file in files):
        raise SourceError(f"{location} has no rows")
    with_bytes = [field.name for field in first.schema if _bytes_column(field) is not None]
    if images := [name for name in reading.columns.attributes if name in with_bytes]:
        raise SourceError(f"{location}: column {images[0]!r} holds bytes, and is no attribute (columns.attributes)")
    return choose_columns(reading, first.schema.names, str(location), preferred=with_bytes)


def _bytes_column(field: pa.Field) -> str | None:
    """The name of the column that holds bytes of images, if the field is or has such a one."""
    if pa.types.is_struct(field.type):
        return f"{field.name}.bytes" if field.type.get_field_index("bytes") >= 0 else None
    return field.name if pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type) else None


def _rows(file: _File, columns: Columns) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The image of each row (see `_images`), and its other values by field of Record."""
    others = {role: name for role, name in columns.named().items() if role != "image"}
    names = list(dict.fromkeys([*others.values(), *columns.attributes]))
    cells = _cells(file, names) if names else {}
    assert columns.image is not None
    for number, image in enumerate(_images(file, columns.image)):
        values: dict[str, Any] = {role: cells[name][number] for role, name in others.items()}
        yield image, values | {"attributes": tuple(cells[name][number] for name in columns.attributes)}


def _cells(file: _File, names: Sequence[str]) -> dict[str, list[Any]]:
    """The cells of these columns."""
    with _opened(file.path) as opened:
        table = opened.read(columns=[*names], use_threads=False)
    labels = _class_labels(file.schema)
    found: dict[str, list[Any]] = {}
    for name in names:
        cells = table[name].to_pylist()
        place = f"{file.path}: {name}"
        found[name] = [_named(cell, labels[name], place) for cell in cells] if name in labels else cells
    return found


def _images(file: _File, column: str) -> list[str | _Embedded | None]:
    """The image of each row: its path, a promise of its bytes, or None where there is neither."""
    field = file.schema.field(column)
    bytes_column = _bytes_column(field)
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    is_struct = pa.types.is_struct(kind) and kind.get_field_index("path") >= 0
    if not (bytes_column or is_struct or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise SourceError(
            f"{file.path}: column {column!r} is of the type {kind}: an image is a path, bytes, or a struct of both"
        )
    path = os.path.abspath(file.path)
    images: list[str | _Embedded | None] = []
    with _opened(file.path) as opened:
        for group in range(file.metadata.num_row_groups):
            names: list[str | None] = [None] * file.metadata.row_group(group).num_rows
            if is_struct:
                cells = opened.read_row_group(group, columns=[f"{column}.path"], use_threads=False)[column]
                names = [one and one["path"] for one in cells.to_pylist()]
            elif bytes_column is None:
                names = opened.read_row_group(group, columns=[column], use_threads=False)[column].to_pylist()
            if bytes_column is None:
                images += names
                continue
            has_bytes, size = _has_bytes(file, group, bytes_column)
            for row, name in enumerate(names):
                leads_out = name and (os.path.isabs(name) or ".." in name.split("/"))
                last = os.path.basename(name) if name and leads_out else name
                cell = ParquetCell(path, group, bytes_column, row, size)
                images.append(_Embedded(cell, last) if has_bytes[row] else name)
    return images


def _has_bytes(file: _File, group: int, column: str) -> tuple[list[bool], int]:
    """Which rows of a group have bytes, and how many these are on average: by the file's statistics, if they say it."""
    about = file.metadata.row_group(group)
    chunk = next(one for one in map(about.column, range(about.num_columns)) if one.path_in_schema == column)
    size = chunk.total_uncompressed_size // max(about.num_rows, 1)
    empty = chunk.statistics.null_count if chunk.statistics and chunk.statistics.has_null_count else None
    if empty in (0, about.num_rows):
        return [empty == 0] * about.num_rows, size
    return _column(os.path.abspath(file.path), group, column).is_valid().to_pylist(), size


@lru_cache(maxsize=1)
def _column(path: str, row_group: int, column: str) -> pa.ChunkedArray:
    """A column of a row group. The last one is kept: rows are read in order, and memory holds one group."""
    try:
        with pq.ParquetFile(path) as file:
            name, _, inner = column.rpartition(".") if column not in file.schema_arrow.names else (column, "", "")
            cells = file.read_row_group(row_group, columns=[column], use_threads=False)[name]
            return pa.chunked_array([part.field(inner) for part in cells.chunks]) if inner else cells
    except pa.ArrowException as error:
        raise OSError(f"Parquet: {' '.join(str(error).split())}") from error


def _class_labels(schema: pa.Schema) -> dict[str, list[str]]:
    """By column: the names behind its whole numbers, where a Hugging Face dataset says them."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    found = {}
    for column, feature in features.items():
        while isinstance(feature, list | dict) and (isinstance(feature, list) or "feature" in feature):  # of a sequence
            feature = (feature or [None])[0] if isinstance(feature, list) else feature["feature"]
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names"):
            found[column] = feature["names"]
    return found


def _named(value: Any, names: Sequence[str], place: str) -> Any:
    """A class for its number; a negative one stands for none, as Hugging Face datasets have it."""
    if isinstance(value, list):
        return [_named(one, names, place) for one in value]
    if not isinstance(value, int):
        return value
    if value >= len(names):
        raise SourceError(f"{place} has a class {value}, and names for {len(names)}")
    return names[value] if value >= 0 else None


def _large_groups(files: Sequence[_File]) -> list[str]:
    """A remark where a row group is so large that memory may not hold it once for each worker."""
    sizes = [
        (file.metadata.row_group(group).total_byte_size, file.name)
        for file in files
        for group in range(file.metadata.num_row_groups)
    ]
    largest, name = max(sizes)
    if largest < LARGE_GROUP_BYTES:
        return []
    return [
        f"{name} has row groups of {largest / 2**30:.1f} GiB, and each worker holds one: write it with smaller ones, "
        "or set workers to 1 where memory is short"
    ]
