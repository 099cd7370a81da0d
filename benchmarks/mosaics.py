"""Mosaics of scikit-learn's digits: images with several labels each, some of them rare.

    python -m benchmarks.mosaics data/mosaics
    simclr run configs/several-labels.yaml

Each of 16 x 16 pixels holds four handwritten digits; 0 is drawn most often, each next one 0.6 times as often as the one
before. Digits of train are not in test.
"""

import argparse
import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


@dataclass(frozen=True)
class Mosaics:
    """Attributes:
    images: uint8 [N, 16, 16], two by two digits.
    targets: bool [N, 10], which digits an image holds.
    groups: int64 [N]; images of one group are made of the same four digits, in other places.
    """

    images: np.ndarray
    targets: np.ndarray
    groups: np.ndarray

    @property
    def pixels(self) -> np.ndarray:
        """[N, 256]."""
        return self.images.reshape(len(self.images), -1).astype(np.float32)

    @property
    def label_lists(self) -> list[list[int]]:
        return [np.flatnonzero(row).tolist() for row in self.targets]


def make_mosaics(count: int, *, decay: float = 0.6, group_size: int = 1, seed: int = 0, part: str = "all") -> Mosaics:
    """Draw four digits an image, each class `decay` times as often as the one before.

    Args:
        group_size: images made of the same four digits.
        part: `train` and `test` are made of digits that the other does not have.
    """
    values, labels = (np.asarray(one) for one in load_digits(return_X_y=True))
    rows = {"all": np.arange(len(labels)), "train": np.arange(0, 1200), "test": np.arange(1200, len(labels))}[part]
    random = np.random.default_rng([seed, len(part)])
    shares = decay ** np.arange(10)
    members = [rows[labels[rows] == one] for one in range(10)]
    images, targets = np.zeros((count, 16, 16), dtype=np.uint8), np.zeros((count, 10), dtype=bool)
    chosen = np.zeros(4, dtype=np.int64)
    for number in range(count):
        if number % group_size == 0:
            chosen = np.array([random.choice(members[one]) for one in random.choice(10, 4, p=shares / shares.sum())])
        targets[number, labels[chosen]] = True
        for place, row in enumerate(random.permutation(chosen)):
            top, left = 8 * (place // 2), 8 * (place % 2)
            images[number, top : top + 8, left : left + 8] = np.minimum(16 * values[row].reshape(8, 8), 255)
    return Mosaics(images, targets, np.arange(count) // group_size)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to, a folder that is not there yet")
    parser.add_argument("--train", type=int, default=3000, help="images of train")
    parser.add_argument("--test", type=int, default=3000, help="images of test")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        print(f"{arguments.folder} is there already", file=sys.stderr)
        return 2
    parts = {part: make_mosaics(getattr(arguments, part), part=part) for part in ("train", "test")}
    table = write_mosaics(arguments.folder, parts, [f"digit {number}" for number in range(10)])
    for part, made in parts.items():
        print(f"{part}: {len(made.images):,} images, of each digit {made.targets.sum(axis=0).tolist()}")
    print(table)
    return 0


def write_mosaics(folder: Path, parts: dict[str, Mosaics], names: list[str]) -> Path:
    """Images and a table with path, labels (`a|b`), split and group; returns the table's path."""
    folder.mkdir(parents=True)
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "labels", "split", "group"])
        for split, mosaics in parts.items():
            for number, (image, row, group) in enumerate(
                zip(mosaics.images, mosaics.targets, mosaics.groups, strict=True)
            ):
                path = f"{split}-{number:04d}.png"
                Image.fromarray(image, "L").save(folder / path)
                listed = "|".join(names[one] for one in np.flatnonzero(row))
                writer.writerow([path, listed, split, f"{split} {group}"])
    return folder / "labels.csv"


if __name__ == "__main__":
    sys.exit(main())
