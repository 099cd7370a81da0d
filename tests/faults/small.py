"""A recipe with every stage on a few tiny images, of which a step takes tenths of a second; and what it wrote."""

import hashlib
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from faults.zygote import Zygote

CLASSES, TRAIN_IMAGES, TEST_IMAGES = 3, 20, 5
"""Images of each class."""

INTERVAL = 3
"""Steps from one checkpoint to the next."""

RECIPE = """
name: small
seed: 3
steps:
  shards: {stage: shard, source: "folder:images", images_per_shard: 40}
  views: {stage: augment, shards: shards, preset: text, image_size: 8, contact_sheet_images: 1}
  simclr:
    stage: pretrain
    shards: shards
    views: views
    architecture: {backbone: resnet10, width: 4}
    projector: {layers: 2, hidden: 8, dimension: 4}
    optimiser: {name: sgd, learning_rate: 0.1, warmup_epochs: 1}
    epochs: 2
    batch_size: 12
    record_every_steps: 2
    checkpoint_every_steps: INTERVAL
  tuned:
    stage: finetune
    shards: shards
    views: views
    encoder: simclr
    loss: {name: arcface}
    epochs: 2
    batch_size: 12
    record_every_steps: 2
    checkpoint_every_steps: INTERVAL
  features: {stage: embed, shards: shards, encoder: simclr}
  probe:
    stage: probe
    features: features
    penalties: {smallest: 1e-2, largest: 1e0, count: 2}
    label_fractions: [0.5]
    subsets: [1]
    folds: 2
    bootstrap_samples: 100
    neighbours: [5]
  found: {stage: retrieve, features: features, bootstrap_samples: 100}
  given:
    stage: pseudo_label
    features: features
    label_fraction: 0.5
    folds: 2
    penalties: {smallest: 1e-2, largest: 1e0, count: 2}
  report: {stage: report, of: [features], neighbour_queries: 1}
""".replace("INTERVAL", str(INTERVAL))

STAGE_OF: dict[str, str] = {name: values["stage"] for name, values in yaml.safe_load(RECIPE)["steps"].items()}
"""By step, in running order; there is one of each stage."""
STEPS = tuple(STAGE_OF)
TRAINED = ("simclr", "tuned")
STEPS_OF_TRAINING = 10
"""Of each of the two."""


@dataclass(frozen=True)
class Small:
    """The recipe, run once without a fault.

    Attributes:
        folder: with small.yaml and images/; where commands run.
        whole: the store when all is done.
        points: by step, the failpoints that its command reached, in that order.
        seconds: by step, how long its command took.
        after: by step, `contents` of the store when it was done.
        samples: by step that trains, the ids of the samples of each of its steps of training.
    """

    folder: Path
    whole: Path
    points: dict[str, list[str]]
    seconds: dict[str, float]
    after: dict[str, dict[str, str]]
    samples: dict[str, list[list[int]]]
    _before: Path

    def store_before(self, step: str, name: str) -> Path:
        """A store of its own, new in `folder`, in which all steps before this one are done."""
        store = self.folder / name
        shutil.rmtree(store, ignore_errors=True)
        shutil.copytree(self._before / step, store)
        return store


def make_small(zygote: Zygote, folder: Path) -> Small:
    """Run the recipe, a step at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_images(folder / "images")
    (folder / "small.yaml").write_text(RECIPE)
    whole, before = folder / "whole", folder / "before"
    whole.mkdir()
    one = Small(folder, whole, {}, {}, {}, {}, before)
    for step in STEPS:
        shutil.copytree(whole, before / step)
        started = time.monotonic()
        command, log = run_of(step, whole), folder / f"samples-{step}"
        code, said = zygote.run(command, folder, prelude=("log_samples", str(log)) if step in TRAINED else ())
        assert code == 0, said
        one.seconds[step] = time.monotonic() - started
        one.after[step] = contents(whole)
        if step in TRAINED:
            one.samples[step] = [taken.samples for taken in read_samples(log)]
            assert len(one.samples[step]) == STEPS_OF_TRAINING
        # Once more, since to watch takes time.
        counted, log = one.store_before(step, "counted"), folder / f"points-{step}"
        code, said = zygote.run(run_of(step, counted), folder, prelude=("log_points", str(log)))
        assert code == 0, said
        assert contents(counted) == one.after[step], "two runs without a fault wrote different bytes"
        one.points[step] = log.read_text().split()
        shutil.rmtree(counted)
    return one


@dataclass(frozen=True)
class Taken:
    """A step of training that a process took."""

    process: int
    step: int
    samples: list[int]


def read_samples(log: Path) -> list[Taken]:
    """What the prelude `log_samples` wrote."""
    return [Taken(*json.loads(line)) for line in log.read_text().splitlines()] if log.is_file() else []


def run_of(step: str, store: Path) -> list[str]:
    """The arguments of the command."""
    return ["run", "small.yaml", step, "--store", str(store)]


def contents(store: Path) -> dict[str, str]:
    """What a store holds that must not depend on how often a run was killed: sha256 by path, of all files of all
    artifacts, and what every name and every key points at.
    """
    found = {}
    for path in sorted(store.glob("builds/**/*")):
        if path.is_file():
            found[path.relative_to(store).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in [*sorted(store.glob("names/*/*/*")), *sorted(store.glob("runs/*/*/current.json"))]:
        if not path.name.startswith("."):
            found[path.relative_to(store).as_posix()] = json.loads(path.read_bytes())["digest"]
    return found


def record(store: Path, stage: str) -> dict[str, Any]:
    """The one record of a stage."""
    records = [path for path in store.glob(f"runs/{stage}/*/*.json") if path.name != "current.json"]
    assert len(records) == 1, records
    return json.loads(records[0].read_bytes())


def _write_images(root: Path) -> None:
    digits: Any = load_digits()
    for label in range(CLASSES):
        images = digits.images[digits.target == label].astype(np.uint8) * 15
        for number, image in enumerate(images[: TRAIN_IMAGES + TEST_IMAGES]):
            path = root / ("train" if number < TRAIN_IMAGES else "test") / str(label) / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
