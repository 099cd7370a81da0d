"""From the bytes of an image file to the bytes that a shard stores."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from stages.images.decode import Decoded, capped_size, decode
from stages.images.reading import MAX_PIXELS, Reading, WindowUse
from stages.images.tiles import Corner, Tile, tile_corners

SUBSAMPLINGS = {"Gray": "420"} | {name: name for name in ("444", "422", "420", "440", "411")}
"""Chroma subsampling of a JPEG that is encoded again, by that of its source; else none."""


@dataclass(frozen=True)
class Storage:
    """How images are stored.

    Attributes:
        max_short_side, max_long_side: caps in pixels; larger images are scaled down to fit both. Not for tiles.
        jpeg_quality: of JPEG images that are encoded again, 1 to 100.
        background: RGB under transparent pixels.
        channels, window, max_pixels: see Reading.
        tile: what larger images are cut into.
    """

    max_short_side: int
    max_long_side: int
    jpeg_quality: int
    background: tuple[int, int, int]
    channels: int = 3
    window: tuple[float, float] | None = None
    tile: Tile | None = None
    max_pixels: int = MAX_PIXELS

    @cached_property
    def reading(self) -> Reading:
        """How images are decoded for this storage."""
        return Reading(self.background, self.channels, self.window, self.max_pixels)


class Stored(NamedTuple):
    """An image as a shard holds it.

    Attributes:
        content: the bytes, `jpg`, `png` or `npy` by `format`.
        pixels: uint8 [H, W, C], what `content` decodes to.
        is_copied: the source's own bytes.
        window_use: of the source, where a window was for it; of several tiles the first has it.
    """

    content: bytes
    format: str
    pixels: np.ndarray
    is_copied: bool
    window_use: WindowUse | None = None


def encode(content: bytes, storage: Storage) -> Stored:
    """Make an image fit for a shard: upright, of the channels wanted, within the caps.

    A JPEG that is all this already is copied. Another RGB JPEG is encoded again with its own chroma subsampling; all
    else is stored without loss.

    Raises:
        UnreadableImage: with a short reason.
    """
    caps = storage.max_short_side, storage.max_long_side
    image = decode(content, storage.reading, caps)
    size = image.pixels.shape[0], image.pixels.shape[1]
    height, width = capped_size(*size, *caps)
    if (height, width) == size:
        return _store_whole(content, image, storage)
    return _store(resized(image.pixels, height, width), image, storage)


def encode_samples(content: bytes, storage: Storage) -> Iterator[tuple[Corner | None, Stored]]:
    """The samples that an image becomes: itself, or its tiles with their corners.

    Tiles are not scaled. Those of a JPEG become JPEG, as everything from a JPEG does: at quality 95 they are as many
    bytes as their share of the source, at 45 dB from its pixels, where PNG takes three times that (56 photographs).

    Raises:
        UnreadableImage: with a short reason, before the first sample.
    """
    if storage.tile is None:
        yield None, encode(content, storage)
        return
    image = decode(content, storage.reading)
    height, width = image.pixels.shape[:2]
    if max(height, width) <= storage.tile.size:
        yield None, _store_whole(content, image, storage)
        return
    for top, left in tile_corners(height, width, storage.tile):
        pixels = image.pixels[top : top + storage.tile.size, left : left + storage.tile.size]
        yield (top, left), _store(pixels, image, storage)
        image = image._replace(window_use=None)  # or it would count once for each tile


def resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, C] -> uint8 [height, width, C], each channel by itself, by Lanczos's kernel."""
    if pixels.shape[2] == 3:
        return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))
    planes = [
        np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.LANCZOS))
        for plane in np.ascontiguousarray(pixels.transpose(2, 0, 1))
    ]
    return np.stack(planes, axis=2)


def _store_whole(content: bytes, image: Decoded, storage: Storage) -> Stored:
    if image.is_exact:
        return Stored(content, "jpg", image.pixels, is_copied=True)
    return _store(image.pixels, image, storage)


def _store(pixels: np.ndarray, image: Decoded, storage: Storage) -> Stored:
    """Encode pixels that were made of `image`."""
    pixels = np.ascontiguousarray(pixels)
    if image.is_jpeg and storage.channels == 3:
        subsampling = SUBSAMPLINGS.get(image.subsampling, "444")
        jpeg = simplejpeg.encode_jpeg(pixels, storage.jpeg_quality, "RGB", colorsubsampling=subsampling)
        return Stored(jpeg, "jpg", simplejpeg.decode_jpeg(jpeg, "RGB"), is_copied=False)
    file = io.BytesIO()
    if storage.channels in (1, 3):
        Image.fromarray(pixels if storage.channels == 3 else pixels[..., 0]).save(file, "PNG")
        return Stored(file.getvalue(), "png", pixels, is_copied=False, window_use=image.window_use)
    np.lib.format.write_array(file, pixels, version=(1, 0), allow_pickle=False)
    return Stored(file.getvalue(), "npy", pixels, is_copied=False, window_use=image.window_use)
