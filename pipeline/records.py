"""What the small files of a store say: records of what made an artifact, names for them, pointers to them.

They may come from elsewhere, so that each is held against what this version writes before anybody relies on it.
"""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from pipeline.errors import DamagedArtifact
from pipeline.manifest import canonical_json, parse_json, sha256_bytes

STAGE = re.compile(r"^[a-z][a-z0-9_]*$")
FULL_DIGEST = re.compile(r"^[0-9a-f]{64}$")


@dataclass(frozen=True)
class Record:
    """What made an artifact: one file of `runs/`, which carries its own hash."""

    stage: str
    stage_version: int
    key: str
    digest: str
    recipe: str
    step: str
    seed: int | None
    settings: dict[str, Any]
    hashed_settings: dict[str, Any]
    """Those that can change the result."""
    changed_settings: dict[str, Any]
    """Those of them that are not at their default."""
    inputs: dict[str, Any]
    """By setting: a digest, `foreign:...`, or for settings with several a list of [name, digest]."""
    input_runs: list[list[str]]
    """[stage, key, digest] of every artifact among the inputs."""
    size_bytes: int
    code: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    attempts: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    seconds: float = 0.0
    finished_at: float = 0.0
    """Seconds since 1970."""


@dataclass(frozen=True)
class Version:
    """A name for a run: `recipe/step@vN`."""

    recipe: str
    step: str
    number: int
    stage: str
    key: str
    digest: str
    created_at: float

    @property
    def label(self) -> str:
        return f"v{self.number}"

    @property
    def reference(self) -> str:
        return f"{self.recipe}/{self.step}@{self.label}"


def read_record(path: Path, stage: str, key: str, digest: str) -> Record:
    """The record that lies at the place of these three.

    Raises:
        DamagedArtifact: it is missing, was changed, or is that of another run; names file and field.
    """
    try:
        _check_place(stage, key, digest)
        data = parse_json(path.read_bytes())
        claimed = data.pop("sha256")
        if sha256_bytes(canonical_json(data)) != claimed:
            raise ValueError("sha256: its hash does not match")
        found = Record(**data)
        if (found.stage, found.key, found.digest) != (stage, key, digest):
            raise ValueError("stage, key, digest: it is the record of another run")
        _check_record(found)
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedArtifact(f"{path}: the record of a run cannot be read: {_in_words(error)}") from error


def read_version(path: Path) -> Version:
    """The version that a file of names/<recipe>/<step>/ tells of.

    Raises:
        FileNotFoundError: it is gone.
        DamagedArtifact: it is no version, or one of another place; names file and field.
    """
    try:
        found = Version(**parse_json(path.read_bytes()))
        _check_place(found.stage, found.key, found.digest)
        if [found.recipe, found.step] != [*path.parts[-3:-1]]:
            raise ValueError(f"recipe, step: it is of {found.recipe!r}, {found.step!r}")
        if type(found.number) is not int or not isinstance(found.created_at, int | float):
            raise ValueError("number, created_at: they are numbers")
        return found
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise DamagedArtifact(f"{path}: the version cannot be read: {_in_words(error)}") from error


def read_pointer(path: Path) -> str:
    """The digest that is current for a key.

    Raises:
        FileNotFoundError: there is none.
        DamagedArtifact: it cannot be read; names file and field.
    """
    try:
        return _known(parse_json(path.read_bytes())["digest"], FULL_DIGEST, "digest")
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedArtifact(f"{path}: cannot be read: {_in_words(error)}; delete it") from error


def read_format(path: Path) -> int:
    """The format that a store says it has. Raises DamagedArtifact: names file and field."""
    try:
        found = parse_json(path.read_bytes())["format"]
        if not isinstance(found, int):
            raise ValueError(f"format: {found!r} is no number")
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedArtifact(f"{path}: cannot be read: {_in_words(error)}") from error


def read_condemned(path: Path) -> set[tuple[str, str]]:
    """(stage, digest or key) of all that a gc is about to take away.

    Raises:
        FileNotFoundError: it is withdrawn.
        DamagedArtifact: it cannot be read; names file and field.
    """
    try:
        return {
            (_known(stage, STAGE, "stage"), _known(name, FULL_DIGEST, "digest"))
            for stage, name in parse_json(path.read_bytes())
        }
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise DamagedArtifact(f"{path}: cannot be read: {_in_words(error)}; delete it") from error


def claim_of(name: str) -> tuple[str, str] | None:
    """(stage, digest or key) that the name of a file in in_use/ tells of; None for a name that is none of ours."""
    stage, _, digest = name.partition(".")
    return (stage, digest) if STAGE.fullmatch(stage) and FULL_DIGEST.fullmatch(digest) else None


def _check_place(stage: Any, key: Any, digest: Any) -> None:
    """Raise ValueError where one of these, which name folders, could lead out of the store."""
    _known(stage, STAGE, "stage")
    _known(key, FULL_DIGEST, "key")
    _known(digest, FULL_DIGEST, "digest")


def _known(value: Any, pattern: re.Pattern[str], field_name: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"{field_name}: {value!r} cannot be one")
    return value


def _check_record(record: Record) -> None:
    """Raise ValueError where a value is not of the type that its field has."""
    for one in fields(Record):
        value = getattr(record, one.name)
        if not isinstance(value, _types_of(one.type)) or isinstance(value, bool):
            raise ValueError(f"{one.name}: {value!r} is of another type")
    for run in record.input_runs:
        if not isinstance(run, list) or len(run) != 3:
            raise ValueError("input_runs: each has stage, key and digest")
        _check_place(*run)
    if not all(isinstance(one, dict) for one in record.attempts):
        raise ValueError("attempts: each is an object")


def _types_of(annotation: Any) -> tuple[type, ...]:
    """What JSON has for the type of a field."""
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (get_origin(annotation) or annotation,)
    return (*kinds, int) if float in kinds else kinds


def _in_words(error: Exception) -> str:
    """What is wrong with a file, with the name of the field where one is missing."""
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)
