"""Pseudo-labels of scikit-learn's digits: against scikit-learn and plain loops; hidden labels have no say."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import RunStage
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from test_probe import DIGITS, PIXELS, TRAIN, digits, metrics_of, seen, write_features

from pipeline import runner
from pipeline.errors import BadData, NotFinite, UsageError
from pipeline.recipe import load_recipe
from pipeline.store import Store
from stages.evaluation import label_subset, labels_digest, stratified_folds
from stages.evaluation.subsets import hash_ids
from stages.images.pseudo_labels import take_confident
from stages.settings import STAGES
from stages.settings.pseudo_label import PseudoLabel

FEW: dict[str, Any] = {"label_fraction": 0.05}
IDS = np.arange(TRAIN)


def rows_of(files: Path) -> list[dict[str, Any]]:
    return pq.read_table(files / "pseudo_labels.parquet").to_pylist()


def said_by(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def chances(train: np.ndarray, asked: np.ndarray, penalty: float) -> np.ndarray:
    """Probabilities [N, 10] by scikit-learn, of a fit to the rows `train` of the digits."""
    scale = StandardScaler().fit(PIXELS[train])
    model = LogisticRegression(C=1 / (penalty * len(train)), tol=1e-8, max_iter=5000)
    model.fit(scale.transform(PIXELS[train]), DIGITS[train])
    assert model.classes_.tolist() == list(range(10))
    return model.predict_proba(scale.transform(PIXELS[asked]))


def best_of(probabilities: np.ndarray) -> tuple[list[int], list[float]]:
    return probabilities.argmax(1).tolist(), probabilities.max(1).tolist()


@pytest.mark.parametrize(("seed", "subset"), [(0, 0), (3, 2)])
def test_threshold_and_pseudo_labels_are_those_of_plain_loops(
    run_stage: RunStage, tmp_path: Path, seed: int, subset: int
) -> None:
    files = run_stage("pseudo_label", FEW | {"label_subset": subset}, {"features": digits(tmp_path)}, seed=seed)
    metrics = metrics_of(files)
    labels = DIGITS[:TRAIN]
    chosen = label_subset(labels, IDS, 0.05, seed, subset)
    assert metrics["counts"]["labelled"] == len(chosen) == 50
    fold = stratified_folds(labels[chosen], chosen, 5, seed, subset)
    answers: dict[int, tuple[int, float]] = {}
    for number in range(5):
        inside, outside = chosen[fold == number], chosen[fold != number]
        named, sure = best_of(chances(outside, inside, metrics["penalty"]))
        answers |= dict(zip(inside.tolist(), zip(named, sure, strict=True), strict=True))
    thresholds = []
    for _, threshold in answers.values():
        kept = [row for row, (_, sure) in answers.items() if sure >= threshold]
        if sum(answers[row][0] == labels[row] for row in kept) / len(kept) >= 0.95:
            thresholds.append((threshold, kept))
    threshold, kept = min(thresholds)
    assert metrics["threshold"] == pytest.approx(threshold, abs=2e-3)
    known = metrics["out_of_fold"]
    assert known["images"] == 50
    assert known["coverage"] == pytest.approx(len(kept) / 50)
    assert known["precision"] == pytest.approx(sum(answers[row][0] == labels[row] for row in kept) / len(kept))
    others = np.setdiff1d(IDS, chosen)
    named, sure = best_of(chances(chosen, others, metrics["penalty"]))
    wanted = {row: name for row, name, one in zip(others.tolist(), named, sure, strict=True) if one >= threshold + 5e-3}
    possible = {row for row, one in zip(others.tolist(), sure, strict=True) if one >= threshold - 5e-3}
    found = {row["id"]: row for row in rows_of(files)}
    assert wanted.keys() <= found.keys() <= possible
    assert len(wanted) > 200
    confidence = dict(zip(others.tolist(), sure, strict=True))
    for row, name in wanted.items():
        assert found[row]["label"] == name
        assert (found[row]["key"], found[row]["split"], found[row]["class"]) == (f"{row}.png", "train", f"digit {name}")
        assert found[row]["confidence"] == pytest.approx(confidence[row], abs=5e-3)
    right = sum(row["label"] == labels[row["id"]] for row in found.values())
    assert metrics["hidden_labels"] == {"images": len(found), "right": right, "precision": right / len(found)}
    digest = labels_digest((f"{row}.png" for row in chosen), (f"digit {labels[row]}" for row in chosen))
    (entry,) = metrics["labels_seen"]
    assert (entry["fraction"], entry["subset"], entry["seed"], entry["samples"]) == (0.05, subset, seed, 50)
    assert entry["digest"] == digest, "the subset that finetune and probe have"


def test_hidden_labels_change_nothing_but_the_precision_that_is_reported(run_stage: RunStage, tmp_path: Path) -> None:
    chosen = label_subset(DIGITS[:TRAIN], IDS, 0.05, 0)
    # The draw of the subset looks at labels, to be stratified: those that stand behind it change places, so that it
    # stays what it is.
    hashes = hash_ids(IDS, 0, 1)
    behind = np.flatnonzero(hashes > hashes[chosen].max())
    labels = DIGITS.copy()
    labels[behind] = np.random.default_rng(0).permutation(labels[behind])
    assert (labels != DIGITS).sum() > 400
    assert label_subset(labels[:TRAIN], IDS, 0.05, 0).tolist() == chosen.tolist()
    true, permuted = (
        run_stage("pseudo_label", FEW, {"features": digits(tmp_path / name, labels=one)})
        for name, one in (("true", DIGITS), ("permuted", labels))
    )
    name = "pseudo_labels.parquet"
    assert (true / name).read_bytes() == (permuted / name).read_bytes()
    one, other = metrics_of(true), metrics_of(permuted)
    assert one["hidden_labels"]["precision"] > 0.9
    assert other["hidden_labels"]["precision"] < 0.5
    for metrics in (one, other):
        del metrics["hidden_labels"]
        for row in metrics["table"]["rows"]:
            del row[-1]
    assert one == other


def test_images_without_a_label_are_given_one(run_stage: RunStage, tmp_path: Path) -> None:
    """All labels that there are, and nothing hidden."""
    labels = DIGITS.copy()
    chosen = label_subset(DIGITS[:TRAIN], IDS, 0.05, 0)
    labels[np.setdiff1d(IDS, chosen)] = -1
    unlabelled = run_stage("pseudo_label", {}, {"features": digits(tmp_path / "unlabelled", labels=labels)})
    hidden = run_stage("pseudo_label", FEW | {"threshold": 0.5}, {"features": digits(tmp_path / "hidden")})
    assert metrics_of(unlabelled)["hidden_labels"] == {"images": 0, "right": 0, "precision": None}
    given = {row["id"]: row["label"] for row in rows_of(unlabelled)}
    again = {row["id"]: row["label"] for row in rows_of(hidden)}
    assert len(given) > 200
    # Folds are of the same images, the fits are alike: only the threshold was chosen in one and given in the other.
    for row in given.keys() & again.keys():
        assert given[row] == again[row]


def test_per_class_takes_the_most_confident(run_stage: RunStage, tmp_path: Path) -> None:
    features = digits(tmp_path)
    everything = rows_of(run_stage("pseudo_label", FEW, {"features": features}))
    files = run_stage("pseudo_label", FEW | {"per_class": 20}, {"features": features})
    wanted = []
    for label in range(10):
        same = sorted((row for row in everything if row["label"] == label), key=lambda row: -row["confidence"])
        wanted += [row["id"] for row in same[:20]]
    assert [row["id"] for row in rows_of(files)] == sorted(wanted)
    assert max(one["train"] for one in metrics_of(files)["by_class"]) == 20


def test_test_images_only_where_they_are_asked_for_and_never_by_their_labels(
    run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = ["train"] * TRAIN + ["val"] * 297 + ["test"] * 500
    plain = run_stage("pseudo_label", FEW, {"features": digits(tmp_path / "plain", splits=parts)})
    assert {row["split"] for row in rows_of(plain)} == {"train"}
    assert "test images" not in said_by(capsys)
    permuted = DIGITS.copy()
    permuted[TRAIN:] = -1
    asked = FEW | {"include_test": True}
    first, second = (
        run_stage("pseudo_label", asked, {"features": digits(tmp_path / name, splits=parts, labels=one)})
        for name, one in (("true", DIGITS), ("none", permuted))
    )
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()
    found = rows_of(first)
    assert [row for row in found if row["split"] == "train"] == rows_of(plain)
    test = [row for row in found if row["split"] == "test"]
    assert len(test) > 100
    assert all(row["id"] >= TRAIN + 297 for row in test)
    metrics = metrics_of(first)
    assert metrics["counts"]["test"] == len(test)
    assert metrics["candidates"] == {"train": 950, "test": 500}
    assert metrics["hidden_labels"]["images"] == len(found) - len(test)
    assert f"{len(test)} of them are test images: whatever is trained with them is transductive" in said_by(capsys)


def test_the_table_is_small_and_adds_up(run_stage: RunStage, tmp_path: Path) -> None:
    """Against loops over the rows: the twenty classes that were given most, in the order of classes."""
    random = np.random.default_rng(0)
    labels = random.permutation(np.repeat(np.arange(30), 12 + np.arange(30) % 5 * 2))
    features = random.normal(size=(30, 16))[labels] + 1.0 * random.normal(size=(len(labels), 16))
    classes = [f"class {one}" for one in range(30)]
    parts = ["train"] * 400 + ["test"] * (len(labels) - 400)
    made = write_features(tmp_path / "features", features, labels, parts, classes)
    settings = {"label_fraction": 0.5, "include_test": True, "threshold": 0.3}
    files = run_stage("pseudo_label", settings, {"features": made})
    metrics = metrics_of(files)
    wanted = {name: {"labelled": 0, "train": 0, "test": 0, "hidden": 0, "right": 0} for name in classes}
    for row in label_subset(labels[:400], np.arange(400), 0.5, 0).tolist():
        wanted[classes[labels[row]]]["labelled"] += 1
    for row in rows_of(files):
        counts = wanted[row["class"]]
        counts[row["split"]] += 1
        if row["split"] == "train":
            counts["hidden"] += 1
            counts["right"] += row["class"] == classes[labels[row["id"]]]
    given = {name: one["train"] + one["test"] for name, one in wanted.items()}
    last = sorted(given.values(), reverse=True)[19]
    assert list(given.values()).count(last) > 1, "a tie at the end of the table: of these the first are in"
    shown = sorted(sorted(classes, key=lambda name: -given[name])[:20], key=classes.index)
    whole = {key: sum(one[key] for one in wanted.values()) for key in ("labelled", "train", "test", "hidden", "right")}
    assert whole["test"] > 0
    assert 0 < whole["right"] < whole["hidden"]
    rows = [(name, wanted[name]) for name in shown] + [("all 30 classes", whole)]
    assert metrics["table"]["rows"] == [
        [name, one["labelled"], one["train"] + one["test"], one["test"], f"{one['right']} of {one['hidden']}"]
        for name, one in rows
    ]
    assert metrics["by_class"] == [
        {"name": name} | {key: one[key] for key in ("labelled", "train", "test")} for name, one in wanted.items()
    ]
    assert metrics["counts"] == {key: whole[key] for key in ("labelled", "train", "test")}
    assert (metrics["hidden_labels"]["images"], metrics["hidden_labels"]["right"]) == (whole["hidden"], whole["right"])


@pytest.mark.parametrize("per_class", [None, 1, 3, 100])
@pytest.mark.parametrize("threshold", [None, 0.0, 0.4, 2.0])
def test_answers_are_taken_from_the_most_confident_on(threshold: float | None, per_class: int | None) -> None:
    random = np.random.default_rng(0)
    labels, confidences = random.integers(0, 4, 60), random.integers(0, 6, 60) / 5
    wanted: list[int] = []
    for label in range(4):
        own = [row for row in range(60) if labels[row] == label and threshold is not None]
        own = [row for row in own if confidences[row] >= threshold]
        wanted += sorted(own, key=lambda row: -confidences[row])[:per_class]
    assert take_confident(labels, confidences, threshold, per_class).tolist() == sorted(wanted)


# What is refused, and what is said


@pytest.mark.parametrize(
    ("settings", "changes", "error", "message"),
    [
        ({}, {}, BadData, "all 1,000 training images have a label that is learned: there is none to give a class to"),
        (FEW, {"labels": np.full(1797, -1)}, BadData, "no training image has a label"),
        (FEW, {"labels": np.zeros(1797, dtype=int)}, BadData, "labelled training images are 'digit 0'; two classes"),
        (FEW, {"label_lists": [[one, (one + 1) % 10] for one in DIGITS]}, BadData, "images with several labels"),
        (FEW | {"include_test": True}, {"rows": TRAIN}, UsageError, "include_test: the features have no test split"),
        (FEW, {"groups": ["one"] * 1797}, UsageError, "threshold: all labelled images are of one group, so that none"),
        (FEW, {"labels_seen": seen(0.1)}, UsageError, r"learned from labels that label_fraction 0\.05 hides \(10%"),
        (FEW, {"labels_seen": seen(0.05, subset=1)}, UsageError, "learned from labels that label_fraction"),
        (FEW, {"labels_seen": seen(0.05)}, UsageError, "threshold: the encoder learned from all 50 labels, so that"),
        (FEW, {"features": np.where(PIXELS == 3, np.nan, PIXELS)}, NotFinite, "infinite numbers or NaN"),
    ],
    ids=[
        "nothing unlabelled", "no labels", "one class", "several labels", "no test", "one group", "saw more",
        "saw others", "saw all", "not finite",
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line(
    run_stage: RunStage, tmp_path: Path, settings: dict[str, Any], changes: dict[str, Any], error: type[Exception],
    message: str,
) -> None:  # fmt: skip
    with pytest.raises(error, match=message) as caught:
        run_stage("pseudo_label", settings, {"features": digits(tmp_path, **changes)})
    assert "\n" not in str(caught.value)


RECIPE = """
name: disjoint
steps:
  shards: {stage: shard, source: "sklearn:digits", near_duplicates: false}
  by_class: {stage: shard, source: "sklearn:digits", near_duplicates: false, split_by: class}
  views: {stage: augment, shards: by_class, preset: text, image_size: 8, contact_sheet_images: 2}
  simclr:
    stage: pretrain
    shards: by_class
    views: views
    architecture: {backbone: resnet10, width: 4}
    projector: {layers: 2, hidden: 16, dimension: 8}
    max_steps: 1
    batch_size: 64
    device: cpu
  embed_{shards}:
    each: {shards: [shards, by_class]}
    stage: embed
    shards: "{shards}"
    encoder: simclr
    device: cpu
  plain: &given {stage: pseudo_label, features: embed_by_class, label_fraction: 0.5, threshold: 0.5}
  with_test: {<<: *given, include_test: true}
  with_test_of_all: {<<: *given, features: embed_shards, include_test: true}
"""


def test_images_of_classes_that_train_has_not_are_refused(tmp_path: Path) -> None:
    """By the splits that the shards of the features have; in what shards their encoder learned does not matter."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    planner = runner.Planner(Store(tmp_path / "store"), load_recipe(tmp_path / "recipe.yaml", STAGES), print)
    assert len(runner.run(planner, ("plain", "with_test_of_all"), lambda _: None)) == 8
    with pytest.raises(UsageError) as caught:
        runner.run(planner, ("with_test",), lambda _: None)
    assert str(caught.value) == (
        "with_test.include_test: by_class has split_by: class, so that no test image is of a class of train, and each "
        "would get a wrong one: leave include_test out"
    )


def test_labels_that_the_encoder_saw_choose_no_threshold(
    run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = digits(tmp_path / "part", labels_seen=seen(0.05))
    found = metrics_of(run_stage("pseudo_label", {"label_fraction": 0.2}, {"features": part}))
    assert (found["counts"]["labelled"], found["out_of_fold"]["images"]) == (200, 150)
    assert [one["fraction"] for one in found["labels_seen"]] == [0.05, 0.2]
    given = run_stage("pseudo_label", FEW | {"threshold": 0.9}, {"features": part})
    assert metrics_of(given)["out_of_fold"] == {"images": 0, "precision": None, "coverage": None, "curve": []}
    assert "nothing is known of the precision of the threshold 0.9" in said_by(capsys)
    other = [seen(0.05)[0] | {"digest": labels_digest(["another.png"], ["digit 1"])}]
    labels = DIGITS.copy()
    labels[500:TRAIN] = -1
    run_stage("pseudo_label", {}, {"features": digits(tmp_path / "other", labels=labels, labels_seen=other)})
    assert "on labels that are not among those at hand" in said_by(capsys)


def test_nothing_above_the_threshold_is_said(
    run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = digits(tmp_path)
    files = run_stage("pseudo_label", FEW | {"threshold": 1.0}, {"features": features})
    assert rows_of(files) == []
    assert "no image is above the threshold: there are no pseudo-labels" in said_by(capsys)
    noise = np.random.default_rng(0).normal(size=(1797, 8))
    files = run_stage("pseudo_label", FEW, {"features": digits(tmp_path / "noise", features=noise)})
    metrics = metrics_of(files)
    assert (metrics["threshold"], metrics["counts"]["train"], rows_of(files)) == (None, 0, [])
    best = max(one["precision"] for one in metrics["out_of_fold"]["curve"])
    assert best < 0.95
    words = f"no threshold reaches a precision of 0.95 out of fold, on 50 labelled images ({best:.3f} at most)"
    assert words in said_by(capsys)


def test_settings_without_effect_are_left_out_of_the_key() -> None:
    assert PseudoLabel.model_validate({"features": "features"}).without_effect() == {"label_subset"}
    given = PseudoLabel.model_validate({"features": "features", "threshold": 0.9, "label_fraction": 0.1})
    assert given.without_effect() == {"precision"}
    with pytest.raises(ValueError, match=r"penalties\.smallest must be below"):
        PseudoLabel.model_validate({"features": "features", "penalties": {"smallest": 1.0, "largest": 0.1}})
