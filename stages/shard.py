"""The stage `shard`: images from a source into WebDataset tars, an index, splits, classes and counts."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import BadData
from pipeline.run import Run
from stages.images.candidates import SPLITS, Source
from stages.images.encode import Storage
from stages.images.index import NO_LABEL, REJECTED_FILE, write_index, write_summary
from stages.images.packing import Packed, PixelSums, Rejected, make_chunks, pack
from stages.images.sources import describe_left_out, read_digits, read_folder
from stages.images.splits import draw_splits
from stages.settings.shard import IMAGE_SUFFIXES, UNREAD_SUFFIXES, Shard


def shard(run: Run, settings: Shard) -> None:
    """Pack every readable image of the source; see stages/settings/shard.py for what can be chosen.

    Writes {split}-{number}.tar, index.parquet, shards.json and rejected.jsonl.

    Raises:
        BadData: too many images cannot be read, or no training image is left.
        SourceError: the source is missing, empty or ambiguous.
    """
    source = _read_source(settings)
    splits = _splits(source, settings, run.seed)
    storage = Storage(settings.max_short_side, settings.max_long_side, settings.jpeg_quality, settings.background)
    chunks = make_chunks(
        source.candidates,
        splits,
        source.classes,
        root=source.root,
        storage=storage,
        images_per_shard=settings.images_per_shard,
        folder=run.out,
    )
    with run.progress(len(source.candidates), "images") as progress:
        packed = list(pack(chunks, settings.workers, progress.advance))

    rejected = sorted(image for one in packed for image in one.rejected)
    _check_rejected(rejected, len(source.candidates), settings.max_rejected)
    lines = [json.dumps(image._asdict(), ensure_ascii=False) + "\n" for image in rejected]
    (run.out / REJECTED_FILE).write_text("".join(lines), encoding="utf-8")

    index = write_index(run.out, [one.rows for one in packed])
    assert len(source.candidates) == index.num_rows + len(rejected), "images were lost"
    summary = _summary(source, settings, packed)
    if "train" not in summary["splits"]:
        raise BadData("no image is left for train: put some into train/, or say `splits: drawn`")
    write_summary(run.out, summary)
    _tell(run, source, summary, rejected)
    _tell_of_labels_and_splits(run, source, summary)


def _read_source(settings: Shard) -> Source:
    if settings.source == "sklearn:digits":
        return read_digits()
    (root,) = settings.foreign_inputs()["source"].roots
    return read_folder(root, IMAGE_SUFFIXES, settings.labels, settings.splits)


def _splits(source: Source, settings: Shard, seed: int) -> list[str]:
    """The split of each candidate: as given, or drawn."""
    given = [one.split for one in source.candidates if one.split is not None]
    if given:
        return given
    fractions = {"test": settings.test_fraction, "val": settings.val_fraction}
    keys = [one.key for one in source.candidates]
    return draw_splits(keys, [one.class_name for one in source.candidates], fractions, seed)


def _check_rejected(rejected: Sequence[Rejected], images: int, max_rejected: float) -> None:
    if len(rejected) > max_rejected * images:
        first = "; ".join(f"{image.path} ({image.reason})" for image in rejected[:10])
        more = f"; and {len(rejected) - 10:,} more" if len(rejected) > 10 else ""
        raise BadData(
            f"{len(rejected):,} of {images:,} images cannot be used, more than max_rejected ({max_rejected:.2%}) "
            f"allows: {first}{more}. Mend or remove them, or raise max_rejected"
        )


def _summary(source: Source, settings: Shard, packed: Sequence[Packed]) -> dict[str, Any]:
    """What shards.json says."""
    sums = sum((one.sums for one in packed), PixelSums())
    samples, copied = sum(one.rows.num_rows for one in packed), sum(one.copied for one in packed)
    of_split = {split: [one.rows for one in packed if one.chunk.split == split] for split in SPLITS}
    return {
        "source_kind": settings.source.partition(":")[0],
        "classes": source.classes,
        "splits": {
            split: _split_summary(pa.concat_tables(tables), len(source.classes))
            for split, tables in of_split.items()
            if any(table.num_rows for table in tables)
        },
        "images_in": len(source.candidates),
        "samples_out": samples,
        "rejected": sum(len(one.rejected) for one in packed),
        "copied": copied,
        "encoded": samples - copied,
        "statistics": {"mean": sums.mean(), "std": sums.std(), "pixels": sums.pixels},
    }


def _split_summary(rows: pa.Table, classes: int) -> dict[str, Any]:
    labels = rows["label"].to_numpy()
    return {
        "samples": rows.num_rows,
        "bytes": int(rows["size"].to_numpy().sum()),
        "max_height": int(rows["height"].to_numpy().max()),
        "max_width": int(rows["width"].to_numpy().max()),
        "class_counts": np.bincount(labels[labels != NO_LABEL], minlength=classes).tolist(),
        "unlabelled": int((labels == NO_LABEL).sum()),
    }


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
        sample_bytes=3 * splits["train"]["max_height"] * splits["train"]["max_width"],
        images_in=summary["images_in"],
        rejected=summary["rejected"],
        ignored_files=source.left_out.total(),
        copied=summary["copied"],
        encoded=summary["encoded"],
        classes=len(classes),
        **{split: part["samples"] for split, part in splits.items()},
    )


def _tell_of_labels_and_splits(run: Run, source: Source, summary: dict[str, Any]) -> None:
    """Warn of what a probe would trip over."""
    splits, classes = summary["splits"], summary["classes"]
    if "test" not in splits and any(one.split is not None for one in source.candidates):
        run.warn("no test split: a probe needs one (probe test_split: val, or splits: drawn)")
    unlabelled = sum(part["unlabelled"] for part in splits.values())
    if classes and unlabelled:
        run.warn(f"{unlabelled:,} images lie in no class folder and have no label")
    for split in ("val", "test"):
        counts = splits[split]["class_counts"] if split in splits else []
        lacking = [
            name
            for name, count, in_train in zip(classes, counts, splits["train"]["class_counts"], strict=False)
            if count and not in_train
        ]
        if lacking:
            names = ", ".join(lacking[:5]) + (", ..." if len(lacking) > 5 else "")
            run.warn(f"{len(lacking):,} classes are in {split} but not in train: {names}")
