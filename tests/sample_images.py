"""A small folder of images with what image folders have in them, the same one each time."""

from pathlib import Path

import numpy as np
from PIL import Image

ORIENTATION_TAG, TURNED = 0x0112, 6  # EXIF: to be shown turned by 90 degrees
LONGEST_COPIED = 120
"""Pixels: every image but train/leaf/large.jpg is as long or shorter."""


def write_images(root: Path) -> None:
    """Ten files in train/ and test/ of two classes, one of them broken."""
    for folder in ("train/leaf", "train/stone", "test/leaf", "test/stone"):
        (root / folder).mkdir(parents=True)
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = TURNED
    # JPEG images that a shard copies, and those that it has to decode and encode.
    _picture(1, 120, 90).save(root / "train/leaf/copied.jpg", quality=90)
    _picture(2, 90, 120).save(root / "train/stone/copied.jpg", quality=85, subsampling=0)
    _picture(3, 100, 80).save(root / "test/leaf/copied.jpg", quality=95)
    _picture(4, 110, 70).convert("L").save(root / "train/stone/grey.jpg", quality=90)
    _picture(5, 120, 80).save(root / "train/leaf/turned.jpg", quality=90, exif=exif)
    _picture(6, 300, 200).save(root / "train/leaf/large.jpg", quality=90)
    # Images without loss: half transparent, with a palette, plain.
    glass = _picture(7, 80, 100)
    glass.putalpha(Image.fromarray(np.tile(np.arange(80, dtype=np.uint8) * 3, (100, 1))))
    glass.save(root / "train/stone/glass.png")
    _palette(8, 64, 64).save(root / "train/leaf/palette.png")
    _picture(9, 40, 30).save(root / "test/stone/plain.png")
    (root / "train/stone/broken.jpg").write_bytes(b"no image")


def _picture(seed: int, width: int, height: int) -> Image.Image:
    """Coloured squares under a fine texture. Made of whole numbers only, so that no library's version matters."""
    random = np.random.default_rng(seed)
    squares = random.integers(30, 226, (1 + height // 10, 1 + width // 10, 3))
    smooth = np.kron(squares, np.ones((10, 10, 1), dtype=np.int64))[:height, :width]
    texture = random.integers(-30, 31, (height, width, 1))
    return Image.fromarray((smooth + texture).astype(np.uint8))


def _palette(seed: int, width: int, height: int) -> Image.Image:
    random = np.random.default_rng(seed)
    image = Image.fromarray(random.integers(0, 16, (height, width), dtype=np.uint8), "L")
    image.putpalette(random.integers(0, 256, 48).tolist())
    return image
