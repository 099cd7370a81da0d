"""Recall and false pairs of near-duplicates at each distance, where the truth is known; the default was chosen here.

    python -m benchmarks.near_duplicates [--data DIR]

DIR holds photos/ (photographs, any size) and emoji/images/NAME/HAND.png. Squares of photographs, whole and in parts
that do not overlap, are brought to 32x32 pixels. True pairs: each and a variant made from the original, of each kind.
False pairs: parts of different photographs (many of them sky, walls and edges: harder than whole photographs); and
different emoji, which are alike by design. A table goes to stderr, a line of JSON to stdout.
"""

import argparse
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from stages.images.alignment import aligned_distances
from stages.images.fingerprints import descriptors, thumbnails
from stages.images.similar_pairs import similar_pairs

SIDE = 32
PARTS = 4
"""A photograph's short side is cut into so many."""
VARIED = 600
DISTANCES = tuple(step / 20 for step in range(1, 11))
MOST_FALSE = 1e-6
"""Of the pairs of parts of different photographs; the default is the largest distance that takes no larger share."""
FILTERS = (Image.Resampling.BICUBIC, Image.Resampling.LANCZOS, Image.Resampling.BOX, Image.Resampling.BILINEAR)


class Scene(NamedTuple):
    """A square of a photograph: its upper left corner and side."""

    photo: Image.Image
    number: int
    left: int
    top: int
    side: int

    def cut(self) -> Image.Image:
        return self.photo.crop((self.left, self.top, self.left + self.side, self.top + self.side))


def scenes(folder: Path) -> list[Scene]:
    """The middle square of each photograph, and its parts."""
    found = []
    for number, path in enumerate(sorted(folder.iterdir())):
        photo = Image.open(path).convert("RGB")
        short = min(photo.size)
        found.append(Scene(photo, number, (photo.width - short) // 2, (photo.height - short) // 2, short))
        side = short // PARTS
        if side >= 2 * SIDE:
            corners = [
                (left, top)
                for left in range(0, photo.width - side + 1, side)
                for top in range(0, photo.height - side + 1, side)
            ]
            found += [Scene(photo, number, left, top, side) for left, top in corners]
    return found


def render(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """At 32x32 pixels by one of four filters, through JPEG of a quality from 80 to 95."""
    return compress(image.resize((SIDE, SIDE), FILTERS[random.integers(4)]), int(random.integers(80, 96)))


def compress(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def crop(image: Image.Image, random: np.random.Generator, most: float) -> Image.Image:
    """Without up to `most` of 32 pixels at each side."""
    left, top, right, bottom = random.uniform(0, most, 4) * image.width / SIDE
    return image.crop((round(left), round(top), round(image.width - right), round(image.height - bottom)))


def shifted(scene: Scene, random: np.random.Generator) -> Image.Image:
    """The square moved by up to 3 of 32 pixels, inside its photograph."""
    right, down = random.uniform(-3, 3, 2) * scene.side / SIDE
    left = min(max(round(scene.left + right), 0), scene.photo.width - scene.side)
    top = min(max(round(scene.top + down), 0), scene.photo.height - scene.side)
    return scene._replace(left=left, top=top).cut()


def scaled(image: Image.Image, random: np.random.Generator) -> Image.Image:
    border = round(random.uniform(0.5, 1.5) * image.width / SIDE)
    return ImageOps.crop(image, border)


def lit(image: Image.Image, random: np.random.Generator) -> Image.Image:
    contrasted = ImageEnhance.Contrast(image).enhance(random.uniform(0.6, 1.4))
    return ImageEnhance.Brightness(contrasted).enhance(random.uniform(0.7, 1.3))


def coloured(image: Image.Image, random: np.random.Generator) -> Image.Image:
    return ImageEnhance.Color(image).enhance(random.choice([0, 0.4, 1.7]))


def everything(image: Image.Image, random: np.random.Generator) -> Image.Image:
    image = crop(image, random, 2)
    image = ImageOps.mirror(image) if random.random() < 0.5 else image
    return coloured(lit(image, random), random)


Variant = Callable[[Scene, np.random.Generator], Image.Image]
VARIANTS: dict[str, Variant] = {
    "recompressed (quality 30 to 75)": lambda scene, random: compress(
        render(scene.cut(), random), int(random.integers(30, 76))
    ),
    "cropped (0 to 3 px a side)": lambda scene, random: render(crop(scene.cut(), random, 3), random),
    "shifted (up to 3 px)": lambda scene, random: render(shifted(scene, random), random),
    "scaled (3% to 10%)": lambda scene, random: render(scaled(scene.cut(), random), random),
    "brightness and contrast": lambda scene, random: render(lit(scene.cut(), random), random),
    "saturation (0, 0.4, 1.7)": lambda scene, random: render(coloured(scene.cut(), random), random),
    "mirrored": lambda scene, random: render(ImageOps.mirror(scene.cut()), random),
    "crop, mirror, light, colour": lambda scene, random: render(everything(scene.cut(), random), random),
}


def small(images: list[Image.Image]) -> Tensor:
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    return thumbnails(pixels, torch.tensor([[pixels.shape[2], pixels.shape[3]]]).expand(len(pixels), 2))


def pairs_and_distances(first: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates as the stage `shard` finds them, and their distances: three tensors [P]."""
    gallery = None if second is None else descriptors(second)
    found = similar_pairs(descriptors(first), gallery, None, lambda _: None, is_exact=True)
    others = first if second is None else second
    distances = aligned_distances(first[found.query], others[found.gallery], found.is_mirrored)
    return found.query, found.gallery, distances


def true_pairs(found: list[Scene], random: np.random.Generator) -> tuple[dict[str, list[float]], Tensor]:
    """By kind of variant, the share that is found at each distance; and the thumbnails that they were made of."""
    base = small([render(scene.cut(), random) for scene in found])
    whole = [place for place, scene in enumerate(found) if scene.side == min(scene.photo.size)]
    parts = np.setdiff1d(np.arange(len(found)), whole)
    varied = np.concatenate([whole, random.permutation(parts)[: VARIED - len(whole)]])
    recall = {}
    for kind, variant in VARIANTS.items():
        queries = small([variant(found[place], random) for place in varied])
        query, gallery, distances = pairs_and_distances(queries, base)
        is_true = gallery == torch.from_numpy(varied)[query]
        reached = torch.ones(len(varied), dtype=torch.float64)
        reached.scatter_reduce_(0, query[is_true], distances[is_true], "amin")
        recall[kind] = [float((reached <= most).double().mean()) for most in DISTANCES]
    return recall, base


def false_pairs(base: Tensor, same: np.ndarray) -> tuple[list[int], int]:
    """How many pairs of images that have nothing to do with one another are taken at each distance, and of how many.

    Args:
        same: int [N]; images of equal numbers are left out.
    """
    query, gallery, distances = pairs_and_distances(base, None)
    numbers = torch.from_numpy(same)
    is_false = numbers[query] != numbers[gallery]
    closest: dict[tuple[int, int], float] = {}
    for one, other, distance in zip(
        query[is_false].tolist(), gallery[is_false].tolist(), distances[is_false].tolist(), strict=True
    ):
        closest[one, other] = min(distance, closest.get((one, other), 2.0))
    _, counts = np.unique(same, return_counts=True)
    pairs = (len(same) ** 2 - int((counts**2).sum())) // 2
    return [sum(distance <= most for distance in closest.values()) for most in DISTANCES], pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR")
    data: Path = parser.parse_args().data
    started = time.monotonic()
    found = scenes(data / "photos")
    recall, base = true_pairs(found, np.random.default_rng(0))
    photos = np.array([scene.number for scene in found])
    is_whole = np.array([scene.side == min(scene.photo.size) for scene in found])
    taken = {
        "parts of different photographs": false_pairs(base, photos),
        "whole photographs": false_pairs(base[torch.from_numpy(is_whole)], photos[is_whole]),
    }
    for hand in sorted({path.stem for path in (data / "emoji").rglob("*.png")}):
        files = sorted((data / "emoji").rglob(f"{hand}.png"))
        drawings = [Image.open(path).convert("RGBA").resize((SIDE, SIDE), FILTERS[0]) for path in files]
        on_white = [Image.alpha_composite(Image.new("RGBA", one.size, "white"), one).convert("RGB") for one in drawings]
        taken[f"different emoji, {hand}"] = false_pairs(small(on_white), np.arange(len(files)))
    counts, pairs = taken["parts of different photographs"]
    chosen = max(
        (most for most, count in zip(DISTANCES, counts, strict=True) if count <= MOST_FALSE * pairs), default=0
    )
    print(f"{'distance':<36}" + "".join(f"{most:>8.2f}" for most in DISTANCES), file=sys.stderr)
    for kind, shares in recall.items():
        print(f"{kind:<36}" + "".join(f"{share:>8.1%}" for share in shares), file=sys.stderr)
    print("taken of false pairs:", file=sys.stderr)
    for name, (numbers, total) in taken.items():
        print(f"{name:<36}" + "".join(f"{one:>8,}" for one in numbers) + f"  of {total:,}", file=sys.stderr)
    print(f"at most {MOST_FALSE * 1e6:g} in a million: {chosen}", file=sys.stderr)
    figures = {"distances": DISTANCES, "recall": recall, "false": taken, "chosen": chosen}
    print(json.dumps(figures | {"seconds": round(time.monotonic() - started, 1), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
