"""The images of a gallery that are most like a query, and a picture of them."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from stages.encoders.folder import embed_images, find_device, label_of
from stages.encoders.ready import ReadyEncoder
from stages.evaluation.features import FeatureFile, read_features
from stages.evaluation.indexed_gallery import read_indexed_gallery
from stages.evaluation.neighbours import Neighbours, nearest
from stages.images import Shards, UnreadableImage, open_shards, read_summary
from stages.images.display import displayed
from stages.labels.sets import name_rows
from stages.views import squares

SIDE, GAP, CAPTION = 112, 8, 26
"""Of a collage, in pixels: an image's longest side, what is between two, and the two lines below."""
QUERY, OTHER = (29, 78, 216), (23, 23, 23)
SHORT = 18
"""Letters of a caption."""

Look = Callable[[int], Image.Image]
"""A row of the gallery as a picture."""


class NoGallery(ValueError):
    """There is nothing to be searched, or it was made by another encoder."""

    exit_code = 2


class UnreadableQuery(ValueError):
    """An image that is searched for cannot be read."""

    exit_code = 6


@dataclass(frozen=True)
class Gallery:
    """What can be found, and what is known of the image behind each row."""

    dimension: int
    nearest: Callable[[Tensor, int], Neighbours]
    """Of queries [Q, D] the k most similar rows, by cosine."""
    keys: Sequence[str]
    labels: Sequence[str | None]
    """Of several `a|b`."""
    look: Look


def gallery_of_features(files: Path, shards: Path) -> Gallery:
    """What the stage `embed` wrote, with the shards that its images lie in."""
    features = read_features(files)
    names = name_rows(FeatureFile(files).label_lists, features.classes)
    keys, look = [str(key) for key in features.keys], _look_into(shards, features.ids, features.splits)
    return _exactly(features.features, keys, names, look)


def gallery_of_index(files: Path, shards: Path, card: Mapping[str, Any]) -> Gallery:
    """What the stage `retrieve` made an index of; it is searched by that.

    Args:
        card: `index` of its metrics.json.
    """
    found = read_indexed_gallery(files, card)
    look = _look_into(shards, found.ids, found.splits)
    return Gallery(found.index.vectors.shape[1], found.index.nearest, found.keys, found.labels, look)


def _exactly(vectors: Tensor, keys: Sequence[str], labels: Sequence[str | None], look: Look) -> Gallery:
    return Gallery(vectors.shape[1], lambda queries, k: nearest(queries, vectors, k), keys, labels, look)


def _look_into(shards: Path, ids: NDArray[np.int64], splits: Sequence[str] | NDArray[np.str_]) -> Look:
    """Of rows with those ids and splits."""
    opened: dict[str, tuple[Shards, dict[int, int]]] = {}
    for split in read_summary(shards)["splits"]:
        one = open_shards(shards, split)
        opened[split] = one, {identity: place for place, identity in enumerate(one.sample_ids.tolist())}

    def look(row: int) -> Image.Image:
        part, places = opened[str(splits[row])]
        pixels = part[places[int(ids[row])]].image
        return Image.fromarray(displayed(pixels.permute(1, 2, 0).numpy()))

    return look


def gallery_of_folder(
    encoder: ReadyEncoder,
    images: Sequence[tuple[Path, str]],
    *,
    batch_size: int,
    device: str,
    workers: int,
    advance: Callable[[int], None],
) -> tuple[Gallery, list[tuple[str, str]]]:
    """The images of a folder, embedded now.

    Args:
        images: (file, path to show) of each.

    Returns:
        The gallery, and (path to show, reason) of what cannot be read.

    Raises:
        NoGallery: none can be read.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "vectors.parquet"
        rejected = embed_images(
            encoder, images, path, batch_size=batch_size, device=device, workers=workers, advance=advance
        )
        vectors = read_vectors(path) if len(rejected) < len(images) else torch.empty(0, encoder.embedding_size)
    lost = {name for name, _ in rejected}
    kept = [(path, name) for path, name in images if name not in lost]
    if not kept:
        raise NoGallery(f"none of the {len(images):,} images of the gallery can be read")
    names = [name for _, name in kept]
    return _exactly(vectors, names, [label_of(name) for name in names], lambda row: _opened(kept[row][0])), rejected


def read_vectors(path: Path) -> Tensor:
    """The vectors [N, D] of a file that `embed_images` wrote."""
    column = pq.read_table(path, columns=["vector"])["vector"].combine_chunks()
    return torch.from_numpy(column.flatten().to_numpy().reshape(len(column), -1).copy())


@torch.no_grad()
def query_vectors(
    encoder: ReadyEncoder, images: Sequence[Path], device: str, *, crops: Literal[1, 5] = 1, mirror: bool = False
) -> Tensor:
    """[Q, D], each the mean over what is looked at, as of the stage `embed` with these settings.

    Raises:
        UnreadableQuery: names the image that cannot be read, and why.
    """
    place, vectors = find_device(device), []
    encoder.to(place)
    for image in images:
        try:
            views = encoder.looks(image, squares(crops, mirror))
        except (UnreadableImage, OSError) as error:
            raise UnreadableQuery(f"{image}: {getattr(error, 'strerror', None) or error}") from error
        vectors.append(encoder(views.to(place)).float().mean(dim=0).cpu())
    return torch.stack(vectors)


def search(queries: Tensor, gallery: Gallery, count: int) -> Neighbours:
    """The `count` most similar of the gallery, by cosine, of each query [Q, D].

    Raises:
        NoGallery: vectors of another size.
    """
    if queries.shape[1] != gallery.dimension:
        raise NoGallery(
            f"the gallery has vectors of {gallery.dimension} numbers and the encoder makes {queries.shape[1]}: "
            "name features of the same encoder"
        )
    return gallery.nearest(queries, count)


def collage(images: Sequence[Path], gallery: Gallery, found: Neighbours) -> Image.Image:
    """A row for each query: itself, then its neighbours, nearest first, each with its label and similarity."""
    columns, step = 1 + found.index.shape[1], SIDE + GAP
    sheet = Image.new("RGB", (columns * step + GAP, len(images) * (step + CAPTION) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (image, places, similarities) in enumerate(
        zip(images, found.index.tolist(), found.similarity.tolist(), strict=True)
    ):
        top = GAP + row * (step + CAPTION)
        pictures = [(_opened(image), image.name, "query", QUERY)]
        for place, similarity in zip(places, similarities, strict=True):
            name = gallery.labels[place] or gallery.keys[place]
            pictures.append((gallery.look(place), name, f"{similarity:.3f}", OTHER))
        for column, (picture, name, score, colour) in enumerate(pictures):
            left = GAP + column * step
            small = ImageOps.contain(picture, (SIDE, SIDE), _resampling(picture))
            sheet.paste(small, (left + (SIDE - small.width) // 2, top + (SIDE - small.height) // 2))
            draw.rectangle((left - 2, top - 2, left + SIDE + 1, top + SIDE + 1), outline=colour, width=2)
            short = name if len(name) <= SHORT else f"{name[: SHORT - 1]}\N{HORIZONTAL ELLIPSIS}"
            draw.text((left, top + SIDE + 2), f"{short}\n{score}", fill=colour)
    return sheet


def _resampling(picture: Image.Image) -> Image.Resampling:
    """Small pictures keep their pixels."""
    return Image.Resampling.NEAREST if max(picture.size) < SIDE else Image.Resampling.LANCZOS


def _opened(path: Path) -> Image.Image:
    """As it is seen: upright, on white."""
    with Image.open(path) as picture:
        upright = ImageOps.exif_transpose(picture).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")


def distances(similarity: Tensor) -> np.ndarray:
    """Euclidean distances of unit vectors, from cosines."""
    return (2 - 2 * similarity).clamp_min(0).sqrt().numpy()
