"""The stage `shard`: images from a source into WebDataset tars, an index, splits, classes and counts."""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import BadData
from pipeline.run import Run
from stages.images.encode import Storage
from stages.images.index import (
    REJECTED_FILE,
    describe_attributes,
    describe_groups_and_labels,
    write_index,
    write_summary,
)
from stages.images.near_duplicates import (
    NEAR_DUPLICATES_FILE,
    SMALLEST_SIDE,
    describe_near_duplicates,
    find_near_duplicates,
    near_duplicate_work,
    write_near_duplicates,
)
from stages.images.packing import NOT_THERE, Packed, PixelSums, Rejected, make_chunks
from stages.images.packing_processes import pack
from stages.images.reading import WindowUse
from stages.images.splits import draw_splits
from stages.images.tiles import Tile
from stages.settings.shard import IMAGE_SUFFIXES, UNREAD_SUFFIXES, Shard
from stages.sources.candidates import SPLITS, Source, describe_left_out
from stages.sources.class_splits import draw_classes, take_classes
from stages.sources.columns import Columns, Reading
from stages.sources.digits import read_digits
from stages.sources.folder import read_folder, read_folders
from stages.sources.groups import check_groups, group_by_pattern
from stages.sources.parquet import read_parquet
from stages.sources.table import read_csv
from stages.sources.tars import read_tars
from stages.sources.torchvision_sets import find_set, read_set

MAX_OUTSIDE_WINDOW = 0.1
"""Share of pixel values that a window may cut off before it is told."""

FIRST_REASONS, FIRST_PATHS = 4, 3
"""Of images that cannot be used, where there are too many."""

FIRST_CLASSES = 5
"""Of those that are named in words."""

AGAINST_TORN_GROUPS = {
    "image": "draw the splits (`splits: drawn`)",
    "class": "name their classes in one split (`split_classes`)",
}


def check_settings(settings: Shard) -> None:
    """What can be said before anything runs. Raises NoSuchSet."""
    if settings.source_kind == "torchvision":
        find_set(settings.torchvision_set[0])


def shard(run: Run, settings: Shard) -> None:
    """Pack every readable image of the source; see stages/settings/shard.py for what can be chosen.

    Writes {split}-{number}.tar, index.parquet, shards.json, rejected.jsonl and near_duplicates.parquet.

    Raises:
        BadData: too many images cannot be read, or no training image is left.
        SourceError: the source is missing, empty or ambiguous.
    """
    source = _read_source(settings)
    for note in source.notes:
        run.say(note)
    if settings.group_pattern is not None:
        source = group_by_pattern(source, settings.group_pattern)
    if settings.split_by == "class":
        source = _split_by_class(run, source, settings)
    source = check_groups(source, settings.allow_group_in_splits, AGAINST_TORN_GROUPS[settings.split_by])
    splits = _splits(source, settings, run.seed)
    storage = _storage(settings)
    chunks = make_chunks(
        source.candidates,
        splits,
        source.classes,
        root=source.root,
        storage=storage,
        images_per_shard=settings.images_per_shard,
        folder=run.out,
        attributes=source.attributes,
    )
    with run.progress(len(source.candidates), "images") as progress:
        packed = list(pack(chunks, settings.workers, progress.advance))

    rejected = sorted(image for one in packed for image in one.rejected)
    missing = _missing_in_words(source, rejected, settings)
    _check_rejected(rejected, len(source.candidates), settings.max_rejected, missing)
    lines = [json.dumps(image._asdict(), ensure_ascii=False) + "\n" for image in rejected]
    (run.out / REJECTED_FILE).write_text("".join(lines), encoding="utf-8")

    index = write_index(run.out, [one.rows for one in packed])
    assert len(source.candidates) == sum(one.images for one in packed) + len(rejected), "images were lost"
    summary = _summary(source, settings, packed) | describe_groups_and_labels(index) | describe_attributes(index)
    summary["near_duplicates"] = None
    if "train" not in summary["splits"]:
        advice = missing or "put some into train/, or say `splits: drawn`"
        raise BadData(f"no image is left for train: {advice}")
    write_summary(run.out, summary)
    if settings.near_duplicates:
        write_summary(run.out, summary | {"near_duplicates": _find_near_duplicates(run, settings, summary)})
    _tell(run, source, summary, rejected)
    if settings.split_by == "class":
        _tell_of_class_splits(run, summary)
    if missing:
        run.warn(missing)
    _tell_of_window(run, settings, sum((one.window_use for one in packed), WindowUse()))
    _tell_of_groups_and_several_labels(run, index, summary)
    _tell_of_attributes(run, summary)
    _tell_of_labels_and_splits(run, settings, source, summary)


def _read_source(settings: Shard) -> Source:
    given = settings.foreign_inputs()["source"]
    columns = Columns(**settings.columns.model_dump())
    reading = Reading(columns, settings.labels != "none", settings.splits, settings.split_values)
    images_root = None if settings.images_root is None else Path(settings.images_root).expanduser()
    match settings.source_kind:
        case "folder" if given.names:
            return read_folders(given.roots, given.names, IMAGE_SUFFIXES, settings.labels, settings.splits)
        case "folder":
            return read_folder(given.roots[0], IMAGE_SUFFIXES, settings.labels, settings.splits)
        case "csv":
            return read_csv(given.roots[0], images_root, reading)
        case "parquet":
            return read_parquet(given.roots[0], images_root, reading)
        case "wds":
            return read_tars(given.roots[0], IMAGE_SUFFIXES, reading)
        case "torchvision":
            return read_set(*settings.torchvision_set, reading)
    return read_digits()


def _split_by_class(run: Run, source: Source, settings: Shard) -> Source:
    """Every image in the split of its class."""
    if settings.split_classes is None:
        return draw_classes(source, _fractions(settings), run.seed)
    divided = take_classes(source, settings.split_classes.model_dump())
    left_out = sorted({*source.classes} - {*divided.classes})
    if left_out:
        names = ", ".join(left_out[:FIRST_CLASSES]) + (", ..." if len(left_out) > FIRST_CLASSES else "")
        images = len(source.candidates) - len(divided.candidates)
        run.say(f"split_classes leaves out {len(left_out):,} classes with {images:,} images: {names}")
    return divided


def _fractions(settings: Shard) -> dict[str, float]:
    return {"test": settings.test_fraction, "val": settings.val_fraction}


def _storage(settings: Shard) -> Storage:
    tile = settings.tile
    return Storage(
        settings.max_short_side,
        settings.max_long_side,
        settings.jpeg_quality,
        settings.background,
        settings.channels,
        settings.window,
        None if tile is None else Tile(tile.size, tile.stride or tile.size),
        round(settings.max_megapixels * 1e6),
    )


def _splits(source: Source, settings: Shard, seed: int) -> list[str]:
    """The split of each candidate: as given (by its class, with `split_by: class`), or drawn."""
    given = [one.split for one in source.candidates if one.split is not None]
    if given:
        return given
    keys = [one.key for one in source.candidates]
    groups = [one.group for one in source.candidates] if source.has_groups else None
    return draw_splits(keys, _strata(source), _fractions(settings), seed, groups)


def _strata(source: Source) -> list[str | None]:
    """The class that splits are stratified by: of several, the rarest, so that rare ones are in every split."""
    times = Counter(name for one in source.candidates for name in one.labels)
    return [min(one.labels, key=lambda name: (times[name], name), default=None) for one in source.candidates]


def _check_rejected(rejected: Sequence[Rejected], images: int, max_rejected: float, missing: str | None) -> None:
    if len(rejected) > max_rejected * images:
        where = f"{missing}. " if missing else ""
        raise BadData(
            f"{len(rejected):,} of {images:,} images cannot be used, more than max_rejected ({max_rejected:.2%}) "
            f"allows: {_reasons_in_words(rejected)}. {where}Mend or remove them, or raise max_rejected"
        )


def _missing_in_words(source: Source, rejected: Sequence[Rejected], settings: Shard) -> str | None:
    """Where files that a table names were looked for, if so many are not there that the folder may be the wrong one."""
    files = {one.key: one.image for one in source.candidates if isinstance(one.image, str)}
    missing = [files[one.path] for one in rejected if one.reason == NOT_THERE and one.path in files]
    if source.root is None or settings.source_kind not in ("csv", "parquet") or 2 * len(missing) < max(1, len(files)):
        return None
    path = os.path.join(source.root, missing[0])
    where = f"{len(missing):,} of {len(files):,} files that the table names are not there, the first was to be {path}"
    if os.path.isabs(missing[0]):
        return f"{where}: the table has that path in full (relative ones start from `images_root`)"
    default = "" if settings.images_root is not None else ", that of the table"
    return f"{where}: set `images_root` to the folder that paths start from (now {source.root}{default})"


def _reasons_in_words(rejected: Sequence[Rejected]) -> str:
    """The most frequent reasons, each with the first images that it holds for."""
    paths: dict[str, list[str]] = defaultdict(list)
    for image in rejected:
        paths[image.reason].append(image.path)
    ranked = sorted(paths.items(), key=lambda one: -len(one[1]))
    words = []
    for reason, places in ranked[:FIRST_REASONS]:
        more = f" and {len(places) - FIRST_PATHS:,} more" if len(places) > FIRST_PATHS else ""
        words.append(f"{', '.join(places[:FIRST_PATHS])}{more} ({reason})")
    rest = sum(len(places) for _, places in ranked[FIRST_REASONS:])
    return "; ".join(words) + (f"; and {rest:,} more for other reasons" if rest else "")


def _summary(source: Source, settings: Shard, packed: Sequence[Packed]) -> dict[str, Any]:
    """What shards.json says."""
    tile = _storage(settings).tile
    sums = sum((one.sums for one in packed), PixelSums())
    samples, copied = sum(one.rows.num_rows for one in packed), sum(one.copied for one in packed)
    of_split = {split: [one.rows for one in packed if one.chunk.split == split] for split in SPLITS}
    return {
        "source_kind": settings.source_kind,
        "classes": source.classes,
        "splits": {
            split: _split_summary(pa.concat_tables(tables), len(source.classes))
            for split, tables in of_split.items()
            if any(table.num_rows for table in tables)
        },
        "channels": settings.channels,
        "tile": None if tile is None else {"size": tile.size, "stride": tile.stride},
        "images_in": len(source.candidates),
        "samples_out": samples,
        "rejected": sum(len(one.rejected) for one in packed),
        "copied": copied,
        "encoded": samples - copied,
        "statistics": {"mean": sums.mean(), "std": sums.std(), "pixels": sums.pixels},
    }


def _split_summary(rows: pa.Table, classes: int) -> dict[str, Any]:
    labels = rows["labels"].combine_chunks()
    return {
        "samples": rows.num_rows,
        "bytes": int(rows["size"].to_numpy().sum()),
        "max_height": int(rows["height"].to_numpy().max()),
        "max_width": int(rows["width"].to_numpy().max()),
        "class_counts": np.bincount(labels.flatten().to_numpy(), minlength=classes).tolist(),
        "unlabelled": int((labels.value_lengths().to_numpy() == 0).sum()),
    }


def _find_near_duplicates(run: Run, settings: Shard, summary: dict[str, Any]) -> dict[str, Any]:
    """Look for them in the finished shards and write their list; returns what shards.json says."""
    most = settings.near_duplicate_distance
    with run.progress(near_duplicate_work(run.out), "steps in search of near-duplicates") as progress:
        found = find_near_duplicates(run.out, most, run.scratch(), settings.workers, progress.advance)
    write_near_duplicates(run.out, found)
    counts = describe_near_duplicates(run.out, found, most)
    run.say(_near_duplicates_in_words(counts))
    for one in counts["across"]:
        (first, second), pairs, images = one["splits"], one["pairs"], one["images"]
        run.count(**{f"near_duplicates_{first}_{second}": pairs})
        if pairs:
            share = images[1] / summary["splits"][second]["samples"]
            run.warn(
                f"{images[1]:,} images of {second} ({share:.2%}) have a near-duplicate in {first}: "
                f"{NEAR_DUPLICATES_FILE} in this artifact lists the pairs"
            )
    run.count(**{f"near_duplicates_{split}": pairs for split, pairs in counts["within"].items()})
    return counts


def _near_duplicates_in_words(counts: dict[str, Any]) -> str:
    within = ", ".join(f"{split} {pairs:,}" for split, pairs in counts["within"].items())
    words = f"near-duplicates: {counts['pairs']:,} pairs (within {within})"
    if counts["searched"] < counts["images"]:
        rest = counts["images"] - counts["searched"]
        words += f"; {rest:,} images are flat or smaller than {SMALLEST_SIDE} pixels: searched for equal bytes only"
    if counts["search"] == "cells":
        words += "; not every pair of so many images was looked at: a few in a hundred may be missing"
    if counts["listed"] < counts["pairs"]:
        words += f"; the closest {counts['listed']:,} are listed, {counts['pairs'] - counts['listed']:,} are not"
    return words


def _tell(run: Run, source: Source, summary: dict[str, Any], rejected: Sequence[Rejected]) -> None:
    """Say what came out and what was left out.

    What was left out is in no file: the artifact's key does not know of files that are no images.
    """
    splits, classes = summary["splits"], summary["classes"]
    parts = ", ".join(f"{split} {part['samples']:,}" for split, part in splits.items())
    run.say(
        f"{summary['samples_out']:,} samples ({parts}) of {len(classes)} classes: {summary['copied']:,} copied, "
        f"{summary['encoded']:,} encoded; {describe_left_out(source.left_out)}"
    )
    unread = Counter({kind: count for kind, count in source.left_out.items() if kind in UNREAD_SUFFIXES})
    if unread:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in unread.most_common())
        run.warn(f"{unread.total():,} images are of a kind that is not read ({kinds}): make them JPEG or PNG")
    for remark in source.remarks:
        run.warn(remark)
    if rejected:
        run.warn(
            f"{len(rejected):,} of {summary['images_in']:,} images cannot be used, the first: {rejected[0].path} "
            f"({rejected[0].reason}); all are listed in {REJECTED_FILE}"
        )
    run.count(
        samples=summary["samples_out"],
        sample_bytes=summary["channels"] * splits["train"]["max_height"] * splits["train"]["max_width"],
        images_in=summary["images_in"],
        rejected=summary["rejected"],
        ignored_files=source.left_out.total(),
        copied=summary["copied"],
        encoded=summary["encoded"],
        classes=len(classes),
        **{split: part["samples"] for split, part in splits.items()},
    )


def _tell_of_window(run: Run, settings: Shard, use: WindowUse) -> None:
    """Warn where a window cuts off much: whole images may have become black or white."""
    if use.outside > MAX_OUTSIDE_WINDOW * use.values:
        low, high = settings.window or (0, 0)
        run.warn(
            f"{use.outside / use.values:.0%} of the pixel values of 16-bit, 32-bit and float images lie outside "
            f"window [{low:g}, {high:g}] and became 0 or 255: the smallest is {use.smallest:g}, the largest "
            f"{use.largest:g}"
        )


def _tell_of_groups_and_several_labels(run: Run, index: pa.Table, summary: dict[str, Any]) -> None:
    """Say how samples hang together, and how many classes they have."""
    if summary["groups"] is not None:
        run.count(groups=summary["groups"])
        sizes = index["group"].drop_null().value_counts().field("counts").to_numpy()
        lone = f", {index['group'].null_count:,} samples are in none" if index["group"].null_count else ""
        run.say(f"{summary['groups']:,} groups, the largest of {sizes.max():,} samples{lone}")
    if summary["several_labels"]:
        lengths = index["labels"].combine_chunks().value_lengths().to_numpy()
        run.say(f"{(lengths > 1).sum():,} samples have several labels; a sample has {lengths.mean():.1f} on average")


def _tell_of_attributes(run: Run, summary: dict[str, Any]) -> None:
    for name, counts in summary.get("attributes", {}).items():
        without = f", {counts['missing']:,} samples have none" if counts["missing"] else ""
        run.say(f"attribute {name}: {counts['distinct']:,} values{without}")


def _tell_of_class_splits(run: Run, summary: dict[str, Any]) -> None:
    """Say how many classes each split has to itself."""
    classes = {split: sum(count > 0 for count in part["class_counts"]) for split, part in summary["splits"].items()}
    parts = ", ".join(f"{split} {count:,}" for split, count in classes.items())
    run.say(f"classes of the splits, which share none: {parts}")
    run.count(**{f"{split}_classes": count for split, count in classes.items()})


def _tell_of_labels_and_splits(run: Run, settings: Shard, source: Source, summary: dict[str, Any]) -> None:
    """Warn of what a probe would trip over."""
    splits, classes, source_kind = summary["splits"], summary["classes"], summary["source_kind"]
    by_class = settings.split_by == "class"
    if "test" not in splits and not by_class and any(one.split is not None for one in source.candidates):
        run.warn("no test split: a probe needs one (probe test_split: val, or splits: drawn)")
    if all(one.split is None for one in source.candidates):
        units = "images" if summary["groups"] is None else "groups"
        for split, fraction in (("val", settings.val_fraction), ("test", settings.test_fraction)):
            if fraction and split not in splits:
                run.warn(f"nothing is left for {split}: too few {units} for {split}_fraction {fraction}")
    unlabelled = sum(part["unlabelled"] for part in splits.values())
    if classes and unlabelled:
        where = "lie in no class folder and " if source_kind == "folder" else ""
        run.warn(f"{unlabelled:,} images {where}have no label")
    for split in () if by_class else ("val", "test"):
        counts = splits[split]["class_counts"] if split in splits else []
        lacking = [
            name
            for name, count, in_train in zip(classes, counts, splits["train"]["class_counts"], strict=False)
            if count and not in_train
        ]
        if lacking:
            names = ", ".join(lacking[:FIRST_CLASSES]) + (", ..." if len(lacking) > FIRST_CLASSES else "")
            run.warn(f"{len(lacking):,} classes are in {split} but not in train: {names}")
