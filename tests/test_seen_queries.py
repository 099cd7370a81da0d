"""What trainings saw of queries: by the split of one set of shards, by bytes, by keys of one source, by classes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import RunStage
from PIL import Image

from stages.reports.artifacts import Artifact, Lineage
from stages.reports.seen_queries import query_images_seen


def class_folder(root: Path, classes: dict[str, dict[str, range]]) -> Path:
    """Images {split: {class: numbers}}, each number an image of its own."""
    for split, found in classes.items():
        for name, numbers in found.items():
            (root / split / name).mkdir(parents=True)
            for number in numbers:
                pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


class Trainings:
    """Shards of folders, and trainings and features of them."""

    def __init__(self, run_stage: RunStage):
        self.run_stage = run_stage
        self.artifacts: list[Artifact] = []

    def shard(self, step: str, folder: Path, source: str = "", **settings: Any) -> Path:
        settings = {"source": f"folder:{folder}", "near_duplicates": False, **settings}
        files = self.run_stage("shard", settings)
        self._add("shard", step, settings, {"source": (f"foreign:{source or step}",)}, files)
        return files

    def train(
        self, stage: str, step: str, shards: str, encoder: str = "", pseudo_labels: str = "", **settings: Any
    ) -> None:
        inputs: dict[str, tuple[str, ...]] = {"shards": (shards,)}
        inputs |= {"encoder": (encoder,)} if encoder else {}
        inputs |= {"pseudo_labels": (pseudo_labels,)} if pseudo_labels else {}
        self._add(stage, step, settings, inputs, Path())

    def pseudo_label(self, step: str, shards: str, encoder: str, threshold: float = 0.0) -> None:
        """Of half of the training images, by features that an encoder is said to have made."""
        folder = next(one.files for one in self.artifacts if one.step == shards)
        features = self.run_stage("embed", {"encoder": "pixels", "image_size": 8}, {"shards": folder})
        settings = {"label_fraction": 0.5, "threshold": threshold}
        files = self.run_stage("pseudo_label", settings, {"features": features})
        self._add("embed", f"features of {step}", {}, {"shards": (shards,), "encoder": (encoder,)}, features)
        self._add("pseudo_label", step, settings, {"features": (f"features of {step}",)}, files)

    def seen(self, shards: str, encoder: str, ids: list[int], labels: list[int]) -> list[dict[str, Any]]:
        features = Artifact("embed", "f", "f", 1, None, {}, {"shards": (shards,), "encoder": (encoder,)}, Path())
        lineage = Lineage([*self.artifacts, features])
        return query_images_seen(lineage, features, np.array(ids), np.array(labels))

    def _add(
        self, stage: str, step: str, settings: dict[str, Any], inputs: dict[str, tuple[str, ...]], files: Path
    ) -> None:
        self.artifacts.append(Artifact(stage, step, step, 1, 0, settings, inputs, files))


@pytest.fixture
def trainings(run_stage: RunStage) -> Trainings:
    return Trainings(run_stage)


def queries_of(files: Path, split: str) -> tuple[list[int], list[int]]:
    table = pq.read_table(files / "index.parquet", filters=[("split", "=", split)]).to_pydict()
    return table["id"], table["label"]


def expected_seen(files: Path, other: Path, split: str, same_source: bool) -> tuple[int, int]:
    """By loops over both indexes."""
    own = pq.read_table(files / "index.parquet").to_pylist()
    train = [row for row in pq.read_table(other / "index.parquet").to_pylist() if row["split"] == "train"]
    classes, others = (json.loads((one / "shards.json").read_text())["classes"] for one in (files, other))
    names = {others[label] for row in train for label in row["labels"]}
    images, found = 0, set()
    asked = {classes[row["label"]] for row in own if row["split"] == split}
    for row in own:
        there = any(one["xxh3"] == row["xxh3"] or (same_source and one["key"] == row["key"]) for one in train)
        images += there and row["split"] == split
        if there:
            found.add(classes[row["label"]])
    return images, len(asked & (found | names))


def test_on_the_same_shards_the_split_decides(trainings: Trainings, tmp_path: Path) -> None:
    images = {"train": {"a": range(4), "b": range(4, 8)}, "test": {"a": range(8, 11), "c": range(11, 14)}}
    files = trainings.shard("shards", class_folder(tmp_path / "one", images))
    trainings.train("pretrain", "simclr", "shards")
    found = trainings.seen("shards", "simclr", *queries_of(files, "test"))
    assert found == [{"step": "simclr", "stage": "pretrain", "query_images": 0, "query_classes": 1}]
    assert trainings.seen("shards", "simclr", *queries_of(files, "train"))[0]["query_images"] == 8


@pytest.mark.parametrize(
    ("classes", "settings", "expected"),
    [
        ({"train": {"x": range(8, 12), "y": range(30, 33)}}, {}, (4, 2)),  # the queries' bytes under other keys
        ({"train": {"x": range(4), "y": range(30, 33)}}, {}, (0, 1)),  # bytes of a class that queries have
        ({"train": {"c": range(30, 33), "y": range(40, 43)}}, {}, (0, 1)),  # other images of a class of that name
        ({"train": {"x": range(30, 33), "y": range(40, 43)}}, {}, (0, 0)),
        ({"test": {"x": range(8, 12)}, "train": {"y": range(40, 43)}}, {}, (0, 0)),  # not in train
        ({"train": {"x": range(8, 14)}}, {"labels": "none"}, (6, 2)),
    ],
)
def test_in_other_shards_images_are_known_by_their_bytes(
    trainings: Trainings,
    tmp_path: Path,
    classes: dict[str, dict[str, range]],
    settings: dict[str, Any],
    expected: tuple[int, int],
) -> None:
    images = {"train": {"a": range(4), "b": range(4, 8)}, "test": {"a": range(8, 11), "c": range(11, 14)}}
    files = trainings.shard("shards", class_folder(tmp_path / "one", images))
    other = trainings.shard("others", class_folder(tmp_path / "other", classes), **settings)
    trainings.train("pretrain", "simclr", "others")
    found = trainings.seen("shards", "simclr", *queries_of(files, "test"))[0]
    assert (found["query_images"], found["query_classes"]) == expected
    assert expected_seen(files, other, "test", same_source=False) == expected


def test_images_of_the_same_source_are_known_by_their_keys(trainings: Trainings, tmp_path: Path) -> None:
    """Scaled down they have other bytes."""
    images = {"train": {"a": range(4), "b": range(4, 8)}, "test": {"c": range(8, 11), "d": range(11, 14)}}
    folder = class_folder(tmp_path / "one", images)
    files = trainings.shard("shards", folder, source="same")
    everything = {"splits": "drawn", "val_fraction": 0.0, "test_fraction": 0.3, "max_short_side": 4}
    same = trainings.shard("small", folder, source="same", **everything)
    trainings.shard("elsewhere", folder, source="another", **everything, labels="none")
    for step, shards in (("simclr", "small"), ("stranger", "elsewhere")):
        trainings.train("pretrain", step, shards)
    found = trainings.seen("shards", "simclr", *queries_of(files, "test"))[0]
    images_seen, classes = expected_seen(files, same, "test", same_source=True)
    assert (found["query_images"], found["query_classes"]) == (images_seen, classes)
    assert images_seen > 0
    assert classes == 2
    stranger = trainings.seen("shards", "stranger", *queries_of(files, "test"))[0]
    assert (stranger["query_images"], stranger["query_classes"]) == (0, 0)


def test_all_trainings_of_an_encoder_count_but_not_those_of_a_head(trainings: Trainings, tmp_path: Path) -> None:
    images = {"train": {"a": range(4), "b": range(4, 8)}, "test": {"c": range(8, 11), "d": range(11, 14)}}
    files = trainings.shard("shards", class_folder(tmp_path / "one", images))
    trainings.shard("unlabelled", class_folder(tmp_path / "two", {"train": {"all": range(14)}}), labels="none")
    trainings.train("pretrain", "simclr", "unlabelled")
    trainings.train("finetune", "tuned", "shards", "simclr")
    trainings.train("finetune", "head", "unlabelled", "tuned", freeze="encoder")
    asked = queries_of(files, "test")
    assert trainings.seen("shards", "head", *asked) == [
        {"step": "tuned", "stage": "finetune", "query_images": 0, "query_classes": 0},
        {"step": "simclr", "stage": "pretrain", "query_images": 6, "query_classes": 2},
    ]
    assert trainings.seen("shards", "random", *asked) == []


def test_a_teacher_counts_where_its_pseudo_labels_were_learned(trainings: Trainings, tmp_path: Path) -> None:
    images = {"train": {"a": range(8), "b": range(8, 16)}, "test": {"c": range(16, 19), "d": range(19, 22)}}
    files = trainings.shard("shards", class_folder(tmp_path / "one", images))
    trainings.shard("everything", class_folder(tmp_path / "two", {"train": {"all": range(22)}}), labels="none")
    trainings.train("pretrain", "simclr", "everything")
    trainings.train("finetune", "teacher", "shards", "simclr")
    trainings.pseudo_label("given", "shards", "teacher")
    trainings.train("finetune", "student", "shards", pseudo_labels="given")
    trainings.pseudo_label("given_again", "shards", "student")
    trainings.train("finetune", "start", "shards")
    trainings.train("finetune", "grandstudent", "shards", "start", pseudo_labels="given_again")
    trainings.pseudo_label("none", "shards", "teacher", threshold=1.0)
    trainings.train("finetune", "alone", "shards", pseudo_labels="none")
    trainings.train("finetune", "sibling", "shards", "teacher", pseudo_labels="given")
    trainings.train("finetune", "head", "shards", pseudo_labels="given", freeze="encoder")
    asked = queries_of(files, "test")

    def learned(encoder: str) -> list[tuple[str, int, int]]:
        found = trainings.seen("shards", encoder, *asked)
        return [(one["step"], one["query_images"], one["query_classes"]) for one in found]

    simclr = ("simclr", 6, 2)
    assert learned("student") == [("student", 0, 0), ("teacher", 0, 0), simclr]
    before = [(one, 0, 0) for one in ("grandstudent", "start", "student", "teacher")]
    assert learned("grandstudent") == [*before, simclr]
    assert learned("sibling") == [("sibling", 0, 0), ("teacher", 0, 0), simclr], "each once"
    assert learned("alone") == [("alone", 0, 0)], "no image was above the threshold"
    assert learned("head") == [], "a head alone was trained with them"
