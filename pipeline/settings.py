"""Typed, frozen settings: what a step of a recipe may say, what of it changes the result, and what it reads.

Torch-free, so that `simclr status` and `simclr --help` stay quick.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

# Plugins of pydantic are not for us; to look for some, it would read the metadata of every installed package.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

LIBRARIES_BYTES = 700 * 2**20
"""Memory of a process that has torch and its neighbours loaded."""


class Settings(BaseModel):
    """A frozen group of settings; unknown keys are refused. Groups may be nested."""

    # Built when a recipe first has such a group, and a group within another once with it: commands stay quick.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)


@dataclass(frozen=True)
class Call:
    """A function of ours by name: what it imports is brought in only when it is called."""

    module: str
    function: str
    arguments: tuple[Any, ...] = ()
    """Plain data."""


@dataclass(frozen=True)
class ForeignInput:
    """Files from outside the store that a step reads (a folder of images): they count by content, not by path."""

    kind: str
    """Says how the files are read (`folder`, `sklearn:digits`); part of the fingerprint."""
    roots: tuple[Path, ...] = ()
    """Folders whose files are fingerprinted, single files, or patterns (`data/*.tar`); none for data that a library
    ships."""
    suffixes: frozenset[str] = frozenset()
    """Lower-case endings (`.jpg`) of the files in folders that count; empty: every file that is not hidden."""
    names: tuple[str, ...] = ()
    """What each root is called in the fingerprint, where its name changes the result; else they are numbered."""
    listing: Call | None = None
    """For files that name others (a table): returns roughly how many samples there are (0: one for each file), and
    the path of every file that is named, by its name there. It is called whenever the source is looked at."""
    fetch: Call | None = None
    """For what can be downloaded: brings the files to the roots and returns how many samples they hold. It is called
    by a run that never looked at the source before, or finds no files."""


@dataclass(frozen=True)
class Estimate:
    """Roughly what a step makes and needs, for `simclr run --dry-run`."""

    samples: int = 0
    sample_bytes: int = 0
    """Of one sample as the next step holds it in memory."""
    disk_bytes: int = 10 * 2**20
    """At the most while it runs: for what it makes, and for what it keeps beside that until it has."""
    memory_bytes: int = LIBRARIES_BYTES
    weight_bytes: int = 0
    """Of the encoder that it makes."""


class StageSettings(Settings):
    """Base of the settings of a stage; the docstring of a subclass is the stage's documentation.

    Attributes:
        stage_version: raised whenever the same settings and inputs give other bytes.
        reads_ancestors: the stage looks at everything its inputs were made of (a report), so the key holds that too.
        uses_ranks: where there are several processes, all run the stage together; otherwise rank 0 runs it alone.
        lower_for_memory: dotted keys of settings that need less memory when they are lowered, the strongest first.
    """

    stage_version: ClassVar[int]
    reads_ancestors: ClassVar[bool] = False
    uses_ranks: ClassVar[bool] = False
    lower_for_memory: ClassVar[tuple[str, ...]] = ()

    def without_effect(self) -> set[str]:
        """Settings that cannot change the result, given the values of the others."""
        return set()

    def depends_on_seed(self) -> bool:
        """Whether the seed changes the result; if not, runs with other seeds share one artifact."""
        return True

    def estimate(self, inputs: Mapping[str, Estimate]) -> Estimate:
        """What the step makes and needs, from what its inputs (by setting; foreign files too) hold."""
        return Estimate(samples=max((one.samples for one in inputs.values()), default=0))

    def foreign_inputs(self) -> dict[str, ForeignInput]:
        """By name of the setting: what the step reads from outside the store."""
        return {}


def setting(default: Any = ..., description: str = "", *, hashed: bool = True, **constraints: Any) -> Any:
    """A field with its documentation. `hashed=False`: it cannot change the result (workers, device, cadence)."""
    return Field(default, description=description, json_schema_extra={"hashed": hashed}, **constraints)


def artifact(
    *stages: str,
    description: str,
    default: Any = ...,
    literals: tuple[str, ...] = (),
    prefixes: tuple[str, ...] = (),
    min_length: int | None = None,
) -> Any:
    """A field that names an input: a step of the recipe or a REF into the store, made by one of `stages`.

    Args:
        literals: words that are no artifact (`random`).
        prefixes: beginnings of values that are no artifact (`timm:`).
        min_length: of a field that takes several.
    """
    extra: JsonDict = {"artifact_of": [*stages], "literals": [*literals], "prefixes": [*prefixes]}
    return Field(default, description=description, json_schema_extra=extra, min_length=min_length)


def hashed_subset(settings: Settings) -> dict[str, Any]:
    """The settings that can change the result, as plain data; inputs that name artifacts are left out."""
    subset = {}
    idle = settings.without_effect() if isinstance(settings, StageSettings) else set()
    for name, field in type(settings).model_fields.items():
        if name in idle or not _extra(field).get("hashed", True):
            continue
        value = getattr(settings, name)
        if is_artifact_field(field) and names_artifact(field, value):
            continue
        subset[name] = _hashed(value)
    return subset


def changed_subset(settings: Settings) -> dict[str, Any]:
    """The part of `hashed_subset` that is not at its default."""
    hashed, changed = hashed_subset(settings), settings.model_dump(mode="json", exclude_defaults=True)
    return {name: value for name, value in changed.items() if name in hashed}


def plain(settings: Settings) -> dict[str, Any]:
    """All settings as plain data."""
    return settings.model_dump(mode="json")


def is_artifact_field(field: FieldInfo) -> bool:
    """Whether the field was made by `artifact`."""
    return "artifact_of" in _extra(field)


def artifact_stages(field: FieldInfo) -> list[str]:
    """The stages whose artifacts the field takes."""
    return _extra(field)["artifact_of"]


def artifact_words(field: FieldInfo) -> list[str]:
    """What else the field takes: literals, and prefixes followed by NAME."""
    extra = _extra(field)
    return [*extra["literals"], *(f"{prefix}NAME" for prefix in extra["prefixes"])]


def names_artifact(field: FieldInfo, value: Any) -> bool:
    """Whether a value of such a field names an artifact, rather than being a literal or left out."""
    if value is None:
        return False
    if isinstance(value, tuple):
        return True
    extra = _extra(field)
    return value not in extra["literals"] and not value.startswith(tuple(extra["prefixes"]))


ONE, SEVERAL = "(one)", "(several)"
"""What pydantic puts between such a field and its keys in the place of an error; no setting has such a name."""


def one_or_several(kinds: Sequence[type[Settings]]) -> Any:
    """The type of a field that takes a group of one of these kinds, told apart by its `name`, or a list of such."""
    union: Any = reduce(or_, kinds)
    one: Any = Annotated[union, Field(discriminator="name")]
    return Annotated[Annotated[one, Tag(ONE)] | Annotated[tuple[one, ...], Tag(SEVERAL)], Discriminator(_how_many)]


def _how_many(value: Any) -> str:
    return SEVERAL if isinstance(value, list | tuple) else ONE


def kinds_of(field: FieldInfo) -> dict[str, type[Settings]]:
    """By name: the groups that a field chooses from, where it takes one of several (or a list of them); empty for every
    other field."""
    if not any(isinstance(one, Discriminator) for one in field.metadata):
        return {}
    one = get_args(get_args(field.annotation)[0])[0]
    return {name: kind for kind in get_args(one) for name in get_args(kind.model_fields["name"].annotation)}


def _extra(field: FieldInfo) -> dict[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def _hashed(value: Any) -> Any:
    """A value as plain data, groups of settings without what cannot change the result."""
    if isinstance(value, Settings):
        return hashed_subset(value)
    return [_hashed(item) for item in value] if isinstance(value, tuple | list) else value
