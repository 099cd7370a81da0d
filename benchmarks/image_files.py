"""Folders of images for benchmarks: a part of one that is given, or made ones, about as compressible as photographs."""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 10


def pixels(seed: int, height: int, width: int) -> np.ndarray:
    """Smooth colours under a fine texture, uint8 [height, width, 3], the same for the same seed."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    texture = random.normal(0, 12, (height, width, 1))
    return np.clip(smooth + texture, 0, 255).astype(np.uint8)


def write_jpegs(folder: Path, count: int, height: int, width: int) -> Path:
    """`count` JPEG files in folder/<class>/; returns the folder."""
    for number in range(count):
        path = folder / f"class{number % CLASSES}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(number, height, width)).save(path, quality=90)
    return folder


def cut(images: Path, folder: Path, most_per_class: int) -> Path:
    """Copies of the first images of each class of images/{train,test}/<class>/; returns the folder."""
    for split in ("train", "test"):
        for place in sorted((images / split).iterdir()):
            (folder / split / place.name).mkdir(parents=True)
            for file in sorted(place.iterdir())[:most_per_class]:
                shutil.copyfile(file, folder / split / place.name / file.name)
    return folder
