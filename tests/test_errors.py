"""Every error that a user can mend: one clear line (what, where, how), the exit code of its kind, and nothing lost.

Each is provoked for real, on the real stages, and met as a user meets it: by the command line.
"""

import json
import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from pipeline import cli
from pipeline.store import Store

RECIPE = """
name: toy
steps:
  shards:   {{stage: shard, source: "folder:{images}", test_fraction: 0.25, max_rejected: 0.05}}
  views:    {{stage: augment, shards: shards, image_size: 8, contact_sheet_images: 1}}
  simclr:   {{stage: pretrain, shards: shards, views: views, architecture: &tiny {{backbone: resnet10, width: 4}},
              projector: {{hidden: 8, dimension: 4}}, epochs: 1, batch_size: 4, device: cpu}}
  features: {{stage: embed, shards: shards, encoder: simclr, device: cpu}}
  random:   {{stage: embed, shards: shards, encoder: random, architecture: *tiny, image_size: 8, device: cpu}}
  probe:    {{stage: probe, features: features, label_fractions: [], subsets: [], bootstrap_samples: 100}}
"""
DONE = 24
"""Images of the folder, of two classes."""


def write_images(root: Path, classes: dict[str, int]) -> None:
    random = np.random.default_rng(0)
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 256, (9, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, a recipe, and a store in which it ran to its end."""
    folder = tmp_path_factory.mktemp("errors")
    write_images(folder / "images", {"leaf": DONE // 2, "stone": DONE // 2})
    (folder / "toy.yaml").write_text(RECIPE.format(images=folder / "images"))
    arguments = ["run", str(folder / "toy.yaml"), "--store", str(folder / "artifacts")]
    assert cli.guarded(lambda: cli.app(arguments, standalone_mode=False)) == 0
    return folder


@dataclass
class World:
    """A folder of one's own with a recipe, its images, and a store in which it ran to its end."""

    folder: Path
    patch: pytest.MonkeyPatch
    capture: pytest.CaptureFixture[str]
    out: str = ""
    err: str = ""
    after: Callable[[], None] = lambda: None
    """Takes back what a test did to the process."""

    def run(self, *arguments: str) -> int:
        """Give a command; returns its exit code."""
        code = cli.guarded(lambda: cli.app([*arguments], standalone_mode=False))
        self.out, self.err = self.capture.readouterr()
        return code

    @property
    def store(self) -> Store:
        return Store(self.folder / "artifacts")

    def file(self, stage: str, name: str) -> Path:
        """The one file of that name among the artifacts of a stage."""
        (path,) = (self.folder / "artifacts" / "builds" / stage).rglob(name)
        return path

    def artifacts(self) -> dict[str, str]:
        """By reference: digest, of everything in the store."""
        versions = [version for names in self.store.names() for version in self.store.versions(*names)]
        return {version.reference: version.digest for version in versions}

    def damaged(self) -> list[str]:
        versions = [version for names in self.store.names() for version in self.store.versions(*names)]
        return [version.reference for version in versions if self.store.verify_version(version)]

    def recipe(self, **steps: dict[str, object]) -> str:
        """A recipe with these steps more, or instead."""
        data = yaml.safe_load((self.folder / "toy.yaml").read_text())
        data["steps"] |= steps
        (self.folder / "changed.yaml").write_text(yaml.safe_dump(data))
        return "changed.yaml"


@pytest.fixture
def world(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> World:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "toy.yaml").write_text(RECIPE.format(images=tmp_path / "images"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SIMCLR_STORE", raising=False)
    capsys.readouterr()
    return World(tmp_path, monkeypatch, capsys)


def settings(*overrides: str) -> Callable[[World], list[str]]:
    """The recipe with other settings."""
    return lambda _: ["run", "toy.yaml", *(word for one in overrides for word in ("--set", one))]


def steps(**changed: dict[str, object]) -> Callable[[World], list[str]]:
    """The recipe with other steps."""
    return lambda world: ["run", world.recipe(**changed)]


def empty_folder(world: World) -> list[str]:
    (world.folder / "empty").mkdir()
    return ["run", "toy.yaml", "--set", "shards.source=folder:empty"]


def one_class(world: World) -> list[str]:
    write_images(world.folder / "single", {"leaf": 12})
    return ["run", "toy.yaml", "--set", "shards.source=folder:single"]


def table(world: World, *lines: str) -> list[str]:
    (world.folder / "table.csv").write_text("\n".join(lines) + "\n")
    return ["run", "toy.yaml", "--set", "shards.source=csv:table.csv"]


def csv_without_the_column(world: World) -> list[str]:
    return [*table(world, "path,kind", "images/leaf/0.png,leaf"), "--set", "shards.columns.label=label"]


def csv_without_images(world: World) -> list[str]:
    return table(world, "kind,number", "leaf,1")


def csv_without_files(world: World) -> list[str]:
    rows = [f"images/leaf/{number}.png,leaf" for number in range(12)]
    return table(world, "path,label", *rows, "images/gone.png,leaf")


def unreadable_images(world: World) -> list[str]:
    for number in range(3):
        (world.folder / "images" / "leaf" / f"broken{number}.png").write_bytes(b"no image")
    return ["run", "toy.yaml"]


def missing_inputs(world: World) -> list[str]:
    return ["run", world.recipe(views={"stage": "augment", "shards": "shardz"})]


def loop(world: World) -> list[str]:
    one: dict[str, object] = {"stage": "pretrain", "shards": "shards", "views": "views"}
    return ["run", world.recipe(first=one | {"encoder": "second"}, second=one | {"encoder": "first"})]


def newer_store(world: World) -> list[str]:
    shutil.copytree(world.folder / "artifacts", world.folder / "newer")
    (world.folder / "newer" / "format.json").write_text('{"format": 99}')
    return ["run", "toy.yaml", "--store", "newer"]


def no_source(world: World) -> list[str]:
    """It was there when the recipe ran."""
    assert world.run("run", "toy.yaml") == 0
    shutil.rmtree(world.folder / "images")
    return ["run", "toy.yaml"]


def full_disk(*overrides: str, limit_bytes: int) -> Callable[[World], list[str]]:
    """No file may grow beyond a limit: a write fails halfway, as on a full disk, whichever library writes."""

    def provoke(world: World) -> list[str]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
        world.after = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
        return settings(*overrides)(world)

    return provoke


def no_memory_on_device(world: World) -> list[str]:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ...")

    world.patch.setattr("stages.pretrain.nt_xent", fail)
    return settings("simclr.epochs=2")(world)


def no_memory_for_arrays(world: World) -> list[str]:
    """A batch of so many images that numpy cannot have the memory for their canvas."""
    world.patch.setattr("stages.images.shards.np.zeros", lambda *_, **__: np.ones(2**48))
    return settings("features.batch_size=77")(world)


def changed_artifact(world: World) -> list[str]:
    path = world.file("pretrain", "encoder.safetensors")
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    return ["run", "toy.yaml", "--set", "features.batch_size=7"]


def changed_result(world: World) -> list[str]:
    """Of the last step: nothing is run, and what is damaged is not shown either."""
    world.file("probe", "metrics.json").write_text("{}")
    return ["run", "toy.yaml"]


def other_world_size(world: World) -> list[str]:
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}.items():
        world.patch.setenv(name, value)
    world.patch.setenv("MASTER_ADDR", "127.0.0.1")
    world.patch.setenv("MASTER_PORT", "29999")
    return ["run", "toy.yaml", "--processes", "2"]


FINETUNE: dict[str, object] = {"stage": "finetune", "shards": "shards", "encoder": "simclr"}

# name: how it is provoked, the exit code, words of the one line.
ERRORS: dict[str, tuple[Callable[[World], list[str]], int, tuple[str, ...]]] = {
    "no such folder": (settings("shards.source=folder:gone"), 2, ("folder:gone", "no such folder")),
    "an empty folder": (empty_folder, 2, ("folder:empty", "no files here ending in", ".png")),
    "a file in place of a folder": (
        lambda world: ["run", "toy.yaml", "--set", f"shards.source=folder:{world.folder / 'toy.yaml'}"],
        2,
        ("toy.yaml: is a file; give the folder",),
    ),
    "a folder in place of a table": (
        settings("shards.source=csv:images"), 2, ("csv:images: is a folder; give the file",),
    ),
    "no such recipe": (lambda _: ["run", "gone.yaml"], 2, ("gone.yaml: no such recipe", "digits")),
    "fewer images than the batch": (
        settings("simclr.batch_size=512"),
        2,
        ("simclr.batch_size: 512 is more than the 18 training images", "set it to 18 or less"),
    ),
    "labels missing where a probe needs them": (
        settings("shards.labels=none"),
        6,
        ("probe: no train image has a label", "a folder for each class", "without_labels: pass"),
    ),
    "labels missing where fine-tuning needs them": (
        lambda world: [
            *steps(tuned=FINETUNE | {"loss": {"name": "triplet"}})(world), "tuned", "--set", "shards.labels=none",
        ],
        6,
        ("tuned: ", "label"),
    ),
    "one class where fine-tuning needs two": (
        lambda world: [*steps(tuned=FINETUNE | {"loss": {"name": "triplet"}})(world), "tuned", *one_class(world)[2:]],
        6,
        ("tuned: ", "class"),
    ),
    "one class where a probe needs two": (one_class, 6, ("probe: all 9 training images are 'leaf'", "two classes")),
    "a column that the CSV lacks": (csv_without_the_column, 6, ("table.csv", "'label'", "path, kind")),
    "a CSV without images": (csv_without_images, 6, ("table.csv", "columns.image", "kind, number")),
    "a CSV that names missing files": (csv_without_files, 6, ("images/gone.png", "max_rejected")),
    "unreadable images above the limit": (
        unreadable_images,
        6,
        ("3 of 27 images cannot be used", "leaf/broken0.png", "max_rejected (5.00%)", "Mend or remove them"),
    ),
    "an unknown stage": (
        steps(views={"stage": "augmnt"}), 2, ("views.stage: no stage 'augmnt' (did you mean augment?)",),
    ),
    "an unknown field": (settings("simclr.epoch=3"), 2, ("simclr.epoch: no such setting (did you mean epochs?)",)),
    "an unknown loss": (steps(tuned=FINETUNE | {"loss": {"name": "arcfase"}}), 2, ("tuned.loss", "arcface", "arcfase")),
    "an unknown ResNet": (
        settings("simclr.architecture.backbone=resnet81"), 2, ("simclr.architecture", "10, 18, 34, 50, 101, 152"),
    ),
    "an unknown backbone": (
        settings("simclr.architecture={backbone: mobilenet_v4_small}"),
        2,
        ("simclr: no backbone 'mobilenet_v4_small'; nearest: mobilenet_v3_small",),
    ),
    "an unknown model of timm": (settings("random.encoder=timm:resnet81"), 2, ("random: no backbone", "timm:resnet18")),
    "a step that names a missing input": (
        missing_inputs, 2, ("views.shards: no such step: shardz (did you mean shards?)",),
    ),
    "a loop of steps": (loop, 2, ("steps that wait for one another in a loop: first, second",)),
    "a store of a newer format": (newer_store, 2, ("newer: the store has format 99", "upgrade simclr-pipeline")),
    "a source that is gone": (
        no_source, 2, ("no such folder", "in the store still", "--set views.shards=toy/shards@v1 "),
    ),
    "a full disk while images are packed": (
        full_disk("shards.images_per_shard=23", limit_bytes=4096), 7, ("shards: the disk is full", "free some space"),
    ),
    "a full disk while weights are written": (
        full_disk("simclr.epochs=2", limit_bytes=40_000), 7, ("simclr: the disk is full", "free some space"),
    ),
    "a full disk while features are written": (
        full_disk("features.batch_size=7", limit_bytes=4096), 7, ("features: the disk is full", "free some space"),
    ),
    "no memory on the device": (
        no_memory_on_device, 7, ("simclr: memory is exhausted: lower simclr.batch_size or views.image_size",),
    ),
    "no memory for a network": (
        settings("simclr.projector.hidden=1000000000000"), 7, ("simclr: memory is exhausted: lower simclr.batch_size",),
    ),
    "no memory for a batch": (no_memory_for_arrays, 7, ("features: memory is exhausted: lower features.batch_size",)),
    "an artifact that was changed, which a step reads": (
        changed_artifact,
        4,
        ("toy/simclr: encoder.safetensors has other content", "nothing reads it", "simclr run RECIPE simclr --force"),
    ),
    "an artifact that was changed, which is shown": (
        changed_result, 4, ("toy/probe: metrics.json has 2 bytes instead of", "simclr run RECIPE probe --force"),
    ),
    "another world size than asked for": (other_world_size, 2, ("--processes 2", "started 3")),
}  # fmt: skip


DAMAGED = {
    "an artifact that was changed, which a step reads": ["toy/simclr@v1"],
    "an artifact that was changed, which is shown": ["toy/probe@v1"],
}


@pytest.mark.parametrize("name", ERRORS)
def test_one_clear_line_the_right_exit_code_and_nothing_lost(world: World, name: str) -> None:
    provoke, expected_code, words = ERRORS[name]
    before = world.artifacts()
    arguments = provoke(world)
    try:
        code = world.run(*arguments)
    finally:
        world.after()
    lines = world.err.splitlines()
    told = next((number for number, line in enumerate(lines) if line.startswith("simclr: ")), None)
    assert told is not None, world.err
    line = lines[told]
    if "1 fault(s)" in line:  # faults of a recipe stand below one another, each on a line
        told += 1
        line = lines[told]
    assert lines[told + 1 :] == [], "one line, and the last one"
    for some in words:
        assert some in line
    assert code == expected_code
    assert len(line) < 500
    assert "Traceback" not in world.err
    assert before.items() <= world.artifacts().items(), "what was made before is there still"
    assert world.damaged() == DAMAGED.get(name, [])
    assert not list(world.folder.glob("artifacts/work/*/*/out.tmp-*"))


def test_verify_names_the_changed_file(world: World) -> None:
    changed_artifact(world)
    assert world.run("verify") == 4
    assert "toy/simclr@v1: encoder.safetensors has other content" in world.out


@pytest.mark.parametrize("provoke", [changed_artifact, changed_result])
def test_a_changed_artifact_is_mended_as_the_line_says(world: World, provoke: Callable[[World], list[str]]) -> None:
    arguments = provoke(world)
    assert world.run(*arguments) == 4
    step = world.err.rpartition("`simclr run RECIPE ")[2].partition(" --force`")[0]
    assert world.run("run", "toy.yaml", step, "--force") == 0
    assert world.damaged() == []
    assert world.run(*arguments) == 0


def test_a_file_touched_but_not_changed_is_read_again_and_serves(world: World) -> None:
    path = world.file("pretrain", "encoder.safetensors")
    os.utime(path, (1, 1))
    assert world.run("run", "toy.yaml", "--set", "features.batch_size=7") == 0


def test_a_recipe_goes_on_without_its_source_as_the_line_says(world: World) -> None:
    assert world.run(*no_source(world)) == 2
    command = world.err.rpartition("`simclr run RECIPE ")[2].partition("`")[0].split()
    assert world.run("run", "toy.yaml", *command, "--set", "features.batch_size=7") == 0, world.err
    assert "features run (batch_size 500 -> 7)" in world.err


def test_a_mistyped_source_is_not_taken_for_one_that_is_gone(world: World) -> None:
    assert world.run("run", "toy.yaml", "--set", "shards.source=folder:imagez") == 2
    assert "in the store still" not in world.err


def test_a_wrong_backbone_is_told_before_the_first_step_runs(world: World) -> None:
    assert world.run("run", "toy.yaml", "--store", "fresh", "--set", "random.encoder=timm:resnet81") == 2
    assert not (world.folder / "fresh" / "builds").exists()


def test_sharding_and_pretraining_need_no_labels(world: World) -> None:
    assert world.run("run", "toy.yaml", "simclr", "--set", "shards.labels=none") == 0
    assert world.run(*one_class(world), "simclr") == 0


def test_a_class_in_test_that_train_lacks_is_a_warning(world: World) -> None:
    write_images(world.folder / "given" / "train", {"leaf": 8, "stone": 8})
    write_images(world.folder / "given" / "test", {"leaf": 4, "water": 4})
    assert world.run("run", "toy.yaml", "--set", "shards.source=folder:given") == 0
    assert "shards warning: 1 classes are in test but not in train: water" in world.err
    assert "probe warning: no training image has the class 'water': 4 test images count as wrong" in world.err


def test_the_same_command_goes_on_after_a_full_disk(world: World) -> None:
    arguments = full_disk("simclr.epochs=2", limit_bytes=40_000)(world)
    try:
        assert world.run(*arguments) == 7
    finally:
        world.after()
    assert world.run(*arguments) == 0
    shown = world.run("show", "simclr", "--json")
    assert shown == 0
    assert [one["ended"] for one in json.loads(world.out)["attempts"]] == ["failed", "finished"]
