"""Near-duplicates that were found on CIFAR-10, beside the published list of ciFAIR (Barz and Denzler 2020).

    python -m benchmarks.cifar10_duplicates SHARDS LIST LABELS [--sheet FOLDER]

SHARDS is the folder of files of an artifact of the stage `shard` (`simclr show cifar10-cpu/shards` names it), made of
test/<class>/NNNN.jpg numbered in the order of the original set. LIST is meta/duplicates_cifar10.csv of
github.com/cvjena/cifair. LABELS are the test set's labels in its own order, as .npy (`np.save("labels.npy",
torchvision.datasets.CIFAR10(root, train=False).targets)`). A table goes to stderr, a line of JSON to stdout; with
--sheet, pictures of the pairs that are not listed, to be judged by eye.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from stages.images import open_shards
from stages.images.near_duplicates import NEAR_DUPLICATES_FILE

JUDGMENTS = {0: "exact", 1: "near", 2: "very similar"}
PAIRS_ON_A_SHEET, COLUMNS, SIDE = 100, 10, 64

Pair = tuple[float, int, int]
"""Distance, and ids of the image of test and the one of train."""


def keys_by_number(labels: np.ndarray, classes: list[str]) -> list[str]:
    """The key of each test image, in the order of the original set: images are numbered within their class."""
    seen = [0] * len(classes)
    keys = []
    for label in labels.tolist():
        keys.append(f"test/{classes[label]}/{seen[label]:04d}.jpg")
        seen[label] += 1
    return keys


def closest_across(folder: Path) -> dict[str, Pair]:
    """By key of the test image: its closest partner in train."""
    found: dict[str, Pair] = {}
    for row in pq.read_table(folder / NEAR_DUPLICATES_FILE).to_pylist():  # ordered by distance
        if {row["split"], row["other_split"]} == {"train", "test"}:
            test, train = ("", "other_") if row["split"] == "test" else ("other_", "")
            found.setdefault(row[f"{test}key"], (row["distance"], row[f"{test}id"], row[f"{train}id"]))
    return found


def write_sheets(folder: Path, shards: Path, pairs: list[Pair]) -> None:
    """Pairs side by side, the closest first, each with its number and distance."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = {}
    for split in ("train", "test"):
        opened = open_shards(shards, split)
        wanted = np.flatnonzero(np.isin(opened.sample_ids.numpy(), [number for pair in pairs for number in pair[1:]]))
        batch = opened.batch(wanted)
        images = batch.images.permute(0, 2, 3, 1).numpy()
        pixels |= dict(zip(batch.sample_ids.tolist(), images, strict=True))
    for start in range(0, len(pairs), PAIRS_ON_A_SHEET):
        part = pairs[start : start + PAIRS_ON_A_SHEET]
        width, height = 2 * SIDE + 12, SIDE + 16
        sheet = Image.new("RGB", (COLUMNS * width, -(-len(part) // COLUMNS) * height), "white")
        draw = ImageDraw.Draw(sheet)
        for place, (distance, *ids) in enumerate(part):
            left, top = place % COLUMNS * width, place // COLUMNS * height
            for side, number in enumerate(ids):
                image = Image.fromarray(pixels[number]).resize((SIDE, SIDE), Image.Resampling.NEAREST)
                sheet.paste(image, (left + side * SIDE, top))
            draw.text((left + 2, top + SIDE + 2), f"{start + place} {distance:.3f}", fill="black")
        sheet.save(folder / f"unlisted-{start // PAIRS_ON_A_SHEET}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("list", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("--sheet", type=Path, metavar="FOLDER")
    given = parser.parse_args()
    keys = keys_by_number(np.load(given.labels, allow_pickle=False), open_shards(given.shards, "test").classes)
    judged: dict[str, int] = {}
    for row in csv.DictReader(given.list.read_text().splitlines()):
        key, judgment = keys[int(row["TestID"])], int(row["Judgment"])
        judged[key] = min(judgment, judged.get(key, judgment))
    found = closest_across(given.shards)
    figures: dict[str, object] = {"found": len(found), "listed": len(judged), "both": len(found.keys() & judged.keys())}
    for judgment, name in JUDGMENTS.items():
        listed = {key for key, one in judged.items() if one == judgment}
        figures[name] = {"listed": len(listed), "found": len(listed & found.keys())}
    unlisted = sorted(pair for key, pair in found.items() if key not in judged)
    figures["unlisted"] = len(unlisted)
    for name, value in figures.items():
        print(f"{name:<14}{value}", file=sys.stderr)
    if given.sheet:
        write_sheets(given.sheet, given.shards, unlisted)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
