"""The probe on mosaics of digits, images with several labels: figures by scikit-learn, and nothing chosen on test."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import RunStage
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score
from sklearn.preprocessing import StandardScaler
from test_probe import digits, metrics_of, write_features

from benchmarks.mosaics import Mosaics, make_mosaics, write_mosaics
from pipeline.errors import BadData
from stages.evaluation import iterative_folds
from stages.evaluation.thresholds import choose_thresholds

QUICK: dict[str, Any] = {
    "bootstrap_samples": 100,
    "penalties": {"smallest": 1e-4, "largest": 1.0, "count": 5},
    "neighbours": [5],
}
NAMES = [f"digit {number}" for number in range(10)]
TRAIN, TEST = make_mosaics(500, part="train"), make_mosaics(300, part="test")
PIXELS = np.concatenate([TRAIN.pixels, TEST.pixels])
TARGETS = np.concatenate([TRAIN.targets, TEST.targets])


def mosaics(
    folder: Path,
    *,
    pixels: np.ndarray = PIXELS,
    targets: np.ndarray = TARGETS,
    groups: Sequence[str | None] | None = None,
    train: int = 500,
    classes: list[str] | None = None,
    **further: Any,
) -> Path:
    """Features of mosaics, as the stage embed writes them."""
    lists = [np.flatnonzero(row).tolist() for row in targets]
    single = np.array([one[0] if len(one) == 1 else -1 for one in lists])
    splits = ["train"] * train + ["test"] * (len(pixels) - train)
    return write_features(
        folder / "features", pixels, single, splits, classes or NAMES, groups=groups, label_lists=lists, **further
    )


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def reference_probabilities(penalty: float, fitted: np.ndarray, asked: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """scikit-learn, label by label, on features standardised by what it is fitted to."""
    scale = StandardScaler().fit(fitted)
    found = np.zeros((len(asked), targets.shape[1]))
    for label in np.flatnonzero(targets.any(0)):
        model = LogisticRegression(C=1 / (penalty * len(fitted)), l1_ratio=0, tol=1e-7, max_iter=2000)
        model.fit(scale.transform(fitted), targets[:, label])
        found[:, label] = model.predict_proba(scale.transform(asked))[:, 1]
    return found


def test_figures_are_those_of_scikit_learn(run_stage: RunStage, tmp_path: Path) -> None:
    files = run_stage("probe", QUICK, {"features": mosaics(tmp_path)}, seed=2)
    metrics = metrics_of(files)
    assert metrics["several_labels"] is True
    linear = metrics["linear"]

    fold = iterative_folds(TRAIN.targets, np.arange(500), 5, 2)
    judged = np.array([len(set(fold[TRAIN.targets[:, label]].tolist())) > 1 for label in range(10)])
    by_penalty = {}
    for point in linear["path"]:
        out_of_fold = np.zeros(TRAIN.targets.shape)
        for number in range(5):
            inside = fold == number
            out_of_fold[inside] = reference_probabilities(
                point["penalty"], TRAIN.pixels[~inside], TRAIN.pixels[inside], TRAIN.targets[~inside]
            )
        by_penalty[point["penalty"]] = out_of_fold
        expected = average_precision_score(TRAIN.targets[:, judged], out_of_fold[:, judged], average="macro")
        assert point["map"] == pytest.approx(expected, abs=2e-3)
    best = max(linear["path"], key=lambda point: (point["map"], point["penalty"]))
    assert linear["penalty"] == best["penalty"]

    probabilities = reference_probabilities(linear["penalty"], TRAIN.pixels, TEST.pixels, TRAIN.targets)
    there = TEST.targets.any(0)
    expected = average_precision_score(TEST.targets[:, there], probabilities[:, there], average="macro")
    assert linear["map"] == pytest.approx(expected, abs=2e-3)
    thresholds = choose_thresholds("per_class", by_penalty[linear["penalty"]], TRAIN.targets, judged)
    np.testing.assert_allclose(linear["thresholds"]["per_class"], thresholds.values, atol=0.02)
    assert linear["thresholds"]["kind"] == "per_class"
    assert linear["thresholds"]["global"] == pytest.approx(thresholds.overall, abs=0.02)

    table = pq.read_table(files / "predictions.parquet").to_pydict()
    assert table["id"] == list(range(500, 800))
    np.testing.assert_allclose(table["scores"], probabilities, atol=0.01)
    predicted = np.array([np.isin(np.arange(10), one) for one in table["predicted"]])
    named = np.array(table["scores"]) >= np.array(linear["thresholds"]["per_class"])
    assert (predicted == named).mean() > 0.999
    assert [np.flatnonzero(row).tolist() for row in TEST.targets] == table["labels"]
    assert linear["macro_f1"] == pytest.approx(f1_score(TEST.targets[:, there], predicted[:, there], average="macro"))
    assert linear["micro_f1"] == pytest.approx(f1_score(TEST.targets, predicted, average="micro"))
    for name in ("map", "macro_f1", "micro_f1"):
        low, high = linear[f"{name}_ci95"]
        assert low < linear[name] < high

    rows = linear["per_class"]
    assert [row["train"] for row in rows] == sorted(TRAIN.targets.sum(0).tolist()), "rare labels first"
    for row in rows:
        label = NAMES.index(row["name"])
        assert row["test"] == TEST.targets[:, label].sum()
        assert row["f1"] == pytest.approx(f1_score(TEST.targets[:, label], predicted[:, label], zero_division=0))
        assert row["threshold"] == linear["thresholds"]["per_class"][label]
    protocol = metrics["protocol"]
    assert (protocol["train"], protocol["test"], protocol["folds"], protocol["converged"]) == (500, 300, 5, True)
    assert protocol["labels_per_train_image"] == pytest.approx(TRAIN.targets.sum(1).mean())


def test_neighbours_vote_label_by_label(run_stage: RunStage, tmp_path: Path) -> None:
    files = run_stage("probe", QUICK | {"neighbours": [5, 2000]}, {"features": mosaics(tmp_path)})
    knn = metrics_of(files)["knn"]
    assert [knn[k]["k_used"] for k in ("5", "2000")] == [5, 500]

    def votes(asked: np.ndarray, gallery: np.ndarray, targets: np.ndarray) -> np.ndarray:
        one, other = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (asked, gallery))
        cosine = one.astype(np.float64) @ other.T.astype(np.float64)
        found = np.argsort(-cosine, axis=1, kind="stable")[:, :5]
        weights = np.exp(np.take_along_axis(cosine, found, 1) / 0.1)
        return (weights[:, :, None] * targets[found]).sum(1) / weights.sum(1)[:, None]

    scores = votes(TEST.pixels, TRAIN.pixels, TRAIN.targets)
    there = TEST.targets.any(0)
    expected = average_precision_score(TEST.targets[:, there], scores[:, there], average="macro")
    assert knn["5"]["map"] == pytest.approx(expected, abs=2e-3)
    fold = iterative_folds(TRAIN.targets, np.arange(500), 5, 0)
    out_of_fold = np.zeros(TRAIN.targets.shape)
    for number in range(5):
        inside = fold == number
        out_of_fold[inside] = votes(TRAIN.pixels[inside], TRAIN.pixels[~inside], TRAIN.targets[~inside])
    judged = np.array([len(set(fold[TRAIN.targets[:, label]].tolist())) > 1 for label in range(10)])
    thresholds = choose_thresholds("per_class", out_of_fold, TRAIN.targets, judged)
    np.testing.assert_allclose(knn["5"]["thresholds"]["per_class"], thresholds.values, atol=1e-3)
    expected = f1_score(TEST.targets[:, there], thresholds.apply(scores)[:, there], average="macro")
    assert knn["5"]["macro_f1"] == pytest.approx(expected, abs=5e-3)


SCORES = ("map", "map_ci95", "macro_f1", "macro_f1_ci95", "micro_f1", "micro_f1_ci95")


def test_nothing_is_chosen_on_test(run_stage: RunStage, tmp_path: Path) -> None:
    """With other test labels everything but the scores is the same, to the byte."""
    shuffled = TARGETS.copy()
    shuffled[500:] = np.random.default_rng(0).permutation(shuffled[500:])
    settings = QUICK | {"transfer": True}
    first = run_stage("probe", settings, {"features": mosaics(tmp_path / "true")})
    second = run_stage("probe", settings, {"features": mosaics(tmp_path / "shuffled", targets=shuffled)})
    one, other = metrics_of(first), metrics_of(second)
    assert one["linear"]["map"] > other["linear"]["map"] + 0.2
    for metrics in (one, other):
        for name in SCORES:
            del metrics["linear"][name]
        for row in metrics["linear"]["per_class"]:
            for name in ("precision", "recall", "f1", "average_precision"):
                del row[name]
        for name in ("map", "macro_f1", "micro_f1"):
            del metrics["knn"]["5"][name]
        for name in ("right_to_wrong", "wrong_to_right", "before", "after", "macro_f1_gain_ci95"):
            del metrics["transfer"][name]
    assert one == other
    tables = [pq.read_table(files / "predictions.parquet") for files in (first, second)]
    for column in ("id", "key", "predicted", "scores", "neighbour_predicted"):
        assert tables[0][column].equals(tables[1][column]), column


def test_test_features_change_neither_models_nor_choices(run_stage: RunStage, tmp_path: Path) -> None:
    scaled = np.concatenate([TRAIN.pixels, 128 * TEST.pixels])
    one = metrics_of(run_stage("probe", QUICK, {"features": mosaics(tmp_path / "one")}))
    other = metrics_of(run_stage("probe", QUICK, {"features": mosaics(tmp_path / "other", pixels=scaled)}))
    assert one["linear"]["path"] == other["linear"]["path"]
    assert one["linear"]["thresholds"] == other["linear"]["thresholds"]
    assert one["knn"] == other["knn"], "cosine does not see length"


def test_same_bytes_each_time_and_others_for_another_seed(run_stage: RunStage, tmp_path: Path) -> None:
    features = mosaics(tmp_path)
    first, second, other = (run_stage("probe", QUICK, {"features": features}, seed=seed) for seed in (0, 0, 1))
    for name in ("metrics.json", "predictions.parquet"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert metrics_of(first)["linear"]["path"] != metrics_of(other)["linear"]["path"]


@pytest.mark.parametrize("kind", ["global", "prevalence"])
def test_other_thresholds(run_stage: RunStage, tmp_path: Path, kind: str) -> None:
    plain = metrics_of(run_stage("probe", QUICK, {"features": mosaics(tmp_path)}))["linear"]
    found = metrics_of(run_stage("probe", QUICK | {"thresholds": kind}, {"features": tmp_path / "features"}))["linear"]
    assert found["thresholds"]["kind"] == kind
    assert found["thresholds"]["global"] == plain["thresholds"]["global"]
    assert found["map"] == plain["map"], "it knows no threshold"
    assert found["thresholds"]["per_class"] != plain["thresholds"]["per_class"]
    if kind == "global":
        assert found["thresholds"]["per_class"] == [found["thresholds"]["global"]] * 10


def test_labels_of_nearly_equal_images_are_transferred(run_stage: RunStage, tmp_path: Path) -> None:
    """Half of the test images are training images with a little noise, and so are half of train among themselves."""
    random = np.random.default_rng(0)
    pixels, targets = PIXELS.copy(), TARGETS.copy()
    pixels[1:500:4], targets[1:500:4] = pixels[:500:4], targets[:500:4]
    pixels[500:650], targets[500:650] = pixels[:150], targets[:150]
    pixels += random.normal(scale=2, size=pixels.shape).astype(np.float32)
    features = mosaics(tmp_path, pixels=pixels, targets=targets)
    metrics = metrics_of(run_stage("probe", QUICK | {"transfer": True}, {"features": features}))
    found = metrics["transfer"]
    assert 0.9 < found["threshold"] < 1
    assert 150 <= found["above_threshold"] < 300
    assert found["changed"] <= found["above_threshold"]
    assert found["wrong_to_right"] > 15 > 3 > found["right_to_wrong"]
    assert found["after"]["macro_f1"] > found["before"]["macro_f1"] + 0.01
    low, high = found["macro_f1_gain_ci95"]
    assert 0 < low < found["after"]["macro_f1"] - found["before"]["macro_f1"] < high
    assert found["before"]["macro_f1"] == metrics["linear"]["macro_f1"]
    assert found["before"]["micro_f1"] == metrics["linear"]["micro_f1"]
    plain = metrics_of(run_stage("probe", QUICK, {"features": features}))
    assert "transfer" not in plain
    assert plain["linear"] == metrics["linear"]


def test_one_label_an_image_is_probed_as_ever(
    run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a single image with two, in train or in test, changes the way; in val it does not."""
    settings = {"label_fractions": [], "subsets": [], "bootstrap_samples": 100, "transfer": True}
    settings |= {"penalties": {"smallest": 1e-3, "largest": 1.0, "count": 2}}
    metrics = metrics_of(run_stage("probe", settings, {"features": digits(tmp_path / "one")}))
    assert "top1" in metrics["linear"]
    assert "transfer is for images with several labels" in said(capsys)
    for row, several in ((3, True), (1500, True), (1200, False)):
        values = digits(tmp_path / f"of {row}", splits=["train"] * 1000 + ["val"] * 300 + ["test"] * 497)
        table = pq.read_table(values / "features.parquet")
        lists, labels = table["labels"].to_pylist(), table["label"].to_pylist()
        lists[row], labels[row] = [1, 4], -1
        table = table.set_column(4, "labels", pa.array(lists, pa.list_(pa.int32())))
        table = table.set_column(3, "label", pa.array(labels, pa.int32()))
        pq.write_table(table, values / "features.parquet")
        metrics = metrics_of(run_stage("probe", settings, {"features": values}))
        assert metrics.get("several_labels", False) is several
        assert ("map" in metrics["linear"]) is several


def test_labels_that_train_or_test_lacks_are_said(
    run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = TARGETS.copy()
    targets[:500, 3] = False
    targets[500:, 4] = False
    lost = int(targets[500:, 3].sum())
    alone = np.flatnonzero(targets[:500, 9])
    targets[alone[1:], 9] = False
    targets[:500, 0] |= ~targets[:500].any(1)
    targets[500:, 0] |= ~targets[500:].any(1)
    metrics = metrics_of(run_stage("probe", QUICK, {"features": mosaics(tmp_path, targets=targets)}))
    text = said(capsys)
    assert f"no training image has the label 'digit 3': it is named for none of the {lost} test images" in text
    assert "no test image has the label 'digit 4'" in text
    assert "'digit 9' cannot be judged out of fold" in text
    rows = {row["name"]: row for row in metrics["linear"]["per_class"]}
    first = metrics["linear"]["per_class"][0]
    assert (first["name"], first["f1"], first["predicted"], first["threshold"]) == ("digit 3", 0, 0, None)
    assert first["average_precision"] == pytest.approx(lost / 300), "that of a coin"
    assert (rows["digit 4"]["f1"], rows["digit 4"]["test"]) == (None, 0)
    assert rows["digit 9"]["threshold"] == metrics["linear"]["thresholds"]["global"]
    scored = [row["f1"] for row in rows.values() if row["f1"] is not None]
    assert metrics["linear"]["macro_f1"] == pytest.approx(np.mean(scored))
    assert len(scored) == 9


def test_unlabelled_images_are_left_out_and_said(
    run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = TARGETS.copy()
    targets[:40] = targets[-7:] = False
    protocol = metrics_of(run_stage("probe", QUICK, {"features": mosaics(tmp_path, targets=targets)}))["protocol"]
    assert (protocol["train"], protocol["test"]) == (460, 293)
    assert "40 of 500 train images have no label" in said(capsys)


def one_group() -> list[str | None]:
    return [*["one"] * 500, *(f"test {row}" for row in range(300))]


def two_images() -> np.ndarray:
    """Train is one image of the first five digits, and one of the others."""
    targets = TARGETS.copy()
    targets[:2] = np.arange(10) // 5 == [[0], [1]]
    return targets


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"targets": np.tile(np.arange(10) < 2, (800, 1))}, "all 500 training images have the same labels"),
        ({"groups": one_group()}, "all 500 training images are of one group"),
        ({"train": 800}, "no test split"),
        ({"targets": np.where(np.arange(800)[:, None] < 500, TARGETS, False)}, "no test image has a label"),
        ({"targets": two_images(), "train": 2}, "none can be judged out of fold"),
    ],
)
def test_data_that_a_probe_cannot_use(
    run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, Any], message: str
) -> None:
    features = mosaics(tmp_path, **changed)
    with pytest.raises(BadData, match=message) as caught:
        run_stage("probe", QUICK, {"features": features})
    assert caught.value.exit_code == 6
    metrics = metrics_of(run_stage("probe", QUICK | {"without_labels": "pass"}, {"features": features}))
    assert message in metrics["without_labels"]
    assert "no probe" in said(capsys)


def test_groups_stay_together(run_stage: RunStage, tmp_path: Path) -> None:
    train, test = make_mosaics(500, part="train", group_size=5), make_mosaics(300, part="test", group_size=5)
    groups = [f"train {one}" for one in train.groups] + [f"test {one}" for one in test.groups]
    both = {
        "pixels": np.concatenate([train.pixels, test.pixels]),
        "targets": np.concatenate([train.targets, test.targets]),
    }
    metrics = metrics_of(run_stage("probe", QUICK, {"features": mosaics(tmp_path / "groups", groups=groups, **both)}))
    assert metrics["protocol"]["groups"] == {"train": 100, "test": 60, "test_images_shared": 0}
    fold = iterative_folds(train.targets, np.arange(500), 5, 0, train.groups)
    point = metrics["linear"]["path"][2]
    found = np.zeros(train.targets.shape)
    for inside in (fold == number for number in range(5)):
        fitted, asked = train.pixels[~inside], train.pixels[inside]
        found[inside] = reference_probabilities(point["penalty"], fitted, asked, train.targets[~inside])
    judged = [label for label in range(10) if len(set(fold[train.targets[:, label]].tolist())) > 1]
    expected = average_precision_score(train.targets[:, judged], found[:, judged], average="macro")
    assert point["map"] == pytest.approx(expected, abs=2e-3)
    low, high = metrics["linear"]["micro_f1_ci95"]
    single = metrics_of(run_stage("probe", QUICK, {"features": mosaics(tmp_path / "single", **both)}))
    narrow = single["linear"]["micro_f1_ci95"]
    assert high - low > 1.3 * (narrow[1] - narrow[0]), "images of a group are no independent evidence"
    assert single["linear"]["path"][2]["map"] > point["map"], "nor may they be on both sides"


def test_labels_that_the_encoder_saw_are_said(
    run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = {"loss": "arcface", "fraction": 1, "subset": 0, "seed": 0, "samples": 500, "digest": "0" * 64}
    metrics = metrics_of(run_stage("probe", QUICK, {"features": mosaics(tmp_path, labels_seen=[seen])}))
    assert metrics["protocol"]["encoder_saw_labels"] is True
    assert "the encoder was fine-tuned on labels" in said(capsys)


def test_edges_and_iterations_are_warned_of(
    run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = QUICK | {"penalties": {"smallest": 1.0, "largest": 10.0, "count": 2}, "max_iterations": 1}
    metrics = metrics_of(run_stage("probe", settings, {"features": mosaics(tmp_path)}))
    assert metrics["linear"]["penalty_at_edge"]
    protocol = metrics["protocol"]
    assert 0 < protocol["not_converged"] <= protocol["fits"] == (5 * 2 + 1) * 10
    text = said(capsys)
    assert "at the edge of the path" in text
    assert f"{protocol['not_converged']} of {protocol['fits']} logistic regressions" in text


def test_from_a_table_to_metrics(run_stage: RunStage, tmp_path: Path) -> None:
    parts: dict[str, Mosaics] = {"train": make_mosaics(200, part="train"), "test": make_mosaics(100, part="test")}
    table = write_mosaics(tmp_path / "mosaics", parts, NAMES)
    shards = run_stage("shard", {"source": f"csv:{table}"})
    features = run_stage("embed", {"encoder": "pixels"}, {"shards": shards})
    metrics = metrics_of(run_stage("probe", QUICK, {"features": features}))
    present = [name for label, name in enumerate(NAMES) if any(one.targets[:, label].any() for one in parts.values())]
    assert metrics["classes"] == present
    assert metrics["linear"]["map"] > 0.5
    assert metrics["protocol"]["groups"] == {"train": 200, "test": 100, "test_images_shared": 0}
