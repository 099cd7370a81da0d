"""Settings of the stage `shard` that say where images come from, and which of them belong to which split."""

import os
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

from pydantic import WithJsonSchema, field_validator, model_validator

from pipeline.settings import Call, ForeignInput, Settings, StageSettings, setting

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
)
DOWNLOADS = "data/torchvision"

KINDS = {
    "folder": "folder:PATH",
    "csv": "csv:PATH",
    "parquet": "parquet:PATH",
    "wds": "wds:PATH",
    "torchvision": "torchvision:NAME",
    "sklearn": "sklearn:digits",
}
SOURCE_PATTERN = r"^((folder|csv|parquet|wds):.+|torchvision:\w+|sklearn:digits)$"
FOLDER_PATTERN = "^folder:.+$"
"""For the schema; people get the validators' words."""

URL_PATTERN = r"^\w+:((pipe|file):|\w+://)"

SOURCE_SCHEMA = {
    "anyOf": [
        {"type": "string", "pattern": SOURCE_PATTERN},
        {"type": "array", "items": {"type": "string", "pattern": FOLDER_PATTERN}, "minItems": 1},
    ]
}


class Columns(Settings):
    """Columns of a table, or fields of the samples of tars (`jpg`, `cls`, `json.patient` for a key inside `json`).

    One that is left out is taken by a standard name, where the table has it. Of several standard names the first
    counts; of images, those that hold bytes before those that hold paths.
    """

    image: str | None = setting(
        None, "path, or bytes in Parquet; standard: path, image, img, file, filename, file_name, filepath"
    )
    label: str | None = setting(None, "the class; standard: label, class (in tars: cls)")
    labels: str | None = setting(None, "several classes: `a|b`, or a list; standard: labels")
    split: str | None = setting(None, "train, val or test (or see split_values); standard: split")
    group: str | None = setting(None, "patient, video, burst: stays in one split; standard: group")
    attributes: tuple[str, ...] = setting(
        (), "further columns that go along as text, for later stages to ask for; one may be the split or the label too"
    )

    @field_validator("attributes")
    @classmethod
    def _check_attributes(cls, attributes: tuple[str, ...]) -> tuple[str, ...]:
        if "" in attributes or len(set(attributes)) < len(attributes):
            raise ValueError("each names a column, once")
        return attributes


class SplitClasses(Settings):
    """Names of classes, by split. Images of a class that none names are left out, and counted."""

    train: tuple[str, ...] = setting(..., "classes of train; in quotes where they are numbers", min_length=1)
    val: tuple[str, ...] = setting((), "classes of val")
    test: tuple[str, ...] = setting((), "classes of test")

    @model_validator(mode="after")
    def _check(self) -> "SplitClasses":
        times = Counter((*self.train, *self.val, *self.test))
        if repeated := [name for name, count in times.items() if count > 1]:
            raise ValueError(f"a class is in one split, and {repeated[0]!r} is named twice")
        return self


class SourceSettings(StageSettings):
    """Where images come from."""

    source: Annotated[str | tuple[str, ...], WithJsonSchema(SOURCE_SCHEMA)] = setting(
        ...,
        "`folder:PATH` (class = parent folder; train/ val/ test/ are splits) or a list of them; `csv:PATH`, "
        "`parquet:PATH` (a file, a folder, a pattern): see columns; `wds:PATH` (existing WebDataset tars: one, a "
        "folder, a pattern); `torchvision:NAME` (CIFAR10, Flowers102, ...: downloaded if missing); `sklearn:digits`",
        hashed=False,  # counts by content: see foreign_inputs
    )
    columns: Columns = setting(Columns(), "of csv:, parquet: and wds:")
    split_values: dict[str, Literal["train", "val", "test"]] | None = setting(
        None, "of csv:, parquet: and wds: the split that each value of the split column stands for: all of them"
    )
    images_root: str | None = setting(
        None, "of csv: and parquet: the folder that paths are relative to; left out: the table's own", hashed=False
    )
    download_folder: str | None = setting(
        None,
        "of torchvision: the folder in which it finds the set, or to which it downloads it; all files in it count; "
        f"left out: {DOWNLOADS}/NAME",
        hashed=False,
    )
    labels: Literal["folder", "none"] = setting(
        "folder", "folder: as the source has them, in folders by the name of the parent folder; none: no labels"
    )
    splits: Literal["given", "drawn"] | None = setting(
        None,
        "given: the top folders train/ val/ test/, all else is left out (of others a column, the names of files, the "
        "set's own); drawn: by the fractions; left out: given where the source has them for every image, else drawn",
    )
    val_fraction: float = setting(
        0.0, "share of the images (or classes: split_by) that becomes `val` where splits are drawn", ge=0, lt=1
    )
    test_fraction: float = setting(
        0.2, "share of the images (or classes: split_by) that becomes `test` where splits are drawn", ge=0, lt=1
    )
    split_by: Literal["image", "class"] = setting(
        "image",
        "what is drawn: image: images, in whole groups, stratified by class; class: whole classes, so that train, val "
        "and test share none, the fractions being shares of the classes; images without a label go to train",
    )
    split_classes: SplitClasses | None = setting(
        None,
        "with `split_by: class`, instead of a draw: the classes of train, val and test. The class alone decides: where "
        "the source has splits, images of any of them are taken; those of classes that are not named are left out",
    )
    group_pattern: str | None = setting(
        None,
        "regular expression on an image's key (its path): what its first parentheses match (the first that take part), "
        "or all that it matches, is the group; others are groups of their own",
    )
    allow_group_in_splits: bool = setting(False, "take given splits although a group is in two of them")

    @field_validator("source")
    @classmethod
    def _check_source(cls, source: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(source, tuple):
            if not source or any(not re.match(FOLDER_PATTERN, one) for one in source):
                raise ValueError("a list of sources has folder:PATH only")
            if len({_path(one) for one in source}) < len(source):
                raise ValueError("a list of sources names a folder once")
        named = source if isinstance(source, tuple) else (source,)
        if any(re.match(URL_PATTERN, one) for one in named):
            raise ValueError("a source is a path on this machine, no URL and no command")
        if isinstance(source, str) and not re.match(SOURCE_PATTERN, source):
            *kinds, last = KINDS.values()
            raise ValueError(f"write {', '.join(kinds)} or {last}")
        return source

    @field_validator("group_pattern")
    @classmethod
    def _check_pattern(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"no regular expression ({error})") from error
        return pattern

    @model_validator(mode="after")
    def _check_kinds(self) -> "SourceSettings":
        tables = ("csv", "parquet", "wds")
        serves = {
            "columns": tables if self.columns != Columns() else KINDS,
            "split_values": tables if self.split_values is not None else KINDS,
            "images_root": ("csv", "parquet") if self.images_root is not None else KINDS,
            "download_folder": ("torchvision",) if self.download_folder is not None else KINDS,
        }
        for name, kinds in serves.items():
            if self.source_kind not in kinds:
                raise ValueError(f"{name} is for {', '.join(f'{kind}:' for kind in kinds)} and not for {self.source}")
        if self.columns.label is not None and self.columns.labels is not None:
            raise ValueError("columns.label is for one class and columns.labels for several: name one of them")
        if self.columns.group is not None and self.group_pattern is not None:
            raise ValueError("columns.group and group_pattern both say what the groups are: name one of them")
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction and test_fraction together must leave something for train")
        return self

    @model_validator(mode="after")
    def _check_class_splits(self) -> "SourceSettings":
        if self.split_by == "image" and self.split_classes is not None:
            raise ValueError("split_classes names whole classes: say `split_by: class` with it")
        if self.split_by == "class" and self.splits == "given":
            raise ValueError("splits: given and split_by: class both say what the splits are: leave one out")
        if self.split_by == "class" and (self.labels == "none" or self.columns.labels is not None):
            named = "labels: none" if self.labels == "none" else "columns.labels"
            raise ValueError(f"split_by: class needs one label an image, which {named} does not give")
        return self

    @property
    def source_kind(self) -> str:
        """`folder`, `csv`, `parquet`, `wds`, `torchvision` or `sklearn`."""
        return "folder" if isinstance(self.source, tuple) else self.source.partition(":")[0]

    @property
    def torchvision_set(self) -> tuple[str, Path]:
        """Name and folder of a set of torchvision."""
        name = str(self.source).partition(":")[2]
        return name, Path(self.download_folder or f"{DOWNLOADS}/{name}").expanduser()

    def depends_on_seed(self) -> bool:
        """Only drawn splits do; where it is left open which they are, they may be drawn."""
        is_drawn = self.splits != "given" and self.split_classes is None
        return is_drawn and self.val_fraction + self.test_fraction > 0

    def without_effect(self) -> set[str]:
        return set() if self.split_classes is None else {"val_fraction", "test_fraction"}

    def foreign_inputs(self) -> dict[str, ForeignInput]:
        if isinstance(self.source, tuple):
            paths = tuple(_path(one) for one in self.source)
            return {"source": ForeignInput("folders", paths, IMAGE_SUFFIXES, names=folder_names(paths))}
        path, column = _path(self.source), self.columns.image
        root = self.images_root and str(Path(self.images_root).expanduser())
        match self.source_kind:
            case "folder":
                return {"source": ForeignInput("folder", (path,), IMAGE_SUFFIXES)}
            case "csv":
                call = Call("stages.sources.table", "list_csv", (str(path), root, column))
                return {"source": ForeignInput("csv", (path,), listing=call)}
            case "parquet":
                call = Call("stages.sources.parquet", "list_parquet", (str(path), root, column))
                return {"source": ForeignInput("parquet", (path,), frozenset({".parquet"}), listing=call)}
            case "wds":
                call = Call("stages.sources.tars", "count_tars", (str(path), sorted(IMAGE_SUFFIXES), column))
                return {"source": ForeignInput("wds", (path,), frozenset({".tar"}), listing=call)}
            case "torchvision":
                name, folder = self.torchvision_set
                call = Call("stages.sources.torchvision_sets", "fetch_set", (name, str(folder)))
                return {"source": ForeignInput(self.source, (folder,), fetch=call)}
        return {"source": ForeignInput(self.source)}


def folder_names(paths: tuple[Path, ...]) -> tuple[str, ...]:
    """What each of several folders is called: its own name, with those of folders above it where names are equal."""
    parts = [Path(os.path.abspath(path)).parts[1:] or ("root",) for path in paths]
    names = [one[-1] for one in parts]
    depth = 1
    while len(set(names)) < len(names) and depth < max(map(len, parts)):
        depth += 1
        names = [
            "-".join(one[-depth:]) if names.count(name) > 1 else name for one, name in zip(parts, names, strict=True)
        ]
    return tuple(names)


def _path(source: str) -> Path:
    return Path(source.partition(":")[2]).expanduser()
