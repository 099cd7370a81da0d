"""Whether an encoder learns as much from the fused engine's views as from Kornia's: paired trainings, probed alike.

    python -m benchmarks.engines [--quick] [--data data/cifar10]

Both engines take the same draws; what differs is colour: hue as a rotation, and no clamping between the operators. For
each seed the two trainings have the same initial weights, order and draws, so that their difference is the engine's.
Digits: configs/digits.yaml to its linear probe. CIFAR-10: configs/cifar10-cpu.yaml on a part of the images, one class
after another (made images cannot show anything here, so that without CIFAR-10 there are digits only). The difference is
given with its 95% interval (Student's t over the seeds), in points of test accuracy.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import t as student

from benchmarks.harness import Comparison, Row, arguments, report, simclr
from benchmarks.image_files import cifar10, cut

ENGINES = ("kornia", "fused")
IMAGES_PER_CLASS = 1000
"""Of CIFAR-10, for training and for test."""


def accuracy(recipe: str, store: Path, seed: int, engine: str, changes: Sequence[str]) -> tuple[float, float]:
    """Linear probe and 20 nearest neighbours after one training, in percent."""
    overrides = [word for one in (f"views.engine={engine}", *changes) for word in ("--set", one)]
    simclr("run", f"configs/{recipe}.yaml", "probe", "--seed", seed, "--store", store, *overrides)
    shown = simclr("show", f"{recipe}/probe@latest", "--store", store, "--json")
    metrics = json.loads(shown)["metrics"]
    return 100 * metrics["linear"]["top1"], 100 * metrics["knn"]["20"]["top1"]


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean, by Student's t."""
    half = student.ppf(0.975, len(differences) - 1) * stdev(differences) / len(differences) ** 0.5
    return mean(differences) - half, mean(differences) + half


def main() -> None:
    given = arguments(__doc__, on_host=True)
    seeds = range(2) if given.quick else range(5)
    comparison = Comparison("engines", "% linear", "digits", runs=len(seeds))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cases: dict[str, tuple[str, list[str]]] = {"digits": ("digits", ["simclr.epochs=3"] if given.quick else [])}
        images = cifar10(given.data)
        if images and not given.quick:
            part = cut(images, folder / "part", IMAGES_PER_CLASS)
            cases["cifar10"] = ("cifar10-cpu", [f"shards.source=folder:{part}", "shards.near_duplicates=false"])
        for case, (recipe, changes) in cases.items():
            results = {
                engine: [accuracy(recipe, folder / "store", seed, engine, changes) for seed in seeds]
                for engine in ENGINES
            }
            for which, unit in enumerate(("% linear", "% by 20 neighbours")):
                by_engine = {engine: [one[which] for one in pairs] for engine, pairs in results.items()}
                differences = [b - a for a, b in zip(by_engine["kornia"], by_engine["fused"], strict=True)]
                low, high = interval(differences)
                values = {"ours": mean(by_engine["fused"]), "kornia engine": mean(by_engine["kornia"]),
                          "difference": mean(differences), "from": low, "to": high}  # fmt: skip
                comparison.rows.append(Row(case, values, unit=unit))
            lowest = comparison.rows[-2].values["from"]
            comparison.notes.append(f"{case}: linear not worse than by {-lowest:.2f} points at 95% (wanted: 0.5)")
    report(comparison)


if __name__ == "__main__":
    main()
