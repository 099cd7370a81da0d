"""Which columns of a table (or fields of a tar's samples) mean what, and what their values mean."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stages.sources.candidates import SPLIT_NAMES, Candidate, Readable, SourceError, unique_keys

STANDARD = {
    "image": ("path", "image", "img", "file", "filename", "file_name", "filepath"),
    "label": ("label", "class"),
    "labels": ("labels",),
    "split": ("split",),
    "group": ("group",),
}
"""Names, in lower case, that a column is known by where the settings name none."""

SEPARATOR = "|"
"""Between several labels in one cell."""


@dataclass(frozen=True)
class Columns:
    """Names of columns; None where there is none, or none was named. An attribute has its column's."""

    image: str | None = None
    label: str | None = None
    labels: str | None = None
    split: str | None = None
    group: str | None = None
    attributes: tuple[str, ...] = ()

    def named(self) -> dict[str, str]:
        """By role, those that are not None; without attributes."""
        return {role: getattr(self, role) for role in STANDARD if getattr(self, role) is not None}


@dataclass(frozen=True)
class Reading:
    """How the values of a source are taken.

    Attributes:
        columns: as the settings name them.
        labels: whether labels are wanted.
        splits: `given` by the source, `drawn` whatever it says, None: given where it says them.
        split_values: the split that each value of the split column stands for; None: the words of SPLIT_NAMES.
    """

    columns: Columns = Columns()
    labels: bool = True
    splits: Literal["given", "drawn"] | None = None
    split_values: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """A row of a table, or a sample of a tar: by role, its values as they stand there."""

    key: str
    image: str | bytes | Readable
    label: Any = None
    labels: Any = None
    split: Any = None
    group: Any = None
    attributes: tuple[Any, ...] = ()


def choose_columns(reading: Reading, present: Sequence[str], where: str, *, preferred: Sequence[str] = ()) -> Columns:
    """The columns to read: those that are named, else those that are known by a standard name.

    Args:
        present: names of all columns.
        where: of what, for errors.
        preferred: columns that are images whatever the order of the standard names: they hold bytes.

    Raises:
        SourceError: a named column is not there, none is known for images, or there are `label` and `labels`.
    """
    wanted, attributes = reading.columns.named(), reading.columns.attributes
    listed = ", ".join(present) or "none"
    for role, name in (*wanted.items(), *(("attributes", name) for name in attributes)):
        if name not in present:
            raise SourceError(f"{where} has no column {name!r} (columns.{role}); its columns are: {listed}")
    chosen: dict[str, str | None] = {role: wanted.get(role, _standard(role, present)) for role in STANDARD}
    if "image" not in wanted:
        known = [name for name in present if name.lower() in STANDARD["image"]]
        chosen["image"] = next((name for name in known if name in preferred), chosen["image"])
    if chosen["image"] is None:
        raise SourceError(
            f"{where} has no column that is known to hold images ({', '.join(STANDARD['image'])}): name it in "
            f"columns.image; its columns are: {listed}"
        )
    if "label" in wanted or not reading.labels:
        chosen["labels"] = None
    if "labels" in wanted or not reading.labels:
        chosen["label"] = None
    if chosen["label"] is not None and chosen["labels"] is not None:
        raise SourceError(
            f"{where} has a column {chosen['label']!r} and a column {chosen['labels']!r}: name the one to take in "
            "columns.label (one class) or columns.labels (several)"
        )
    chosen["split"] = _split_column(reading, chosen["split"], where, listed)
    return Columns(**chosen, attributes=attributes)


def make_candidates(
    records: Iterable[Record], columns: Columns, reading: Reading, place: Callable[[int], str]
) -> tuple[list[Candidate], list[str]]:
    """Candidates from records, sorted by key, and remarks.

    Args:
        columns: as chosen: roles without a column give nothing.
        place: where the n-th record stands (`line 7 of labels.csv`), for errors.

    Raises:
        SourceError: a split that is none.
    """
    records = list(records)
    keys = unique_keys(one.key for one in records)
    remarks = []
    repeated = [one.key for one, key in zip(records, keys, strict=True) if one.key != key]
    if repeated:
        remarks.append(
            f"{len(repeated):,} rows name an image that another row named before, the first: {repeated[0]}; each is a "
            "sample of its own (its key ends with #2, #3, ...)"
        )
    several = [one.label for one in records if columns.label is not None and SEPARATOR in (text(one.label) or "")]
    if several:
        remarks.append(
            f"{len(several):,} values of label hold {SEPARATOR!r}, the first: {text(several[0])}; each is one class: "
            "several of an image are read by columns.labels"
        )
    candidates = [
        Candidate(
            key,
            one.image,
            _split(one.split, reading.split_values, place(number)) if columns.split is not None else one.split,
            label_names(one.labels, several=True) if columns.labels is not None else label_names(one.label),
            text(one.group) if columns.group is not None else None,
            tuple(attribute_text(value) for value in one.attributes),
        )
        for number, (one, key) in enumerate(zip(records, keys, strict=True))
    ]
    return sorted(candidates, key=lambda one: one.key), remarks


def describe(columns: Columns, present: Iterable[str], what: str = "columns") -> str:
    """In words: `columns: image path, label class; not used: id`."""
    named = columns.named()
    attributes = [f"attribute {name}" for name in columns.attributes]
    used = ", ".join([*(f"{role} {name}" for role, name in named.items()), *attributes])
    idle = [name for name in present if name not in (*named.values(), *columns.attributes)]
    rest = f"not used: {', '.join(idle)}" + ("" if {"label", "labels"} & named.keys() else " (columns.label names one)")
    return f"{what}: " + "; ".join([*([used] if used else []), *([rest] if idle else [])])


def label_names(value: Any, *, several: bool = False) -> tuple[str, ...]:
    """The names in a cell: one, or with `several` a list or text with `|` between them; none in an empty one."""
    if isinstance(value, list | tuple):
        parts = [text(one) for one in value]
    else:
        whole = text(value)
        parts = [text(one) for one in whole.split(SEPARATOR)] if several and whole else [whole]
    return tuple(dict.fromkeys(name for name in parts if name))


def text(value: Any) -> str | None:
    """A value as the name of a class, split or group; None where there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():  # whole numbers with gaps, as pandas keeps them
        value = int(value)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    return str(value).strip() or None


def attribute_text(value: Any) -> str | None:
    """A value as that of an attribute: text, of a list `a|b`, as a cell with several labels has it."""
    return SEPARATOR.join(label_names(value)) or None if isinstance(value, list | tuple) else text(value)


def _standard(role: str, present: Sequence[str]) -> str | None:
    """The column that a standard name of the role stands for, in the order of these names."""
    by_lower = {name.lower(): name for name in reversed(present)}
    return next((by_lower[name] for name in STANDARD[role] if name in by_lower), None)


def _split_column(reading: Reading, chosen: str | None, where: str, listed: str) -> str | None:
    if reading.splits == "drawn":
        return None
    if chosen is None and reading.split_values is not None:
        raise SourceError(f"split_values: {where} has no split column; name one in columns.split, of: {listed}")
    return chosen


def _split(value: Any, split_values: Mapping[str, str] | None, place: str) -> str:
    name = text(value) or ""
    known = SPLIT_NAMES if split_values is None else split_values
    split = known.get(name.lower() if split_values is None else name)
    if split is None:
        if split_values is None:
            advice = f"it is one of {', '.join(known)}, or say in split_values what {name!r} stands for"
        else:
            advice = f"say in split_values what it stands for, beside {', '.join(known)}"
        raise SourceError(f"{place}: {name!r} is no split: {advice}")
    return split
