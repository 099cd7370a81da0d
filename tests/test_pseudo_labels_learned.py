"""Fine-tuning with pseudo-labels: what is learned, what the card says of it, and what reports say of test images."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import RunStage, run_recipe, stage_runner
from test_report import Page

from pipeline import runner
from pipeline.recipe import load_recipe
from pipeline.store import open_store
from stages.evaluation import label_subset, labels_digest
from stages.images import open_shards
from stages.images.loader import BatchLoader
from stages.images.pseudo_labels import UnusablePseudoLabels
from stages.models import LabelsCard, PseudoLabelsCard, load_card
from stages.reports.artifacts import Artifact, Lineage
from stages.reports.seen_queries import query_images_seen
from stages.settings import STAGES
from stages.settings.finetune import Finetune
from stages.views import Views

TINY: dict[str, Any] = {
    "architecture": {"backbone": "resnet10", "width": 4},
    "image_size": 8,
    "encoder": "random",
    "epochs": 1,
    "batch_size": 16,
    "label_fraction": 0.05,
    "device": "cpu",
}
PIXELS = {"encoder": "pixels", "image_size": 8}
GIVEN = {"label_fraction": 0.05, "penalties": {"smallest": 0.01, "largest": 1.0, "count": 3}}
CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Digits with pseudo-labels of training images, and of test images too."""
    run = stage_runner(tmp_path_factory.mktemp("made"))
    shards = run("shard", {"source": "sklearn:digits", "near_duplicates": False})
    features = {"features": run("embed", PIXELS, {"shards": shards})}
    train, test, none = (
        run("pseudo_label", GIVEN | more, features)
        for more in ({"per_class": 30}, {"per_class": 30, "include_test": True}, {"threshold": 1.0})
    )
    return {"shards": shards, "train": train, "test": test, "none": none}


def pseudo_of(files: Path) -> dict[int, int]:
    table = pq.read_table(files / "pseudo_labels.parquet").to_pydict()
    return dict(zip(table["id"], table["label"], strict=True))


def labelled(files: Path, fraction: float = 0.05) -> dict[int, int]:
    train = open_shards(files, "train")
    labels, ids = train.labels.numpy(), train.sample_ids.numpy()
    rows = label_subset(labels, ids, fraction, 0)
    return dict(zip(ids[rows].tolist(), labels[rows].tolist(), strict=True))


@pytest.mark.parametrize("which", ["train", "test"])
def test_images_join_with_the_classes_that_they_were_given(
    run_stage: RunStage, made: dict[str, Path], which: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    ids: list[int] = []
    pictures: dict[int, torch.Tensor] = {}
    load = BatchLoader.load

    def watched(self: BatchLoader, step: int) -> Any:
        batch = load(self, step)
        ids.extend(batch.sample_ids.tolist())
        pictures.update(zip(batch.sample_ids.tolist(), batch.images.clone(), strict=True))
        return batch

    learned: list[int] = []
    classes: list[int] = []
    visit = Views.__call__

    def with_ids(self: Views, images: torch.Tensor, sample_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        learned.extend(sample_ids.tolist())
        return visit(self, images, sample_ids, *rest)

    cross_entropy = torch.nn.functional.cross_entropy

    def with_labels(scores: torch.Tensor, labels: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        classes.extend(labels.tolist())
        return cross_entropy(scores, labels, *rest, **more)

    monkeypatch.setattr(BatchLoader, "load", watched)
    monkeypatch.setattr(Views, "__call__", with_ids)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", with_labels)
    inputs = {"shards": made["shards"], "pseudo_labels": made[which]}
    files = run_stage("finetune", TINY | {"batch_size": 4}, inputs)
    own, given = labelled(made["shards"]), pseudo_of(made[which])
    assert not own.keys() & given.keys()
    wanted = own | given
    assert len(ids) == len(set(ids)) == 4 * (len(wanted) // 4)
    assert set(ids) <= wanted.keys()
    assert dict(zip(learned, classes, strict=True)) == {one: wanted[one] for one in ids}
    test = open_shards(made["shards"], "test")
    of_test = set(test.sample_ids.tolist()) & given.keys()
    assert bool(of_test) == (which == "test")
    for place, one in enumerate(test.sample_ids.tolist()):
        if one in pictures:
            assert torch.equal(pictures[one], test[place].image)
    said = " ".join(capsys.readouterr().err.split())
    assert f"on {len(own)} labelled images and {len(given)} pseudo-labelled ones" in said
    assert (f"({len(of_test)} of them test images: transductive)" in said) == (which == "test")
    (entry,) = load_card(files).labels_seen
    train = open_shards(made["shards"], "train", "test")
    keys = dict(zip(train.sample_ids.tolist(), train.keys, strict=True))
    assert (entry.samples, entry.fraction) == (len(own), 0.05)
    assert entry.digest == labels_digest((keys[one] for one in own), (train.classes[one] for one in own.values()))
    digest = labels_digest((keys[one] for one in given), (train.classes[one] for one in given.values()))
    assert entry.pseudo == PseudoLabelsCard(train=len(given) - len(of_test), test=len(of_test), digest=digest)


def test_several_splits_are_read_as_one(made: dict[str, Path]) -> None:
    both, *parts = (open_shards(made["shards"], *names) for names in (("train", "test"), ("train",), ("test",)))
    assert len(both) == 1797
    assert sorted(both.sample_ids.tolist()) == both.sample_ids.tolist()
    assert (both.canvas, both.split) == ((8, 8), "train and test")
    where = {one: place for place, one in enumerate(both.sample_ids.tolist())}
    for part in parts:
        places = [where[one] for one in part.sample_ids.tolist()]
        assert torch.equal(both.batch(places).images, part.batch(range(len(part))).images)
        assert [both.keys[place] for place in places] == part.keys
        assert [both.label_lists[place] for place in places] == part.label_lists
        assert torch.equal(both.labels[places], part.labels)
    with pytest.raises(ValueError, match="has no split 'val'; it has train, test"):
        open_shards(made["shards"], "train", "val")


def test_the_labels_behind_come_before_its_own(run_stage: RunStage, made: dict[str, Path]) -> None:
    """With fewer labels of its own it has learned, by way of pseudo-labels, from all that the classifier saw."""
    inputs = {"shards": made["shards"], "pseudo_labels": made["train"]}
    card = load_card(run_stage("finetune", TINY | {"label_fraction": 0.02, "max_steps": 1}, inputs))
    assert [(one.loss, one.fraction) for one in card.labels_seen] == [
        ("logistic_regression", 0.05), ("cross_entropy", 0.02),
    ]  # fmt: skip
    assert card.labels_seen[0].pseudo is None
    assert card.head is not None
    assert card.head.learned_from == card.labels_seen[1]


def test_without_pseudo_labels_a_card_is_what_it_always_was(
    run_stage: RunStage, made: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = run_stage("finetune", TINY | {"max_steps": 2}, {"shards": made["shards"]})
    inputs = {"shards": made["shards"], "pseudo_labels": made["none"]}
    none = run_stage("finetune", TINY | {"max_steps": 2}, inputs)
    assert "pseudo_labels: there are none; labels alone are learned" in capsys.readouterr().err
    for path in plain.iterdir():
        assert path.read_bytes() == (none / path.name).read_bytes()
    assert "pseudo" not in (plain / "model.json").read_text()
    seen = {"loss": "triplet", "fraction": 1.0, "subset": 0, "seed": 0, "samples": 9, "digest": "d"}
    assert LabelsCard.model_validate(seen).model_dump() == seen
    more = seen | {"pseudo": {"train": 3, "test": 1, "digest": "e"}}
    assert LabelsCard.model_validate(more).model_dump() == more


def test_pseudo_labels_of_other_images_are_refused(run_stage: RunStage, made: dict[str, Path], tmp_path: Path) -> None:
    other = run_stage("shard", {"source": "sklearn:digits", "near_duplicates": False, "test_fraction": 0.3})
    with pytest.raises(UnusablePseudoLabels, match="made from features of other shards than these"):
        run_stage("finetune", TINY, {"shards": other, "pseudo_labels": made["train"]})
    with pytest.raises(UnusablePseudoLabels, match=r"of the \d+ images have labels that are learned here") as error:
        run_stage(
            "finetune", TINY | {"label_fraction": 1.0}, {"shards": made["shards"], "pseudo_labels": made["train"]}
        )
    assert error.value.exit_code == 2
    with pytest.raises(ValueError, match="pseudo_labels: they are classes of the labels, and target names"):
        Finetune.model_validate({"shards": "s", "encoder": "random", "pseudo_labels": "p", "target": "hand"})


def test_test_images_that_were_learned_count_among_the_queries(made: dict[str, Path]) -> None:
    shards = Artifact("shard", "shards", "shards", 1, None, {}, {}, made["shards"])
    pseudo = [Artifact("pseudo_label", one, one, 1, 0, {}, {}, made[one]) for one in ("train", "test")]
    test = open_shards(made["shards"], "test")
    for one in pseudo:
        inputs: dict[str, tuple[str, ...]] = {"shards": ("shards",), "pseudo_labels": (one.digest,)}
        tuned = Artifact("finetune", "tuned", "tuned", 1, 0, {}, inputs, Path())
        features = Artifact("embed", "f", "f", 1, None, {}, {"shards": ("shards",), "encoder": ("tuned",)}, Path())
        lineage = Lineage([shards, one, tuned, features])
        found = query_images_seen(lineage, features, test.sample_ids.numpy(), test.labels.numpy())
        learned = np.isin(test.sample_ids.numpy(), [*pseudo_of(one.files)]).sum()
        assert found == [{"step": "tuned", "stage": "finetune", "query_images": learned, "query_classes": 10}]
        assert (learned > 0) == (one.digest == "test")


# Through all stages

RECIPE = """
name: few
seed: 1
steps:
  shards: {stage: shard, source: "sklearn:digits", near_duplicates: false}
  features_pixels: {stage: embed, shards: shards, encoder: pixels, image_size: 8}
  given_{which}:
    each: {which: {train: false, test: true}}
    stage: pseudo_label
    features: features_pixels
    label_fraction: 0.05
    include_test: "{which}"
    penalties: {smallest: 0.01, largest: 1.0, count: 3}
  tuned: &tuned
    stage: finetune
    shards: shards
    encoder: random
    architecture: {backbone: resnet10, width: 4}
    image_size: 8
    label_fraction: 0.05
    max_steps: 2
    batch_size: 32
  tuned_train: {<<: *tuned, pseudo_labels: given_train}
  tuned_test: {<<: *tuned, pseudo_labels: given_test}
  descendant:
    stage: finetune
    shards: shards
    encoder: tuned_test
    loss: {name: triplet}
    max_steps: 2
    label_fraction: 0.05
  features_{row}:
    each: {row: [tuned, tuned_train, tuned_test, descendant]}
    stage: embed
    shards: shards
    encoder: "{row}"
  student: {stage: pseudo_label, features: features_tuned_test, label_fraction: 0.05, threshold: 0.0}
  tuned_student: {<<: *tuned, pseudo_labels: student}
  features_student: {stage: embed, shards: shards, encoder: tuned_student}
  probe_{row}:
    each: &probed {row: [pixels, tuned, tuned_train, tuned_test, descendant, student]}
    stage: probe
    features: "features_{row}"
    penalties: {smallest: 0.01, largest: 1.0, count: 3}
    label_fractions: [0.05]
    subsets: [1]
    neighbours: [5]
    bootstrap_samples: 100
  found: {stage: retrieve, features: features_student, bootstrap_samples: 100}
  without: {stage: report, of: [probe_pixels, probe_tuned], neighbour_queries: 1}
  inductive: {stage: report, of: [probe_tuned, probe_tuned_train], neighbour_queries: 1}
  report: {each: *probed, stage: report, of: ["probe_{row}", found], neighbour_queries: 1}
"""
WORDS = "Trained on test images with pseudo-labels"


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The files of each step of the recipe."""
    return run_recipe(tmp_path_factory.mktemp("few"), RECIPE)


def read(files: Path) -> tuple[dict[str, Any], Page]:
    page = Page((files / "report.html").read_text())
    assert page.open == []
    return json.loads((files / "report.json").read_text()), page


def test_whatever_descends_from_test_images_says_so(reports: Callable[[str], Path]) -> None:
    numbers, page = read(reports("report"))
    labels = {row["step"]: row["label"] for row in numbers["comparison"]["rows"]}
    assert labels == {
        "probe_pixels": "pixels",
        "probe_tuned": "cross-entropy from random",
        "probe_tuned_train": "cross-entropy from random with pseudo-labels (probe_tuned_train)",
        "probe_tuned_test": "cross-entropy from random with pseudo-labels, of test images too",
        "probe_descendant": "triplet from cross-entropy from random with pseudo-labels, of test images too",
        "probe_student": "cross-entropy from random with pseudo-labels (probe_student)",
    }
    transductive = [labels[f"probe_{one}"] for one in ("tuned_test", "descendant", "student")]
    columns = numbers["table"]["columns"]
    *column, searched = [row[-1] for row in numbers["table"]["rows"]]
    assert columns[-1] == "trained on test images with pseudo-labels"
    assert searched == "\N{EN DASH}", "a retrieval says it in a column of its own"
    assert numbers["table"]["rows"][-1][columns.index("transductive")] == "yes"
    assert column == ["no", "no", "no", "yes, transductive", "yes, transductive", "yes, transductive"]
    assert numbers["verdict"]["test_images"].startswith(f"{WORDS}: yes, transductive: {transductive[0]}")
    assert all(label in numbers["verdict"]["test_images"] for label in transductive[:2])
    assert "features_student" in numbers["verdict"]["test_images"]
    assert numbers["verdict"]["test_images"] in page.text
    assert page.text.count("trained on test images with pseudo-labels: yes, transductive") == 3
    differing = {one["name"]: one["values"] for one in numbers["protocol"]["differing"]}
    assert differing[WORDS] == column
    (found,) = numbers["retrieval"]["rows"]
    assert found["transductive"]
    own, teacher = found["seen"]
    assert (own["step"], own["query_images"]) == ("tuned_student", 0), "its own pseudo-labels are of train"
    metrics = json.loads((reports("given_test") / "metrics.json").read_text())
    counted = (teacher["step"], teacher["query_images"])
    assert counted == ("tuned_test", metrics["counts"]["test"]), "the classifier's encoder learned test images"
    rows = {row["step"]: row for row in numbers["pseudo_labels"]}
    assert set(rows) == {"given_train", "given_test", "student"}
    assert rows["given_test"]["counts"] == metrics["counts"]
    assert rows["given_test"]["out_of_fold"]["precision"] == metrics["out_of_fold"]["precision"] >= 0.95
    assert page.section("pseudo_labels")
    tuned = {row["step"]: row.get("pseudo") for row in numbers["fine_tuning"]["rows"]}
    assert tuned["tuned"] is None
    assert tuned["tuned_test"] == {key: metrics["counts"][key] for key in ("train", "test")}
    assert f"{metrics['counts']['test']} of test images: transductive" in page.text


def test_pseudo_labels_of_training_images_alone_are_not_transductive(reports: Callable[[str], Path]) -> None:
    numbers, page = read(reports("inductive"))
    assert "test_images" not in numbers["verdict"]
    assert [row["label"] for row in numbers["comparison"]["rows"]] == [
        "cross-entropy from random", "cross-entropy from random with pseudo-labels",
    ]  # fmt: skip
    shared = {one["name"]: one["value"] for one in numbers["protocol"]["shared"]}
    assert shared[WORDS] == "no"
    assert "yes, transductive" not in page.text
    # No label but those of the column was seen: the encoder is measured there as one of these labels alone is.
    cells = numbers["comparison"]["rows"][1]["cells"]
    assert (cells[0]["saw"], cells[0]["subset"]) == (None, 0)


def test_a_report_without_pseudo_labels_says_nothing_of_them(reports: Callable[[str], Path]) -> None:
    numbers, page = read(reports("without"))
    assert "pseudo" not in json.dumps(numbers)
    assert not page.section("pseudo_labels")


def test_the_shipped_recipe_runs(tmp_path: Path) -> None:
    tiny = ["simclr.max_steps=2", "simclr.architecture.width=4", "tuned_*.max_steps=2", "pseudo.threshold=0.2"]
    recipe = load_recipe(CONFIGS / "pseudo-labels.yaml", STAGES, [*tiny, "probe*.bootstrap_samples=100"])
    finetunings = [step.settings for step in recipe.steps.values() if isinstance(step.settings, Finetune)]
    assert len({(one.max_steps, one.batch_size, one.epochs) for one in finetunings}) == 1, "equal steps for all"
    store = open_store(tmp_path)
    finished = runner.run(runner.Planner(store, recipe, print), (), lambda _: None)
    (report,) = [one.record for one in finished if one.planned.step.name == "report"]
    numbers, _ = read(store.files(report.stage, report.digest))
    assert [row["label"] for row in numbers["comparison"]["rows"]] == [
        "pretrained", "cross-entropy from pretrained", "cross-entropy from pretrained with pseudo-labels",
    ]  # fmt: skip
    assert [row["step"] for row in numbers["pseudo_labels"]] == ["pseudo"]
    assert numbers["pseudo_labels"][0]["counts"]["test"] == 0
