"""From the bytes of an image file to the bytes that a shard stores."""

import io
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from stages.images.decode import capped_size, decode

SUBSAMPLINGS = {"Gray": "420"} | {name: name for name in ("444", "422", "420", "440", "411")}
"""Chroma subsampling of a JPEG that is encoded again, by that of its source; else none."""


@dataclass(frozen=True)
class Storage:
    """How images are stored.

    Attributes:
        max_short_side, max_long_side: caps in pixels; larger images are scaled down to fit both.
        jpeg_quality: of JPEG images that are encoded again, 1 to 100.
        background: RGB under transparent pixels.
    """

    max_short_side: int
    max_long_side: int
    jpeg_quality: int
    background: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Stored:
    """An image as a shard holds it.

    Attributes:
        content: the bytes, `jpg` or `png` by `format`.
        pixels: uint8 [H, W, 3], what `content` decodes to.
        is_copied: the source's own bytes.
    """

    content: bytes
    format: str
    pixels: np.ndarray
    is_copied: bool


def encode(content: bytes, storage: Storage) -> Stored:
    """Make an image fit for a shard: upright, RGB, within the caps.

    A JPEG that is all this already is copied. Another JPEG is encoded again with its own chroma subsampling; what is
    not a JPEG becomes PNG, so that lossless stays lossless.

    Raises:
        UnreadableImage: with a short reason.
    """
    caps = storage.max_short_side, storage.max_long_side
    image = decode(content, storage.background, caps)
    size = image.pixels.shape[0], image.pixels.shape[1]
    height, width = capped_size(*size, *caps)
    is_within = (height, width) == size
    if image.is_exact and is_within:
        return Stored(content, "jpg", image.pixels, is_copied=True)
    pixels = image.pixels
    if not is_within:
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))
    if not image.is_jpeg:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return Stored(file.getvalue(), "png", pixels, is_copied=False)
    subsampling = SUBSAMPLINGS.get(image.subsampling, "444")
    jpeg = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), storage.jpeg_quality, "RGB", colorsubsampling=subsampling
    )
    return Stored(jpeg, "jpg", simplejpeg.decode_jpeg(jpeg, "RGB"), is_copied=False)
