"""SimCLR as published, and as lightly does it, at 4 epochs of CIFAR-10: trials of its settings, one after another.

    python -m benchmarks.tuning --data data/cifar10 --keep FOLDER

So that the peer of benchmarks/learn.py runs at its best settings, after as many trials as the fast recipe had. Each
setting in turn is tried at some values with the others at the best so far; best is the linear probe on a fifth of train
that is held out (every fifth file of a class). A trial trains for one epoch, by our stage with the fused views, since
lightly would take several times as long for the same arithmetic. Test images are never read. Finished trials are kept
in FOLDER, and it goes on from there.

Then the length of the fast recipe, on the same images: the fewest steps of which one training is a point better than
the settings found are at all of their epochs. And what some of its settings are worth.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import yaml

from benchmarks import lightly_simclr
from benchmarks.harness import existing_folder
from benchmarks.image_files import cut
from benchmarks.learn import EPOCHS, RECIPES, TUNED, once, pack, train_ours

HELD_OUT = 5
PROBED_PER_CLASS = 1500
"""Training images that the probe of a trial is fitted on."""
COMMON = {"simclr.epochs": "1", "views.engine": "fused"}
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
LENGTHS = (640, 720, 800, 880, 960)
"""Steps of the fast recipe that are tried."""
ABLATIONS = {
    "kornia": {"views.engine": "kornia"},
    "no-warm-up": {"simclr.optimiser.warmup_epochs": "0"},
    "no-decay": {"simclr.optimiser.weight_decay": "0"},
}
"""Of the fast recipe, at the fewest steps: what was not a trial before. They choose nothing."""
MARGIN = 1.0
"""Points of accuracy: about what one seed of the fast recipe differs from another."""

Trial = Callable[[str, str, dict[str, str]], dict[str, float]]
"""Name of the trial, of the recipe, settings that change -> outcome."""


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


def tune(trial: Trial) -> dict[str, str]:
    """The best settings of ROUNDS."""
    best, best_linear, number = PUBLISHED, 0.0, 0
    for round_of_trials in ROUNDS:
        start = best
        for change in round_of_trials:
            settings = start | change
            outcome = trial(f"trial-{number:02d}", "published", COMMON | settings)
            number += 1
            if outcome["linear"] > best_linear:
                best, best_linear = settings, outcome["linear"]
    print(f"{number} trials, best {best_linear:.1f}: {best}", file=sys.stderr)
    return best


def settings_of(recipe: lightly_simclr.Recipe) -> dict[str, str]:
    """What was found before, as settings of our stage: its rates are those of batches of 256."""
    return {
        NAME: "sgd",
        RATE: str(recipe.learning_rate * 256 / recipe.batch_size),
        "simclr.batch_size": str(recipe.batch_size),
        "simclr.temperature": str(recipe.temperature),
        "views.crop_area": f"[{recipe.smallest_crop},1.0]",
    }


def of_length(steps: int) -> dict[str, str]:
    """Settings of the fast recipe; its epochs end later."""
    return {"simclr.max_steps": str(steps), "simclr.epochs": "4"}


def shortest(trial: Trial, best: dict[str, str]) -> tuple[int | None, dict[str, float]]:
    """The first of LENGTHS that is MARGIN above the best settings at all of their epochs; all linear probes by name."""
    goal = trial("peer", "published", COMMON | best | {"simclr.epochs": str(EPOCHS)})["linear"]
    linear = {str(steps): trial(f"fast-{steps}", "fast", of_length(steps))["linear"] for steps in LENGTHS}
    return next((steps for steps in LENGTHS if linear[str(steps)] >= goal + MARGIN), None), {"peer": goal} | linear


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=existing_folder, metavar="DIR", required=True, help="CIFAR-10 as files in train/"
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", required=True, help="where outcomes are kept")
    parser.add_argument(
        "--tuned", action="store_true", help="only lengths, against the settings of benchmarks/learn.py"
    )
    given = parser.parse_args()
    given.keep.mkdir(parents=True, exist_ok=True)
    held = hold_out(given.data, given.keep / "held-out")
    few = given.keep / "probed"
    if not few.is_dir():
        cut(held, few, PROBED_PER_CLASS)
    probed = pack(few, given.keep / "probed-store")

    def trial(name: str, recipe: str, settings: dict[str, str]) -> dict[str, float]:
        changes = [f"{key}={value}" for key, value in settings.items()]
        made_by = {"recipe": yaml.safe_load(RECIPES[recipe].read_text()), "changes": changes}
        work = partial(train_ours, RECIPES[recipe], held, probed, given.keep / "store", 0, changes)
        return once(given.keep / f"{name}.json", made_by, work)

    best = settings_of(TUNED) if given.tuned else tune(trial)
    steps, linear = shortest(trial, best)
    for name, change in ABLATIONS.items():
        linear[name] = trial(f"fast-{name}", "fast", of_length(LENGTHS[0]) | change)["linear"]
    print(json.dumps({"best": best, "steps": steps, "linear": linear}))


if __name__ == "__main__":
    main()
