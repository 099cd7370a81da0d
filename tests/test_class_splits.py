"""Splits that share no class: drawn, and named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RunStage
from PIL import Image

from stages.images import Shards, open_shards
from stages.images.splits import TooFewClasses, draw_class_splits
from stages.sources.candidates import SourceError


def make_folder(root: Path, *names: str) -> Path:
    """Twelve small images of each class; names may have a split before the class."""
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(12):
            pixels = np.random.default_rng(len(name) + number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def shard(run_stage: RunStage, folder: Path, seed: int = 0, **settings: Any) -> Path:
    return run_stage("shard", {"source": f"folder:{folder}", "split_by": "class", **settings}, seed=seed)


def open_all(files: Path) -> dict[str, Shards]:
    return {split: open_shards(files, split) for split in json.loads((files / "shards.json").read_text())["splits"]}


def classes_of(shards: Shards) -> set[str]:
    return {shards.classes[label] for label in set(shards.labels.tolist()) - {-1}}


def test_digits_by_class(run_stage: RunStage, capsys: pytest.CaptureFixture[str]):
    digits = {"source": "sklearn:digits", "split_by": "class", "val_fraction": 0.1, "test_fraction": 0.3}
    files = run_stage("shard", digits, seed=4)
    said = capsys.readouterr().err
    assert "classes of the splits, which share none: train 6, val 1, test 3\n" in said
    assert "warning" not in said
    parts = open_all(files)
    drawn = draw_class_splits(list("0123456789"), {"test": 0.3, "val": 0.1}, 4)
    counts = json.loads((files / "shards.json").read_text())["splits"]
    for split, part in parts.items():
        assert part.classes == list("0123456789"), "numbers of classes are those of all"
        assert [part.classes[label] for label in part.labels.tolist()] == [key[0] for key in part.keys]
        assert classes_of(part) == {name for name, its_split in drawn.items() if its_split == split}
        present = [count > 0 for count in counts[split]["class_counts"]]
        assert present == [drawn[name] == split for name in part.classes]
    assert sum(len(part) for part in parts.values()) == 1797
    other = open_all(run_stage("shard", digits, seed=5))
    assert classes_of(other["test"]) != classes_of(parts["test"])


def test_images_without_a_label_go_to_train(tmp_path: Path, run_stage: RunStage, capsys: pytest.CaptureFixture[str]):
    folder = make_folder(tmp_path / "images", "a", "b", "c")
    (folder / "a/0.png").rename(folder / "top.png")
    parts = open_all(shard(run_stage, folder))
    assert {split: len(classes_of(part)) for split, part in parts.items()} == {"train": 2, "test": 1}
    assert "top.png" in parts["train"].keys
    assert parts["train"].labels[parts["train"].keys.index("top.png")] == -1
    assert "1 images lie in no class folder and have no label" in capsys.readouterr().err


def test_named_classes_are_taken_from_every_split(
    tmp_path: Path, run_stage: RunStage, capsys: pytest.CaptureFixture[str]
):
    names = [f"{split}/{name}" for split in ("train", "test") for name in ("ant", "bee", "cat", "dog", "eel")]
    folder = make_folder(tmp_path / "images", *names)
    classes = {"train": ["dog", "ant"], "test": ["cat"]}
    files = shard(run_stage, folder, split_classes=classes)
    said = capsys.readouterr().err
    assert "split_classes leaves out 2 classes with 48 images: bee, eel\n" in said
    assert "48 other files left out (images of classes that are in no split 48)" in said
    assert "classes of the splits, which share none: train 2, test 1\n" in said
    parts = open_all(files)
    assert {split: (len(part), classes_of(part)) for split, part in parts.items()} == {
        "train": (48, {"dog", "ant"}),
        "test": (24, {"cat"}),
    }
    assert {key.split("/")[0] for key in parts["test"].keys} == {"train", "test"}
    assert parts["test"].classes == ["ant", "cat", "dog"]
    again = shard(run_stage, folder, seed=1, split_classes=classes, test_fraction=0.5)
    assert (again / "index.parquet").read_bytes() == (files / "index.parquet").read_bytes()


def test_what_does_not_fit_is_one_line(tmp_path: Path, run_stage: RunStage):
    given = make_folder(tmp_path / "given", "train/a", "train/b", "test/a", "test/b")
    drawn = make_folder(tmp_path / "drawn", "a", "b")
    flat = make_folder(tmp_path / "flat", "").resolve()
    wrong: list[tuple[Path, dict[str, Any], str, int]] = [
        (given, {}, r"the source gives splits, and split_by: class draws others: say `splits: drawn`", 2),
        (drawn, {"val_fraction": 0.1}, r"cannot make train, test, val of 2 classes: each split has one at least", 6),
        (drawn, {"split_classes": {"train": ["a"], "val": ["c"]}}, r"split_classes.val: .* no class 'c'; .* a, b$", 2),
        (flat, {}, r"no image of the source has a label", 2),
        (flat, {"split_classes": {"train": ["a"]}}, r"no image of the source has a label", 2),
    ]  # fmt: skip
    for folder, settings, message, exit_code in wrong:
        with pytest.raises((SourceError, TooFewClasses), match=message) as error:
            shard(run_stage, folder, **settings)
        assert error.value.exit_code == exit_code
        assert "\n" not in str(error.value)
    parts = open_all(shard(run_stage, given, splits="drawn"))
    assert {split: len(part) for split, part in parts.items()} == {"train": 24, "test": 24}


def test_several_labels_are_refused(tmp_path: Path, run_stage: RunStage):
    make_folder(tmp_path, "x")
    (tmp_path / "table.csv").write_text("path,labels\nx/1.png,a\nx/2.png,a|b\nx/3.png,b\n")
    settings = {"source": f"csv:{tmp_path}/table.csv", "split_by": "class"}
    with pytest.raises(SourceError, match=r"needs one label an image, and x/2.png has several: a, b") as error:
        run_stage("shard", settings)
    assert error.value.exit_code == 2


def test_a_group_with_classes_of_two_splits(tmp_path: Path, run_stage: RunStage, capsys: pytest.CaptureFixture[str]):
    folder = make_folder(tmp_path / "images", "a", "b")
    settings = {"group_pattern": r"\d+", "split_classes": {"train": ["a"], "test": ["b"]}}
    message = "12 of 12 groups are in more than one split: 0 (train, test); "
    with pytest.raises(SourceError) as error:
        shard(run_stage, folder, **settings)
    assert message in str(error.value)
    assert "; name their classes in one split (`split_classes`), or say `allow_group_in_splits" in str(error.value)
    assert error.value.exit_code == 6
    parts = open_all(shard(run_stage, folder, **settings, allow_group_in_splits=True))
    assert message in capsys.readouterr().err
    assert {split: classes_of(part) for split, part in parts.items()} == {"train": {"a"}, "test": {"b"}}


@pytest.mark.parametrize("loss", ["cross_entropy", "triplet", "arcface"])
def test_fine_tuning_on_some_classes_of_many(run_stage: RunStage, capsys: pytest.CaptureFixture[str], loss: str):
    classes = {"train": ["1", "4", "9"], "test": ["0", "7"]}
    digits = {"source": "sklearn:digits", "split_by": "class", "split_classes": classes, "near_duplicates": False}
    shards = run_stage("shard", digits)
    assert open_shards(shards, "train").labels.unique().tolist() == [1, 2, 4]
    settings: dict[str, Any] = {"encoder": "random", "architecture": {"backbone": "resnet10", "width": 4}}
    settings |= {"image_size": 8, "max_steps": 2, "batch_size": 16, "device": "cpu", "loss": {"name": loss}}
    model = run_stage("finetune", settings, {"shards": shards})
    assert "labelled images of 3 classes" in capsys.readouterr().err
    assert all(np.isfinite(json.loads(line)["loss"]) for line in (model / "metrics.jsonl").read_text().splitlines())
