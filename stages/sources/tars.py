"""WebDataset tars from elsewhere: samples are read where they lie, nothing is unpacked."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stages.sources.candidates import Absent, Readable, Source, SourceError
from stages.sources.columns import STANDARD, Columns, Reading, Record, describe, make_candidates
from stages.sources.files import find_files, splits_of_files
from stages.sources.tar_members import TarMember, list_members

KIND = "wds"
NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
"""A member's name: the key of its sample, up to the first dot of the last part, and the field (webdataset's
`base_plus_ext`)."""

LABEL_FIELDS = ("cls", *STANDARD["label"])
JSON_FIELD = "json"
OTHER_MEMBERS = "members of tars that belong to no sample"
SAMPLES_SCANNED = 1000
"""Of the first tar, to estimate how many there are."""
KEYS_NAMED = 20
"""Of those in a JSON field that are not used."""


@dataclass(frozen=True, slots=True)
class _Sample:
    """Members that share a key, by field in lower case."""

    key: str
    members: dict[str, TarMember]


def read_tars(location: Path, suffixes: frozenset[str], reading: Reading) -> Source:
    """Samples of WebDataset tars.

    Args:
        location: a tar, a folder of tars, or a pattern. Without a split field, tars whose names begin with train, val
            or test (or that lie in such a folder) are of that split.
        suffixes: of images. Without a field named for it, the image of a sample is its first with such an ending.
        reading: its columns are fields: `jpg`, `cls`, `left.png`, and `json.patient` for a key inside `json` (or
            `meta.json.patient` inside `meta.json`).

    Raises:
        SourceError: no such tar, one that is cut off or damaged, a field that no sample has, or a split that is none.
    """
    folder, names = find_files(location, ".tar", KIND)
    left_out: Counter[str] = Counter()
    samples = [list(_scan(folder / name, left_out)) for name in names]
    columns = _choose([one for part in samples for one in part], suffixes, reading, location)
    splits = [None] * len(names) if columns.split is not None else splits_of_files(names, reading.splits, KIND)
    records: list[Record] = []
    places: list[str] = []
    image_fields: dict[str, None] = {}  # in their order
    fields = {role: field for role, field in columns.named().items() if role != "image"}
    for name, part, split in zip(names, samples, splits, strict=True):
        stem = name.removesuffix(".tar")
        for sample in part:
            field = _image_field(sample, columns.image, suffixes)
            image_fields |= {field: None} if field else {}
            image: Readable = (
                sample.members[field] if field else Absent(f"the sample has no {columns.image or 'image'}")
            )
            key = f"{stem}/{sample.key}" + (f".{field}" if field else "")
            place = f"{name}, sample {sample.key}"
            found = _values(sample, [*fields.values(), *columns.attributes], place)
            values = {role: found[field] for role, field in fields.items() if field in found}
            attributes = tuple(found.get(field) for field in columns.attributes)
            records.append(Record(key, image, **{"split": split} | values, attributes=attributes))
            places.append(place)
    _check_values(records, columns, reading, location)
    candidates, remarks = make_candidates(records, columns, reading, lambda number: places[number])
    note = _describe_fields(columns, list(image_fields), [one for part in samples for one in part])
    return Source(None, candidates, left_out, tuple(remarks), (note,), columns.attributes)


def count_tars(location: str, suffixes: Sequence[str], image_field: str | None) -> tuple[int, dict[str, str]]:
    """Roughly how many samples tars have, by the beginning of the first; they name no other files."""
    folder, names = find_files(Path(location), ".tar", KIND)
    counted, size_bytes = 0, 1
    for sample in _scan(folder / names[0], Counter()):
        counted += _image_field(sample, image_field, frozenset(suffixes)) is not None
        size_bytes = max(one.offset + one.size_bytes for one in sample.members.values())
        if counted == SAMPLES_SCANNED:
            break
    return round(counted * sum((folder / name).stat().st_size for name in names) / size_bytes), {}


def _scan(path: Path, left_out: Counter[str]) -> Iterator[_Sample]:
    """The samples of a tar: members one after another that share a key, as webdataset groups them.

    Raises:
        SourceError: see `list_members`; or a key comes again, so that it is not known what belongs to which.
    """
    sample: _Sample | None = None
    seen: set[str] = set()
    for name, member in list_members(path):
        match = NAME.fullmatch(name)
        if match is None:
            left_out[OTHER_MEMBERS] += 1
            continue
        key, field = match[1].removeprefix("./"), match[2].lower()
        if sample is None or sample.key != key or field in sample.members:
            if key in seen:
                raise SourceError(
                    f"{path}: member {name!r} comes after the end of its sample: the key {key!r} stands twice in this "
                    "tar; make it again, with keys of their own and the members of each together"
                )
            if sample is not None:
                yield sample
            sample = _Sample(key, {})
            seen.add(key)
        sample.members[field] = member
    if sample is not None:
        yield sample


def _choose(samples: Sequence[_Sample], suffixes: frozenset[str], reading: Reading, location: Path) -> Columns:
    """The fields to read; image stays None where it is the first known ending."""
    if not samples:
        raise SourceError(f"{KIND}:{location}: no sample in these tars")
    present = Counter(field for one in samples for field in one.members)
    listed = ", ".join(field for field, _ in present.most_common())
    wanted, attributes = reading.columns.named(), reading.columns.attributes
    for role, name in (*wanted.items(), *(("attributes", name) for name in attributes)):
        if _located(name, present, look_inside=role != "image") is None:
            raise SourceError(
                f"{KIND}:{location}: no sample has a field {name!r} (columns.{role}); there are: {listed}"
            )
    if images := [name for name in attributes if _is_image(name.lower(), suffixes)]:
        raise SourceError(f"{KIND}:{location}: field {images[0]!r} is an image, and no attribute (columns.attributes)")
    if "image" not in wanted and not any(_image_field(one, None, suffixes) for one in samples):
        raise SourceError(
            f"{KIND}:{location}: no field is known to be an image; name it in columns.image, of: {listed}"
        )
    chosen: dict[str, str | None] = {"image": wanted.get("image")}
    for role, standard in (("split", STANDARD["split"]), ("group", STANDARD["group"])):
        chosen[role] = wanted.get(role, next((name for name in standard if name in present), None))
    if reading.labels:
        chosen["label"] = wanted.get("label")
        chosen["labels"] = wanted.get("labels")
        if "label" not in wanted and "labels" not in wanted:
            chosen["label"] = next((name for name in LABEL_FIELDS if name in present), None)
            if chosen["label"] is None:
                chosen["labels"] = next((name for name in STANDARD["labels"] if name in present), None)
    if reading.splits == "drawn":
        chosen["split"] = None
    elif reading.split_values is not None and chosen["split"] is None:
        raise SourceError(
            f"split_values: {KIND}:{location} has no split field; name one in columns.split, of: {listed}"
        )
    return Columns(**chosen, attributes=attributes)


def _is_image(field: str, suffixes: frozenset[str]) -> bool:
    return f".{field.rpartition('.')[2]}" in suffixes


def _image_field(sample: _Sample, wanted: str | None, suffixes: frozenset[str]) -> str | None:
    if wanted is not None:
        return wanted.lower() if wanted.lower() in sample.members else None
    return next((field for field in sample.members if _is_image(field, suffixes)), None)


def _values(sample: _Sample, names: Iterable[str], place: str) -> dict[str, Any]:
    """By name, what the sample's fields say; names of fields that it does not have are passed over."""
    values: dict[str, Any] = {}
    parsed: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        located = _located(name, sample.members)
        if located is None:
            continue
        field, within = located
        if within is None:
            values[name] = sample.members[field].read()
            continue
        if field not in parsed:
            parsed[field] = _parse(sample.members[field], place)
        values[name] = _within(parsed[field], within)
    return values


def _located(name: str, fields: Iterable[str], *, look_inside: bool = True) -> tuple[str, str | None] | None:
    """The field that a name means, and the place inside it where the field is JSON; None where there is none."""
    fields = set(fields)
    if name.lower() in fields:
        return name.lower(), None
    inside = [one for one in fields if one.split(".")[-1] == JSON_FIELD and name.lower().startswith(f"{one}.")]
    if not inside or not look_inside:
        return None
    field = max(inside, key=len)
    return field, name[len(field) + 1 :]


def _check_values(records: Sequence[Record], columns: Columns, reading: Reading, location: Path) -> None:
    """Raise where a name in the settings leads to nothing in any sample: a misspelt group would split patients."""
    chosen = columns.named()
    for role, name in reading.columns.named().items():
        if role in chosen and role != "image" and all(getattr(one, role) is None for one in records):
            raise SourceError(f"{KIND}:{location}: no sample has a value at {name!r} (columns.{role})")
    for number, name in enumerate(columns.attributes):
        if all(one.attributes[number] is None for one in records):
            raise SourceError(f"{KIND}:{location}: no sample has a value at {name!r} (columns.attributes)")


def _describe_fields(columns: Columns, image_fields: Sequence[str], samples: Sequence[_Sample]) -> str:
    """In words, as of the columns of a table: fields that are used, and those that are not."""
    first_with: dict[str, TarMember] = {}
    for sample in samples:
        for field, member in sample.members.items():
            first_with.setdefault(field, member)
    named = [*(name for role, name in columns.named().items() if role != "image"), *columns.attributes]
    used = [located for name in named if (located := _located(name, first_with)) is not None]
    idle = []
    for field, member in first_with.items():
        if field in image_fields or (field, None) in used:
            continue
        taken = [within for one, within in used if one == field and within is not None]
        keys = _keys_within(member) if field.split(".")[-1] == JSON_FIELD else []
        rest = [key for key in keys if not any(f"{key}.".startswith(f"{one}.") for one in taken)]
        idle += [f"{field}.{key}" for key in rest[:KEYS_NAMED]]
        idle += [f"{len(rest) - KEYS_NAMED:,} more in {field}"] if len(rest) > KEYS_NAMED else []
        idle += [field] if not keys and not taken else []
    return describe(replace(columns, image=" or ".join(image_fields) or columns.image), idle, "fields")


def _keys_within(member: TarMember) -> list[str]:
    """The places in a JSON object, as columns name them (`a.b`); none where it is no object or cannot be read.

    Of one sample only: to read all for a remark takes too long.
    """
    try:
        pending = [("", json.loads(member.read()))]
    except (OSError, ValueError, RecursionError):
        return []
    found = []
    while pending:
        name, value = pending.pop(0)
        if isinstance(value, dict) and value:
            pending += [(f"{name}.{key}" if name else key, inner) for key, inner in value.items()]
        elif name:
            found.append(name)
    return found


def _parse(member: TarMember, place: str) -> Any:
    try:
        return json.loads(member.read())
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{place}: its json cannot be read: {error}") from error


def _within(value: Any, path: str) -> Any:
    """What stands at `a.b` in {"a": {"b": 1}}; None where nothing does."""
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value
