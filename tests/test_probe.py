"""The probe on scikit-learn's digits: figures against scikit-learn's, and nothing chosen on test."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import RunStage
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from pipeline.errors import BadData, NotFinite
from stages.evaluation import bootstrap_interval, held_out, label_subset, labels_digest, read_features

QUICK: dict[str, Any] = {"label_fractions": [0.02], "subsets": [2], "bootstrap_samples": 100}
PIXELS, DIGITS = (np.asarray(one) for one in load_digits(return_X_y=True))
TRAIN = 1000


def write_features(
    folder: Path,
    features: np.ndarray,
    labels: np.ndarray,
    splits: list[str],
    classes: list[str] | None = None,
    groups: Sequence[str | None] | None = None,
    labels_seen: Sequence[dict[str, Any]] = (),
    label_lists: Sequence[Sequence[int]] | None = None,
) -> Path:
    """As the stage embed writes them."""
    folder.mkdir(parents=True)
    names = classes or [f"digit {number}" for number in range(10)]
    dimension = features.shape[1]
    table = pa.table(
        {
            "id": pa.array(np.arange(len(labels)), pa.int64()),
            "key": [f"{number}.png" for number in range(len(labels))],
            "split": splits,
            "label": pa.array(labels, pa.int32()),
            "labels": pa.array(label_lists or [[one] if one >= 0 else [] for one in labels], pa.list_(pa.int32())),
            "group": pa.array(groups or [None] * len(labels), pa.string()),
            "features": pa.FixedSizeListArray.from_arrays(pa.array(features.astype(np.float32).ravel()), dimension),
        }
    )
    pq.write_table(table, folder / "features.parquet", row_group_size=300)
    encoder = {"kind": "pixels", "name": "pixels", "stage": None, "architecture": None, "image_size": 8}
    encoder |= {"labels_seen": list(labels_seen)}
    card = {"format": 1, "encoder": encoder, "dimension": dimension, "classes": names, "splits": {}}
    (folder / "features.json").write_text(json.dumps(card))
    return folder


def digits(
    folder: Path,
    *,
    rows: int = 1797,
    train: int = TRAIN,
    features: np.ndarray = PIXELS,
    labels: np.ndarray = DIGITS,
    splits: list[str] | None = None,
    classes: list[str] | None = None,
    **further: Any,
) -> Path:
    """The digits' pixels, the first `train` of them to train on."""
    parts = splits or ["train"] * train + ["test"] * (rows - train)
    return write_features(folder / "features", features[:rows], labels[:rows], parts, classes, **further)


def metrics_of(files: Path) -> dict[str, Any]:
    return json.loads((files / "metrics.json").read_text())


@pytest.fixture(scope="module")
def reference() -> tuple[StandardScaler, np.ndarray, np.ndarray]:
    scaler = StandardScaler().fit(PIXELS[:TRAIN])
    return scaler, scaler.transform(PIXELS[:TRAIN]), scaler.transform(PIXELS[TRAIN:])


def test_linear_figures_are_those_of_scikit_learn(
    run_stage: RunStage, tmp_path: Path, reference: tuple[StandardScaler, np.ndarray, np.ndarray]
) -> None:
    files = run_stage("probe", QUICK, {"features": digits(tmp_path)})
    linear = metrics_of(files)["linear"]
    _, train, test = reference
    model = LogisticRegression(C=1 / (linear["penalty"] * TRAIN), l1_ratio=0, tol=1e-7, max_iter=1000)
    model.fit(train, DIGITS[:TRAIN])
    truth, probabilities = DIGITS[TRAIN:], model.predict_proba(test)
    predicted = probabilities.argmax(1)
    assert linear["top1"] == pytest.approx((predicted == truth).mean(), abs=1e-9)
    assert linear["top5"] == pytest.approx(top_k_accuracy_score(truth, probabilities, k=5))
    assert linear["mean_per_class"] == pytest.approx(balanced_accuracy_score(truth, predicted))
    assert linear["confusion"] == confusion_matrix(truth, predicted).tolist()
    low, high = linear["top1_ci95"]
    assert low < linear["top1"] < high < low + 0.05
    table = pq.read_table(files / "predictions.parquet").to_pydict()
    assert table["id"] == list(range(TRAIN, 1797))
    assert table["label"] == truth.tolist()
    assert table["predicted"] == predicted.tolist()
    np.testing.assert_allclose(table["probability"], probabilities.max(1), atol=0.01)
    np.testing.assert_allclose(table["probability_of_label"], probabilities[np.arange(len(truth)), truth], atol=0.01)


def test_penalty_is_chosen_on_a_stratified_tenth_of_train(run_stage: RunStage, tmp_path: Path) -> None:
    """Each point of the path, by scikit-learn on the other nine tenths, standardised by them alone."""
    files = run_stage(
        "probe", QUICK | {"penalties": {"smallest": 1e-4, "count": 4}}, {"features": digits(tmp_path)}, seed=4
    )
    metrics = metrics_of(files)
    mask = held_out(DIGITS[:TRAIN], np.arange(TRAIN), 0.1, seed=4)
    assert mask.sum() == metrics["protocol"]["held_out"] == 100
    scaler = StandardScaler().fit(PIXELS[:TRAIN][~mask])
    fitted, asked = scaler.transform(PIXELS[:TRAIN][~mask]), scaler.transform(PIXELS[:TRAIN][mask])
    path = metrics["linear"]["path"]
    assert [point["penalty"] for point in path] == [1e-4, 1e-2, 1.0, 100.0]
    for point in path:
        model = LogisticRegression(C=1 / (point["penalty"] * 900), l1_ratio=0, tol=1e-6, max_iter=1000)
        score = model.fit(fitted, DIGITS[:TRAIN][~mask]).score(asked, DIGITS[:TRAIN][mask])
        assert point["accuracy"] == pytest.approx(score, abs=0.0001)
    best = max(path, key=lambda point: (point["accuracy"], point["penalty"]))
    assert metrics["linear"]["penalty"] == best["penalty"]


def test_neighbours_are_those_of_scikit_learn(run_stage: RunStage, tmp_path: Path) -> None:
    """On features as they are: neither centred nor scaled."""
    settings = QUICK | {"neighbours": [5, 2000]}
    files = run_stage("probe", settings, {"features": digits(tmp_path)})
    knn = metrics_of(files)["knn"]
    assert [knn[k]["k_used"] for k in ("5", "2000")] == [5, TRAIN]
    for k in (5, TRAIN):
        model = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.1))
        predicted = model.fit(PIXELS[:TRAIN], DIGITS[:TRAIN]).predict(PIXELS[TRAIN:])
        assert knn["5" if k == 5 else "2000"]["top1"] == pytest.approx((predicted == DIGITS[TRAIN:]).mean(), abs=0.0026)
        if k == 5:
            table = pq.read_table(files / "predictions.parquet")
            assert (np.array(table["neighbour_predicted"]) == predicted).mean() > 0.995


def test_label_curve_measures_nested_subsets(run_stage: RunStage, tmp_path: Path) -> None:
    settings = QUICK | {"label_fractions": [0.01, 0.1], "subsets": [3, 2], "neighbours": [5]}
    metrics = metrics_of(run_stage("probe", settings, {"features": digits(tmp_path)}, seed=1))
    curve = metrics["label_curve"]
    assert list(curve) == ["1pct", "10pct", "100pct"]
    one, ten, everything = curve.values()
    assert [point["labels"] for point in (one, ten, everything)] == [10, 100, 1000]
    assert [point["subsets"] for point in (one, ten, everything)] == [3, 2, 1]
    assert one["top1"] < ten["top1"] < everything["top1"] == metrics["linear"]["top1"]
    assert one["knn"]["5"]["top1"] < ten["knn"]["5"]["top1"] < everything["knn"]["5"]["top1"]
    assert everything["knn"]["5"]["top1"] == metrics["knn"]["5"]["top1"]
    assert one["fixed_penalty"], "one label a class"
    assert one["penalties"] == [0.1] * 3
    assert not ten["fixed_penalty"]
    assert everything["penalties"] == [metrics["linear"]["penalty"]]
    assert one["sd"] > 0
    assert "sd" not in everything, "one subset has no spread"

    expected = []
    for index in range(3):
        rows = label_subset(DIGITS[:TRAIN], np.arange(TRAIN), 0.01, seed=1, index=index)
        scaler = StandardScaler().fit(PIXELS[rows])
        model = LogisticRegression(C=1 / (0.1 * 10), l1_ratio=0, tol=1e-6)
        model.fit(scaler.transform(PIXELS[rows]), DIGITS[rows])
        # A pixel that is constant in the subset says nothing: scikit-learn would weigh it by 0 as well.
        expected.append(model.score(scaler.transform(PIXELS[TRAIN:]), DIGITS[TRAIN:]))
    assert one["top1"] == pytest.approx(np.mean(expected), abs=0.003)
    assert one["sd"] == pytest.approx(np.std(expected, ddof=1), abs=0.003)


def test_nothing_is_chosen_on_test(run_stage: RunStage, tmp_path: Path) -> None:
    """With other test labels everything but the scores is the same, to the byte."""
    labels = DIGITS.copy()
    labels[TRAIN:] = np.random.default_rng(0).permutation(labels[TRAIN:])
    first = run_stage("probe", QUICK, {"features": digits(tmp_path / "true")})
    second = run_stage("probe", QUICK, {"features": digits(tmp_path / "shuffled", labels=labels)})
    one, other = metrics_of(first), metrics_of(second)
    assert one["linear"]["top1"] > 0.9
    assert other["linear"]["top1"] < 0.2
    for metrics in (one, other):
        for score in ("top1", "top1_ci95", "top5", "mean_per_class", "confusion"):
            del metrics["linear"][score]
        for entry in (*metrics["knn"].values(), *metrics["label_curve"].values()):
            del entry["top1"]
        for entry in metrics["label_curve"].values():
            entry.pop("sd", None)
            del entry["by_subset"]
            entry["knn"] = [*entry["knn"]]
    assert one == other
    tables = [pq.read_table(files / "predictions.parquet") for files in (first, second)]
    for column in ("id", "key", "predicted", "probability", "neighbour_predicted"):
        assert tables[0][column].equals(tables[1][column]), column


def test_test_features_change_neither_models_nor_choices(run_stage: RunStage, tmp_path: Path) -> None:
    """The test part scaled a hundredfold: nothing may have been standardised by it."""
    scaled = np.concatenate([PIXELS[:TRAIN], 100 * PIXELS[TRAIN:]])
    one = metrics_of(run_stage("probe", QUICK, {"features": digits(tmp_path / "one")}))
    other = metrics_of(run_stage("probe", QUICK, {"features": digits(tmp_path / "other", features=scaled)}))
    assert one["linear"]["path"] == other["linear"]["path"]
    assert one["label_curve"]["2pct"]["penalties"] == other["label_curve"]["2pct"]["penalties"]
    assert one["knn"] == other["knn"], "cosine does not see length"


def test_same_bytes_each_time_and_others_for_another_seed(run_stage: RunStage, tmp_path: Path) -> None:
    features = digits(tmp_path)
    first, second, other = (run_stage("probe", QUICK, {"features": features}, seed=seed) for seed in (0, 0, 1))
    for name in ("metrics.json", "predictions.parquet"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert metrics_of(first)["label_curve"]["2pct"] != metrics_of(other)["label_curve"]["2pct"]


def test_scale_and_constant_dimensions_of_features_do_not_matter(run_stage: RunStage, tmp_path: Path) -> None:
    changed = np.concatenate([PIXELS * np.linspace(0.01, 50, 64) - 20, np.full((1797, 3), 0.3)], axis=1)
    one = metrics_of(run_stage("probe", QUICK, {"features": digits(tmp_path / "one")}))
    other = metrics_of(run_stage("probe", QUICK, {"features": digits(tmp_path / "other", features=changed)}))
    assert other["linear"]["top1"] == pytest.approx(one["linear"]["top1"], abs=0.006)


def test_few_classes_have_no_top5(run_stage: RunStage, tmp_path: Path) -> None:
    labels = DIGITS % 5
    features = digits(tmp_path, labels=labels, classes=[f"rest {number}" for number in range(5)])
    assert "top5" not in metrics_of(run_stage("probe", QUICK, {"features": features}))["linear"]


def test_class_that_train_lacks_counts_as_wrong(
    run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = np.array(["train"] * TRAIN + ["test"] * 797)
    splits[(DIGITS == 7) & (splits == "train")] = "val"
    metrics = metrics_of(run_stage("probe", QUICK, {"features": digits(tmp_path, splits=splits.tolist())}))
    count = int((DIGITS[TRAIN:] == 7).sum())
    assert f"no training image has the class 'digit 7': {count} test images count as wrong" in capsys.readouterr().err
    confusion = np.array(metrics["linear"]["confusion"])
    assert confusion[7].sum() == count
    assert confusion[:, 7].sum() == 0
    assert metrics["linear"]["top1"] < 1 - count / 797
    assert metrics["linear"]["top5"] <= 1 - count / 797, "not even among five"


def test_unlabelled_images_are_left_out_and_said(
    run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = DIGITS.copy()
    labels[:100] = labels[-7:] = -1
    metrics = metrics_of(run_stage("probe", QUICK, {"features": digits(tmp_path, labels=labels)}))
    assert (metrics["protocol"]["train"], metrics["protocol"]["test"]) == (900, 790)
    assert "100 of 1,000 train images have no label" in capsys.readouterr().err


def test_edge_of_the_path_is_warned_of(run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = QUICK | {"penalties": {"smallest": 30.0, "largest": 3000.0, "count": 3}}
    metrics = metrics_of(run_stage("probe", settings, {"features": digits(tmp_path)}))
    assert metrics["linear"]["penalty_at_edge"]
    assert "at the edge of the path" in capsys.readouterr().err


def test_too_few_iterations_are_counted_and_warned_of(
    run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    protocol = metrics_of(run_stage("probe", QUICK | {"max_iterations": 1}, {"features": digits(tmp_path)}))["protocol"]
    assert not protocol["converged"]
    assert 0 < protocol["not_converged"] <= protocol["fits"] == 22 + 2 * (5 * 21 + 1)
    assert f"{protocol['not_converged']} of {protocol['fits']} logistic regressions" in " ".join(
        capsys.readouterr().err.split()
    )


def test_one_label_a_class_in_all_of_train(run_stage: RunStage, tmp_path: Path) -> None:
    metrics = metrics_of(run_stage("probe", QUICK, {"features": digits(tmp_path, rows=200, train=10)}))
    assert metrics["linear"]["fixed_penalty"]
    assert metrics["linear"]["path"] == []
    assert metrics["label_curve"]["100pct"]["fixed_penalty"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": np.full(1797, -1)}, "no train image has a label"),
        ({"labels": np.where(np.arange(1797) < TRAIN, DIGITS, -1)}, "no test image has a label"),
        ({"labels": np.full(1797, 3)}, "all 1,000 training images are 'digit 3'"),
        ({"splits": ["train"] * 1797}, "no test split"),
        ({"splits": ["test"] * 1797}, "no train split"),
    ],
)
def test_data_that_a_probe_cannot_use(
    run_stage: RunStage, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadData, match=message):
        run_stage("probe", QUICK, {"features": digits(tmp_path, **changed)})


def test_features_that_are_not_finite(run_stage: RunStage, tmp_path: Path) -> None:
    features = PIXELS.copy()
    features[5, 3] = np.nan
    with pytest.raises(NotFinite, match="NaN"):
        run_stage("probe", QUICK, {"features": digits(tmp_path, features=features)})


def test_collapsed_features_are_scored_as_what_they_are(run_stage: RunStage, tmp_path: Path) -> None:
    metrics = metrics_of(run_stage("probe", QUICK, {"features": digits(tmp_path, features=np.ones((1797, 4)))}))
    most_frequent = np.bincount(DIGITS[:TRAIN]).argmax()
    assert metrics["linear"]["top1"] == pytest.approx((DIGITS[TRAIN:] == most_frequent).mean())
    assert torch.isfinite(torch.tensor(metrics["linear"]["top1_ci95"])).all()


def video_groups(size: int = 12) -> list[str | None]:
    """Neighbouring digits as frames of one video, those of train and those of test apart."""
    return [f"{'train' if row < TRAIN else 'test'} {row // size}" for row in range(1797)]


def test_groups_stay_together_wherever_something_is_held_out(run_stage: RunStage, tmp_path: Path) -> None:
    groups = video_groups()
    files = run_stage("probe", QUICK, {"features": digits(tmp_path, groups=groups)})
    metrics = metrics_of(files)
    numbers = np.unique(np.array(groups[:TRAIN]), return_inverse=True)[1]
    mask = held_out(DIGITS[:TRAIN], np.arange(TRAIN), 0.1, 0, numbers)
    assert metrics["protocol"]["held_out"] == mask.sum() == pytest.approx(100, abs=6)
    shared = len(set(groups[:TRAIN]) & set(groups[TRAIN:]))
    assert shared == 0
    assert metrics["protocol"]["groups"] == {"train": 84, "test": 67, "test_images_shared": 0}
    right = np.asarray(pq.read_table(files / "predictions.parquet")["predicted"]) == DIGITS[TRAIN:]
    numbers = np.unique(np.array(groups[TRAIN:]), return_inverse=True)[1]
    expected = bootstrap_interval(right, 100, 0, groups=numbers)
    assert metrics["linear"]["top1_ci95"] == pytest.approx(list(expected), abs=0.02)
    assert metrics["linear"]["top1_ci95"] != list(bootstrap_interval(right, 100, 0))


def test_groups_of_one_image_change_nothing_but_their_count(run_stage: RunStage, tmp_path: Path) -> None:
    own: list[str | None] = [f"patient {row}" for row in range(1797)]
    one = metrics_of(run_stage("probe", QUICK, {"features": digits(tmp_path / "one")}))
    other = metrics_of(run_stage("probe", QUICK, {"features": digits(tmp_path / "other", groups=own)}))
    assert one["protocol"].pop("groups") is None
    assert other["protocol"].pop("groups") == {"train": TRAIN, "test": 797, "test_images_shared": 0}
    assert one == other


def test_what_groups_make_impossible_is_said(
    run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = video_groups()
    for row in np.flatnonzero(DIGITS == 3):
        groups[row] = "all threes"
    run_stage("probe", QUICK, {"features": digits(tmp_path, groups=groups)})
    said = " ".join(capsys.readouterr().err.split())
    threes = int((DIGITS[TRAIN:] == 3).sum())
    assert f"{threes} of 797 test images are of a group that has training images too" in said
    assert "all training images of 'digit 3' are of one group" in said


def test_a_group_for_each_class_leaves_nothing_to_choose_by(
    run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups: list[str | None] = [f"hand {label}" for label in DIGITS]
    metrics = metrics_of(run_stage("probe", QUICK, {"features": digits(tmp_path, groups=groups)}))
    assert metrics["linear"]["fixed_penalty"]
    assert metrics["protocol"]["held_out"] == 0
    assert metrics["linear"]["top1"] > 0.85
    said = " ".join(capsys.readouterr().err.split())
    assert "no group of training images can be held out without losing a class" in said
    assert "are of 10 groups" not in said
    assert "797 of 797 test images are of a group" in said


def seen(fraction: float, subset: int = 0, seed: int = 0) -> list[dict[str, Any]]:
    """Of the first TRAIN digits, as the stage finetune writes it."""
    rows = label_subset(DIGITS[:TRAIN], np.arange(TRAIN), fraction, seed, subset)
    digest = labels_digest((f"{row}.png" for row in rows), (f"digit {DIGITS[row]}" for row in rows))
    entry = {"loss": "arcface", "fraction": fraction, "subset": subset, "seed": seed, "samples": len(rows)}
    return [entry | {"digest": digest}]


def test_an_encoder_that_saw_labels_is_measured_on_those_alone(
    run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = QUICK | {"label_fractions": [0.02, 0.1, 0.5], "subsets": [3, 3, 2], "neighbours": [5]}
    plain = metrics_of(run_stage("probe", settings, {"features": digits(tmp_path / "plain")}))
    labels_seen = seen(0.1, subset=2)
    tuned = metrics_of(run_stage("probe", settings, {"features": digits(tmp_path / "tuned", labels_seen=labels_seen)}))
    assert tuned["encoder"]["labels_seen"] == labels_seen
    below, exact, above, everything = tuned["label_curve"].values()
    assert (below["top1"], below["subset_indices"], below["labels"]) == (None, [], 20)
    assert below["knn"] == {"5": {"top1": None, "by_subset": []}}
    assert (exact["subset_indices"], exact["encoder_saw_exactly"]) == ([2], True)
    # Held-out labels that the encoder learned from choose no penalty.
    assert (exact["fixed_penalty"], exact["penalties"]) == (True, [0.1])
    chosen = label_subset(DIGITS[:TRAIN], np.arange(TRAIN), 0.1, seed=0, index=2)
    scaler = StandardScaler().fit(PIXELS[chosen])
    model = LogisticRegression(C=1 / (0.1 * 100), l1_ratio=0, tol=1e-7, max_iter=1000)
    model.fit(scaler.transform(PIXELS[chosen]), DIGITS[chosen])
    assert exact["top1"] == pytest.approx(model.score(scaler.transform(PIXELS[TRAIN:]), DIGITS[TRAIN:]), abs=1e-9)
    assert not above["fixed_penalty"]
    assert not everything["fixed_penalty"]
    assert exact["knn"]["5"]["top1"] == plain["label_curve"]["10pct"]["knn"]["5"]["by_subset"][2]
    assert "sd" not in exact
    assert (above["subset_indices"], above["encoder_saw_exactly"], above["encoder_saw"]) == ([2], False, 0.1)
    assert everything["top1"] == plain["label_curve"]["100pct"]["top1"]
    assert (everything["encoder_saw"], everything["encoder_saw_exactly"]) == (0.1, False)
    assert "nothing is measured at 2% of the labels, because the encoder saw others (10% of all)" in " ".join(
        capsys.readouterr().err.split()
    )
    for entry in plain["label_curve"].values():
        assert (entry["encoder_saw"], entry["encoder_saw_exactly"]) == (0, True)
        assert entry["subset_indices"] == list(range(entry["subsets"]))
        assert entry["top1"] == pytest.approx(np.mean(entry["by_subset"]))


def test_an_encoder_that_saw_all_labels_has_a_fixed_penalty(
    run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = metrics_of(run_stage("probe", QUICK, {"features": digits(tmp_path, labels_seen=seen(1))}))
    assert (metrics["linear"]["fixed_penalty"], metrics["linear"]["penalty"]) == (True, 0.1)
    assert metrics["linear"]["path"] == []
    assert not metrics["linear"]["penalty_at_edge"]
    assert metrics["protocol"]["held_out"] == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "the encoder learned from the labels that could choose the penalty: it is 0.1, fixed" in said


def test_labels_that_the_encoder_saw_choose_no_penalty(run_stage: RunStage, tmp_path: Path) -> None:
    """Held-out images that it did not see still do."""
    metrics = metrics_of(run_stage("probe", QUICK, {"features": digits(tmp_path, labels_seen=seen(0.5))}))
    mask = held_out(DIGITS[:TRAIN], np.arange(TRAIN), 0.1, seed=0)
    mask[label_subset(DIGITS[:TRAIN], np.arange(TRAIN), 0.5, 0, 0)] = False
    assert metrics["protocol"]["held_out"] == mask.sum() > 20
    assert not metrics["linear"]["fixed_penalty"]


def test_an_encoder_that_saw_labels_of_another_seed_has_no_fair_small_subset(
    run_stage: RunStage, tmp_path: Path
) -> None:
    features = digits(tmp_path, labels_seen=seen(0.02, seed=1))
    curve = metrics_of(run_stage("probe", QUICK, {"features": features}))["label_curve"]
    assert curve["2pct"]["top1"] is None
    assert curve["100pct"]["top1"] is not None


@pytest.mark.parametrize(("fraction", "seed"), [(0.5, 1), (1, 0)])
def test_labels_of_another_seed_are_known_and_those_of_other_images_are_said(
    run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str], fraction: float, seed: int
) -> None:
    labels_seen = seen(fraction, seed=seed)
    metrics = metrics_of(run_stage("probe", QUICK, {"features": digits(tmp_path / "own", labels_seen=labels_seen)}))
    mask = held_out(DIGITS[:TRAIN], np.arange(TRAIN), 0.1, seed=0)
    mask[label_subset(DIGITS[:TRAIN], np.arange(TRAIN), fraction, seed, 0)] = False
    assert metrics["protocol"]["held_out"] == mask.sum()
    assert metrics["protocol"]["encoder_saw_other_labels"] is False
    assert "are not among those at hand" not in capsys.readouterr().err
    labels_seen[0]["digest"] = labels_digest(["another.png"], ["digit 1"])
    metrics = metrics_of(run_stage("probe", QUICK, {"features": digits(tmp_path / "other", labels_seen=labels_seen)}))
    assert metrics["protocol"]["encoder_saw_other_labels"] is True
    assert "on labels that are not among those at hand" in " ".join(capsys.readouterr().err.split())


def many_classes(folder: Path, classes: int = 400) -> Path:
    """Three training images and one test image a class, as drawings by four hands."""
    random = np.random.default_rng(0)
    labels = np.tile(np.arange(classes), 4)
    features = random.normal(size=(classes, 32))[labels] + 0.4 * random.normal(size=(4 * classes, 32))
    splits = ["train"] * (3 * classes) + ["test"] * classes
    return write_features(folder / "features", features, labels, splits, [f"emoji {one}" for one in range(classes)])


@pytest.mark.filterwarnings("ignore:The number of unique classes")  # by scikit-learn, of one label a class
def test_many_classes_of_three_images(run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = QUICK | {"label_fractions": [0.01, 0.1], "subsets": [2, 1], "neighbours": [1, 3, 20]}
    settings |= {"penalties": {"smallest": 1e-4, "largest": 1.0, "count": 4}}
    files = run_stage("probe", settings, {"features": many_classes(tmp_path)})
    metrics = metrics_of(files)
    assert "confusion" not in metrics["linear"]
    table = pq.read_table(files / "predictions.parquet").to_pydict()
    counted = dict.fromkeys(zip(table["label"], table["predicted"], strict=True), 1)
    assert {(label, named): count for label, named, count in metrics["linear"]["confusion_cells"]} == counted
    assert metrics["knn"]["1"]["top1"] > 0.9
    said = " ".join(capsys.readouterr().err.split())
    assert "k = 20 is more than the 3 training images of the largest class" in said
    assert "0.01 of 1,200 labels are fewer than the 400 classes: one of each makes 33.3%" in said
    one, ten, _ = metrics["label_curve"].values()
    assert one["labels"] == ten["labels"] == 400
    assert one["by_subset"][0] == ten["by_subset"][0]
    assert one["fixed_penalty"]
    # One label a class: scikit-learn's C = 1, whatever the number of classes.
    assert one["penalties"] == [1 / 400] * 2
    features = read_features(tmp_path / "features")
    train, test = (features.select(np.flatnonzero(features.splits == split)) for split in ("train", "test"))
    part = train.select(label_subset(train.labels.numpy(), train.ids, 0.01, 0, 0))
    scale = StandardScaler().fit(part.features)
    model = LogisticRegression(C=1.0, tol=1e-6, max_iter=1000).fit(scale.transform(part.features), part.labels)
    assert one["by_subset"][0] == pytest.approx(model.score(scale.transform(test.features), test.labels), abs=0.005)
    assert metrics["protocol"]["fits"] == 4 + 1 + 2, "the subset of both shares is measured once"
    assert (files / "metrics.json").stat().st_size < 100_000
