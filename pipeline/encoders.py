"""What is done with a trained encoder outside of recipes: load it, embed a folder by it, export it.

The code that knows images and models is reached by name, here and nowhere else: it brings torch along, which
`open_store` and the quick commands must not wait for.
"""

import importlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import BadData, UsageError
from pipeline.progress import Progress, Reporter
from pipeline.provenance import files_below
from pipeline.resources import exhausted

PACKAGE = "stages.encoders"
REASONS_NAMED = 10
"""Why images cannot be read: beyond so many, the rest is counted."""


@dataclass(frozen=True)
class Gallery:
    """Features of the stage `embed`, or an index of some of them, which the stage `retrieve` made.

    Attributes:
        files: of the features, or of the artifact with the index.
        shards: files of the images.
        looks: settings of the stage `embed` that say what is looked at of an image (`crops`, `mirror`).
        index: what metrics.json says of the index; None for features.
    """

    files: Path
    shards: Path
    looks: Mapping[str, Any]
    index: Mapping[str, Any] | None = None


def load(files: Path, reference: str, made_by: Mapping[str, Mapping[str, Any]]) -> Any:
    """An encoder of the store as a torch module with `.preprocess`.

    Args:
        files: of the artifact.
        reference: its name, for messages.
        made_by: by stage, the settings of what the artifact was made of (the nearest of each stage).
    """
    return importlib.import_module(f"{PACKAGE}.ready").load_artifact(files, reference, made_by)


def embed_folder(
    encoder: Any, folder: Path, out: Path, suffixes: frozenset[str], *, batch_size: int, device: str, workers: int
) -> dict[str, Any]:
    """Write the vectors of all images below a folder to a Parquet file; it appears when it is complete.

    Args:
        encoder: as `load` gives it.
        suffixes: lower-case endings of the files that are taken for images.

    Returns:
        counts, for `--json`: images, unreadable, dimension, out.

    Raises:
        UsageError: no such folder, no images in it, or `out` is no .parquet.
        BadData: none of the images can be read.
    """
    if out.suffix != ".parquet" or out.is_dir():
        raise UsageError(f"{out}: --out is a file that ends in .parquet")
    if not out.parent.is_dir():
        raise UsageError(f"{out}: no such folder: {out.parent}")
    images = _images_below(folder, suffixes)
    reporter = Reporter("embed")
    if encoder.learned_from_tiles:
        reporter.warn("the encoder learned from tiles at full size, and here each image is scaled down as a whole")
    try:
        with Progress(reporter, len(images), "images") as progress:
            rejected = importlib.import_module(f"{PACKAGE}.folder").embed_images(
                encoder, images, out, batch_size=batch_size, device=device, workers=workers, advance=progress.advance
            )
    except Exception as error:
        no_space = exhausted(error, "embed", ["--batch-size"])
        if no_space is not None:
            raise no_space from error
        raise
    _warn_of_rejected(reporter, rejected)
    if len(rejected) == len(images):
        raise BadData(f"{folder}: none of its {len(images):,} images can be read; {out} is as it was")
    return {
        "images": len(images) - len(rejected),
        "unreadable": [relative for relative, _ in rejected],
        "dimension": encoder.embedding_size,
        "out": str(out),
    }


def search(
    encoder: Any,
    queries: Sequence[Path],
    gallery: Path | Gallery,
    suffixes: frozenset[str],
    *,
    count: int,
    collage: Path | None,
    batch_size: int,
    device: str,
    workers: int,
) -> list[dict[str, Any]]:
    """The images of a gallery that are most like each query.

    Args:
        encoder: as `load` gives it.
        gallery: a folder of images, features, or an index.
        count: neighbours of each.
        collage: a .png file for a picture of them, one row a query.

    Returns:
        For each query {"query", "neighbours": [{"key", "label", "similarity", "distance"}]}, nearest first.

    Raises:
        UsageError: a query that is no file, no such gallery, or `collage` is no .png.
    """
    if collage is not None and (collage.suffix != ".png" or not collage.parent.is_dir()):
        raise UsageError(f"{collage}: --collage is a file that ends in .png, in a folder that is there")
    for query in queries:
        if not query.is_file():
            raise UsageError(f"{query}: no such file")
    searching, reporter = importlib.import_module(f"{PACKAGE}.search"), Reporter("search")
    looks = gallery.looks if isinstance(gallery, Gallery) else {}
    vectors = searching.query_vectors(encoder, queries, device, **looks)
    if isinstance(gallery, Gallery) and gallery.index is not None:
        found_in = searching.gallery_of_index(gallery.files, gallery.shards, gallery.index)
    elif isinstance(gallery, Gallery):
        found_in = searching.gallery_of_features(gallery.files, gallery.shards)
    else:
        images = _images_below(gallery, suffixes)
        with Progress(reporter, len(images), "images") as progress:
            found_in, rejected = searching.gallery_of_folder(
                encoder, images, batch_size=batch_size, device=device,
                workers=workers, advance=progress.advance,
            )  # fmt: skip
        _warn_of_rejected(reporter, rejected)
    if count > len(found_in.keys):
        reporter.warn(f"the gallery has {len(found_in.keys):,} images, fewer than the {count} that are asked for")
    found = searching.search(vectors, found_in, count)
    if collage is not None:
        searching.collage(queries, found_in, found).save(collage)
    return [
        {
            "query": str(query),
            "neighbours": [
                {
                    "key": found_in.keys[place],
                    "label": found_in.labels[place],
                    "similarity": round(similarity, 6),
                    "distance": round(distance, 6),
                }
                for place, similarity, distance in zip(places, similarities, apart, strict=True)
            ],
        }
        for query, places, similarities, apart in zip(
            queries,
            found.index.tolist(),
            found.similarity.tolist(),
            searching.distances(found.similarity).tolist(),
            strict=True,
        )
    ]


def _images_below(folder: Path, suffixes: frozenset[str]) -> list[tuple[Path, str]]:
    """(file, path to show) of all images, in order. Raises UsageError where there are none."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    images = sorted(((path, relative) for path, relative, _ in files_below(folder, suffixes)), key=lambda one: one[1])
    if not images:
        raise UsageError(f"{folder}: no files here ending in {', '.join(sorted(suffixes))}")
    return images


def _warn_of_rejected(reporter: Reporter, rejected: Sequence[tuple[str, str]]) -> None:
    """A line for each reason, the most frequent first: where all images fail, they fail alike."""
    names: dict[str, list[str]] = defaultdict(list)
    for relative, reason in rejected:
        names[reason].append(relative)
    ranked = sorted(names.items(), key=lambda one: -len(one[1]))
    for reason, its_names in ranked[:REASONS_NAMED]:
        if len(its_names) == 1:
            reporter.warn(f"{its_names[0]}: {reason}; it is left out")
        else:
            reporter.warn(f"{len(its_names):,} images are left out, the first: {its_names[0]} ({reason})")
    rest = sum(len(its_names) for _, its_names in ranked[REASONS_NAMED:])
    if rest:
        reporter.warn(f"{rest:,} more images are left out for other reasons; --json names them all")


def export(encoder: Any, folder: Path, kind: str) -> list[str]:
    """Write an encoder for use without this package; see stages/encoders/export.py.

    Args:
        kind: torchvision, timm or safetensors.

    Returns:
        Names of the files in `folder`.
    """
    return importlib.import_module(f"{PACKAGE}.export").export(encoder, folder, kind)
