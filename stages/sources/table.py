"""Tables that name images: CSV files with a header."""

import csv
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.sources.candidates import Absent, Source, SourceError
from stages.sources.columns import Columns, Reading, Record, choose_columns, describe, make_candidates

DELIMITERS = ",;\t"
NO_IMAGE = "the row names no image"


@dataclass(frozen=True)
class Table:
    """A CSV file, read.

    Attributes:
        header: names of the columns.
        rows: a cell for each column.
        lines: of the file, on which each row ends.
    """

    path: Path
    header: list[str]
    rows: list[list[str]]
    lines: list[int]


def read_csv(path: Path, images_root: Path | None, reading: Reading) -> Source:
    """Images that a CSV file names, with their labels, splits, groups and attributes.

    Args:
        path: UTF-8, a header in its first line; comma, semicolon or tab between cells.
        images_root: folder that paths in the table are relative to; None: the table's own.

    Raises:
        SourceError: no such table, not a table, a column that is missing, a split that is none, or a path that leaves
            the folder.
    """
    table = load_csv(path)
    columns = choose_columns(reading, table.header, str(path))
    if columns.split is None and reading.splits == "given":
        raise SourceError(
            f"`splits: given`, but {path} has no split column; its columns are: {', '.join(table.header)}"
        )
    root = Path(os.path.abspath(images_root or path.parent))
    places = {role: table.header.index(name) for role, name in columns.named().items() if role != "image"}
    attributes = [table.header.index(name) for name in columns.attributes]
    images = _cells(table, columns, root)
    records = [
        Record(
            os.path.normpath(image) if image else f"line {line}",
            image or Absent(NO_IMAGE),
            **{role: row[place] for role, place in places.items()},
            attributes=tuple(row[place] for place in attributes),
        )
        for image, row, line in zip(images, table.rows, table.lines, strict=True)
    ]
    candidates, remarks = make_candidates(
        records, columns, reading, lambda number: f"{path}, line {table.lines[number]}"
    )
    return Source(root, candidates, Counter(), tuple(remarks), (describe(columns, table.header),), columns.attributes)


def list_csv(path: str, images_root: str | None, image_column: str | None) -> tuple[int, dict[str, str]]:
    """How many rows a CSV file has, and the path of each image that it names, by its name there."""
    table = load_csv(Path(path))
    columns = choose_columns(Reading(Columns(image=image_column), labels=False), table.header, path)
    root = os.path.abspath(images_root or os.path.dirname(path))
    return len(table.rows), image_paths(_cells(table, columns, root), root)


def load_csv(path: Path) -> Table:
    """Read a CSV file.

    Raises:
        SourceError: it is not there, is empty, is no UTF-8, or has rows of another length than its header.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            delimiter = max(DELIMITERS, key=first.count)  # the first of equals: a comma where there is none
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
            rows = [(row, reader.line_num) for row in reader if row]
    except FileNotFoundError as error:
        raise SourceError(f"there is no table {path}: give an existing one as `source: csv:PATH`") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8 (byte {error.start:,}): save it as UTF-8") from error
    except (OSError, csv.Error) as error:
        raise SourceError(f"{path} cannot be read as CSV: {error}") from error
    if len(rows) < 2:
        raise SourceError(f"{path} {'has a header and no rows' if rows else 'is empty'}")
    header = [name.strip() for name in rows[0][0]]
    doubled = [name for name, count in Counter(header).items() if count > 1]
    if doubled:
        raise SourceError(f"{path} has two columns of the name {doubled[0]!r} (a table begins with a line of names)")
    for row, line in rows[1:]:
        if len(row) != len(header):
            raise SourceError(f"{path}, line {line}: {len(row)} cells instead of the header's {len(header)}")
    return Table(path, header, [row for row, _ in rows[1:]], [line for _, line in rows[1:]])


def image_paths(images: Sequence[str | None], root: str | Path) -> dict[str, str]:
    """The path of each image that is named, by its name; empty cells are passed over.

    Args:
        root: absolute folder that they are relative to.
    """
    return {image: os.path.join(root, image) for image in images if image}


def require_inside(image: str | None, root: str | Path, column: str, place: str) -> None:
    """Refuse a path that a table from elsewhere must not lead to.

    Args:
        root: absolute folder that paths are relative to.
        column: that the path stands in.
        place: of the row, for the error.

    Raises:
        SourceError: it lies outside of the folder by its name, or is none.
    """
    if not image:
        return
    top = str(root)
    path = os.path.normpath(os.path.join(top, image))
    if "\0" in image or os.path.commonpath([top, path]) != top:
        raise SourceError(
            f"{place}: {column} {image!r} leads out of the folder {top}: set `images_root` to a folder that holds all "
            "images (/ for any on this machine)"
        )


def _cells(table: Table, columns: Columns, root: str | Path) -> list[str]:
    assert columns.image is not None
    place = table.header.index(columns.image)
    images = [row[place] for row in table.rows]
    for image, line in zip(images, table.lines, strict=True):
        require_inside(image, root, columns.image, f"{table.path}, line {line}")
    return images
