"""Figures of a recipe that was run with several seeds: mean and standard deviation, a row for each set of features.

    simclr run configs/few-images.yaml --seed 1
    python -m benchmarks.by_seed few-images

Seconds and peak memory (on the device, else of the whole process) are those of the fine-tuning behind (median over the
seeds, on the machine that ran it): they compare within one table only. Of runs with one seed the last counts.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from pipeline import open_store
from pipeline.records import Record
from pipeline.store import Store

NOTHING = "\N{EN DASH}"
FIGURES = {
    "recall@1": ("recall", "1"),
    "recall@10": ("recall", "10"),
    "MAP@R": ("map_at_r",),
    "EER": ("verification", "eer"),
    "open-set MAP@5": ("open_set", "map", "5"),
    "AUROC of new": ("open_set", "auroc"),
    "linear": ("linear", "top1"),
    "20-NN": ("knn", "20", "top1"),
    "linear, 5% of labels": ("label_curve", "5pct", "top1"),
    "20-NN, 5% of labels": ("label_curve", "5pct", "knn", "20", "top1"),
    "mAP": ("linear", "map"),
    "macro F1": ("linear", "macro_f1"),
}
RARE_FIGURES = {"mAP, rare": "average_precision", "F1, rare": "f1"}
RARE = 3
"""Labels that the fewest training images have, where images have several."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="its name")
    parser.add_argument("--store", type=Path, help="default: $SIMCLR_STORE or ./artifacts")
    arguments = parser.parse_args()
    store = open_store(arguments.store)
    rows = by_features(store, arguments.recipe)
    if not rows:
        print(f"no probe or retrieval of {arguments.recipe} in {store.path}", file=sys.stderr)
        return 2
    there = {name for found in rows.values() for one in found.values() for name in one}
    columns = [name for name in (*FIGURES, *RARE_FIGURES) if name in there]
    print(f"| features | seeds | {' | '.join(columns)} | seconds | MiB |")
    print("|" + " --- |" * (len(columns) + 4))
    # What was not fine-tuned, and so is compared with, comes first.
    for step in sorted(rows, key=lambda step: any("seconds" in one for one in rows[step].values())):
        found = rows[step].values()
        cells = [in_words([one[name] for one in found if name in one]) for name in columns]
        costs = [
            f"{median(values):,.0f}" if (values := [one[name] for one in found if name in one]) else NOTHING
            for name in ("seconds", "mib")
        ]
        print(f"| {step} | {len(found)} | {' | '.join([*cells, *costs])} |")
    return 0


def by_features(store: Store, recipe: str) -> dict[str, dict[int, dict[str, float]]]:
    """By step of the stage `embed`, and by seed: the figures of its probe and of its retrieval.

    Of several probes of one set of features each has a row of its own, by its name.
    """
    rows: dict[str, dict[int, dict[str, float]]] = {}
    steps = [step for one, step in store.names() if one == recipe]
    made = {step: found for step in steps if (found := by_seed(store, recipe, step))}
    users = Counter((stage, features) for stage, features, _ in made.values())
    for step, (stage, features, figures) in made.items():
        row = rows.setdefault(features if users[stage, features] == 1 else step, {})
        for seed, found in figures.items():
            row[seed] = row.get(seed, {}) | found
    return rows


def by_seed(store: Store, recipe: str, step: str) -> tuple[str, str, dict[int, dict[str, float]]] | None:
    """Of a probe or a retrieval: its stage, the step that made its features, and its figures by seed."""
    found: dict[int, dict[str, float]] = {}
    stage, features = "", ""
    for version in store.versions(recipe, step):
        stage = version.stage
        if stage not in ("probe", "retrieve"):
            return None
        record = store.record(stage, version.key, version.digest)
        metrics = json.loads((store.files(stage, version.digest) / "metrics.json").read_text())
        figures = {name: value for name, path in FIGURES.items() if (value := at(metrics, path)) is not None}
        ancestors = [*reversed(store.ancestors(record))]
        features = next(one.step for one in ancestors if one.stage == "embed")
        tuned = next((one for one in ancestors if one.stage == "finetune"), None)
        figures |= of_rare_labels(metrics)
        found[seed_of(store, record)] = figures | ({} if tuned is None else costs_of(tuned))
    return (stage, features, found) if found else None


def costs_of(record: Record) -> dict[str, float]:
    """Seconds in all, and the peak of memory in MiB where it was measured."""
    peaks = [one["peak_memory_bytes"] for one in record.attempts if one.get("peak_memory_bytes")]
    most = max((one["device"] or one["host"] or 0 for one in peaks), default=0)
    return {"seconds": record.seconds} | ({"mib": most / 2**20} if most else {})


def of_rare_labels(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Of a probe of several labels: means over the labels that the fewest training images have, of those in test."""
    if "several_labels" not in metrics:
        return {}
    rows = [row for row in metrics["linear"]["per_class"] if row["average_precision"] is not None and row["train"]]
    return {name: fmean(row[key] for row in rows[:RARE]) for name, key in RARE_FIGURES.items()}


def seed_of(store: Store, record: Record) -> int:
    """That of the run, which stands in its own record or, where it did not matter there, in one before."""
    seeds = [one.seed for one in reversed(store.ancestors(record)) if one.seed is not None]
    return record.seed if record.seed is not None else next(iter(seeds), 0)


def at(metrics: Mapping[str, Any], path: tuple[str, ...]) -> float | None:
    """A value deep inside, if it is there."""
    value: Any = metrics
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def in_words(values: list[float]) -> str:
    """Percent: mean ± standard deviation over seeds."""
    if not values:
        return NOTHING
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):.1f}{spread}"


if __name__ == "__main__":
    sys.exit(main())
