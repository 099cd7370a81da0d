"""SimCLR as published, and as lightly does it, at 4 epochs of CIFAR-10: trials of its settings, one after another.

    python -m benchmarks.tuning --data data/cifar10 --keep FOLDER

So that the peer of benchmarks/learn.py runs at its best settings, after as many trials as the fast recipe had. Each
setting in turn is tried at some values with the others at the best so far; best is the linear probe on a fifth of train
that is held out (every fifth file of a class). A trial trains for one epoch, by our stage with the fused views, since
lightly would take several times as long for the same arithmetic. Test images are never read. Finished trials are kept
in FOLDER, and it goes on from there.
"""

import argparse
import json
import shutil
import sys
from functools import partial
from pathlib import Path

import yaml

from benchmarks.image_files import cut
from benchmarks.learn import RECIPES, once, pack, train_ours_and_score

HELD_OUT = 5
PROBED_PER_CLASS = 1500
"""Training images that the probe of a trial is fitted on."""
COMMON = ("simclr.epochs=1", "views.engine=fused")
NAME, RATE = "simclr.optimiser.name", "simclr.optimiser.learning_rate"
PUBLISHED = {NAME: "sgd", RATE: "0.12"}
"""Where the search begins: configs/cifar10-cpu.yaml, whose other settings are left as they are."""
ROUNDS: tuple[tuple[dict[str, str], ...], ...] = (
    ({},),
    tuple({RATE: rate} for rate in ("0.06", "0.24", "0.48")),
    tuple({"simclr.temperature": value} for value in ("0.1", "0.15", "0.3", "0.5")),
    tuple({"views.crop_area": f"[{area},1.0]"} for area in ("0.15", "0.2", "0.3")),
    tuple({"simclr.batch_size": size} for size in ("64", "128", "512")),  # the rate follows: scaling is linear
    tuple({"views.colour_strength": value} for value in ("0.25", "1.0")),
    tuple({NAME: "adamw", RATE: rate} for rate in ("1e-3", "3e-3")),
    tuple({NAME: "lars", RATE: rate} for rate in ("1.0", "3.0")),
    tuple({"simclr.optimiser.weight_decay": value} for value in ("1e-5", "5e-4")),
    tuple({NAME: "sgd", RATE: rate} for rate in ("0.03", "0.09")),
)
"""24 trials."""


def hold_out(images: Path, folder: Path) -> Path:
    """Copies: every fifth file of each class of images/train/ in test/, the others in train/."""
    if not folder.is_dir():
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        for place in sorted((images / "train").iterdir()):
            for number, file in enumerate(sorted(place.iterdir())):
                target = part / ("train" if number % HELD_OUT else "test") / place.name / file.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
        part.rename(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", required=True, help="CIFAR-10 as files in train/")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", required=True, help="where outcomes are kept")
    given = parser.parse_args()
    given.keep.mkdir(parents=True, exist_ok=True)
    held = hold_out(given.data, given.keep / "held-out")
    few = given.keep / "probed"
    if not few.is_dir():
        cut(held, few, PROBED_PER_CLASS)
    probed = pack(few, given.keep / "probed-store")
    best, best_linear, number = PUBLISHED, 0.0, 0
    for trials in ROUNDS:
        start = best
        for trial in trials:
            settings = start | trial
            changes = [*COMMON, *(f"{name}={value}" for name, value in settings.items())]
            made_by = {"recipe": yaml.safe_load(RECIPES["published"].read_text()), "changes": changes}
            work = partial(train_ours_and_score, RECIPES["published"], held, probed, given.keep / "store", 0, changes)
            outcome = once(given.keep / f"trial-{number:02d}.json", made_by, work)
            number += 1
            if outcome["linear"] > best_linear:
                best, best_linear = settings, outcome["linear"]
    print(f"{number} trials, best {best_linear:.1f}: {best}", file=sys.stderr)
    print(json.dumps({"best": best, "linear": best_linear}))


if __name__ == "__main__":
    main()
