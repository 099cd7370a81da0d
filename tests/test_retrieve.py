"""The stage `retrieve` on scikit-learn's digits: its figures from loops, its sets, and what it refuses."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import RunStage
from safetensors.numpy import load_file
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from sklearn.metrics.pairwise import cosine_similarity

from pipeline.errors import BadData, NotFinite
from pipeline.settings import Estimate
from stages.evaluation import bootstrap_interval, similarity
from stages.evaluation.indexed_gallery import read_indexed_gallery
from stages.evaluation.vector_index import NoIndexLibrary, Speed, measure_recall
from stages.images.index import NoSuchAttribute
from stages.retrieve import check_settings
from stages.settings import retrieve as retrieve_settings
from stages.settings.retrieve import Retrieve

PIXELS, DIGITS = (np.asarray(one) for one in load_digits(return_X_y=True))
QUICK: dict[str, Any] = {"bootstrap_samples": 100}


def write(
    folder: Path,
    rows: int = 400,
    *,
    features: np.ndarray = PIXELS,
    labels: np.ndarray = DIGITS,
    splits: Sequence[str] | None = None,
    groups: Sequence[str | None] | None = None,
    several: Mapping[int, list[int]] = MappingProxyType({}),
    drawn_by: Sequence[str | None] | None = None,
    labels_seen: Sequence[dict[str, Any]] = (),
) -> Path:
    """As the stage embed writes them: by default 100 digits to train on and the others for test.

    several: labels of rows that have more than one.
    """
    files = folder / "features"
    files.mkdir(parents=True)
    features, labels = features[:rows].astype(np.float32), labels[:rows].copy()
    lists = [[] if label < 0 else [int(label)] for label in labels]
    for row, names in several.items():
        lists[row], labels[row] = names, -1
    columns = {
        "id": pa.array(range(rows), pa.int64()),
        "key": [f"{number}.png" for number in range(rows)],
        "split": splits or ["train"] * 100 + ["test"] * (rows - 100),
        "label": pa.array(labels, pa.int32()),
        "labels": pa.array(lists, pa.list_(pa.int32())),
        "group": pa.array(groups or [None] * rows, pa.string()),
        "features": pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), features.shape[1]),
    }
    if drawn_by is not None:
        columns["attribute.drawn_by"] = pa.array(drawn_by, pa.string())
    pq.write_table(pa.table(columns), files / "features.parquet")
    encoder = {"kind": "pixels", "name": "pixels", "stage": None, "architecture": None, "image_size": 8}
    encoder |= {"labels_seen": [*labels_seen]}
    names = [f"digit {number}" for number in range(max(9, *(label for one in lists for label in one)) + 1)]
    card = {"format": 1, "encoder": encoder, "dimension": features.shape[1], "classes": names, "splits": {}}
    (files / "features.json").write_text(json.dumps(card))
    return files


def metrics_of(files: Path) -> dict[str, Any]:
    return json.loads((files / "metrics.json").read_text())


def expected_figures(queries: np.ndarray, gallery: np.ndarray, itself: bool) -> dict[str, np.ndarray]:
    """Per-query figures of rows of the digits, from whole rankings."""
    found: dict[str, list[float]] = {name: [] for name in ("first", "at_r", "precision", "at_5")}
    similarities = cosine_similarity(PIXELS[queries], PIXELS[gallery])
    for number, query in enumerate(queries):
        order = [row for row in np.argsort(-similarities[number], kind="stable") if not itself or row != number]
        right = DIGITS[gallery[order]] == DIGITS[query]
        precision = np.cumsum(right) / np.arange(1, len(right) + 1)
        total = int(right.sum())
        found["first"].append(int(np.argmax(right)) + 1)
        found["at_r"].append(float((precision * right)[:total].sum() / total))
        found["precision"].append(float(right[:total].mean()))
        found["at_5"].append(float((precision * right)[:5].sum() / min(5, total)))
    return {name: np.array(values) for name, values in found.items()}


def check_figures(metrics: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    for k in (1, 5, 10, 100):
        assert metrics["recall"][str(k)] == pytest.approx((expected["first"] <= k).mean())
        assert metrics["cmc"][k - 1] == pytest.approx(metrics["recall"][str(k)])
    assert metrics["map_at_r"] == pytest.approx(expected["at_r"].mean())
    assert metrics["r_precision"] == pytest.approx(expected["precision"].mean())
    assert metrics["map"]["5"] == pytest.approx(expected["at_5"].mean())
    assert metrics["mrr"] == pytest.approx((1 / expected["first"]).mean())


def test_a_split_against_itself(run_stage: RunStage, tmp_path: Path) -> None:
    files = run_stage("retrieve", QUICK, {"features": write(tmp_path)}, seed=3)
    metrics, test = metrics_of(files), np.arange(100, 400)
    expected = expected_figures(test, test, itself=True)
    check_figures(metrics, expected)
    interval = bootstrap_interval(expected["at_r"], 100, 3, groups=DIGITS[100:400])
    assert metrics["map_at_r_ci95"] == pytest.approx(interval)
    assert metrics["recall"]["1_ci95"] == pytest.approx(
        bootstrap_interval(expected["first"] == 1, 100, 3, groups=DIGITS[100:400])
    )
    counts = np.bincount(DIGITS[100:400])
    protocol = metrics["protocol"]
    assert protocol["chance_recall_1"] == pytest.approx((counts * (counts - 1)).sum() / 300 / 299)
    assert (protocol["queries"], protocol["gallery"], protocol["leave_one_out"]) == (300, 300, True)
    assert (protocol["identities"], protocol["queries_without_match"]) == (10, 0)
    assert (protocol["classes"], protocol["query_classes_in_train"]) == ("shared", 10)
    assert not protocol["encoder_saw_labels"]
    assert "open_set" not in metrics


def test_neighbours_are_written_with_their_ids(run_stage: RunStage, tmp_path: Path) -> None:
    files = run_stage("retrieve", QUICK | {"neighbours": 4}, {"features": write(tmp_path)})
    table = pq.read_table(files / "neighbours.parquet").to_pydict()
    similarities = cosine_similarity(PIXELS[100:400])
    np.fill_diagonal(similarities, -2)
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :4]
    assert table["id"] == [*range(100, 400)]
    assert table["neighbours"] == (order + 100).tolist()
    assert table["right"] == (DIGITS[order + 100] == DIGITS[100:400, None]).tolist()
    np.testing.assert_allclose(table["similarities"], np.take_along_axis(similarities, order, axis=1), atol=1e-6)
    expected = expected_figures(np.arange(100, 400), np.arange(100, 400), itself=True)
    assert table["first_rank"] == expected["first"].tolist()
    np.testing.assert_allclose(table["average_precision_at_r"], expected["at_r"])
    np.testing.assert_allclose(table["average_precision_at_5"], expected["at_5"])
    np.testing.assert_allclose(table["r_precision"], expected["precision"])
    assert table["relevant"] == (np.bincount(DIGITS[100:400])[DIGITS[100:400]] - 1).tolist()
    assert table["label"] == DIGITS[100:400].tolist()


def test_a_split_against_another(run_stage: RunStage, tmp_path: Path) -> None:
    metrics = metrics_of(run_stage("retrieve", QUICK | {"gallery": "train"}, {"features": write(tmp_path)}))
    check_figures(metrics, expected_figures(np.arange(100, 400), np.arange(100), itself=False))
    assert not metrics["protocol"]["leave_one_out"]
    assert metrics["protocol"]["splits"] == {"queries": "test", "gallery": "train"}


def test_queries_and_gallery_by_a_column(run_stage: RunStage, tmp_path: Path) -> None:
    hands: list[str | None] = [("fluent", "noto", "twemoji", None)[row % 4] for row in range(400)]
    by = {"column": "drawn_by", "queries": ["fluent"], "gallery": ["noto", "twemoji"]}
    files = run_stage("retrieve", QUICK | {"by": by}, {"features": write(tmp_path, drawn_by=hands)})
    rows = np.arange(100, 400)
    expected = expected_figures(rows[rows % 4 == 0], rows[np.isin(rows % 4, [1, 2])], itself=False)
    check_figures(metrics_of(files), expected)
    assert metrics_of(files)["protocol"]["by"] == by


def test_a_query_that_is_in_the_gallery_too_is_left_out_of_its_own_search(run_stage: RunStage, tmp_path: Path) -> None:
    hands: list[str | None] = [("a", "b")[row % 2] for row in range(400)]
    by = {"column": "drawn_by", "queries": ["a"], "gallery": ["b", "a"]}
    files = run_stage("retrieve", QUICK | {"by": by}, {"features": write(tmp_path, drawn_by=hands)})
    table = pq.read_table(files / "neighbours.parquet").to_pydict()
    assert not any(query in found for query, found in zip(table["id"], table["neighbours"], strict=True))
    assert any(found[0] % 2 == 0 for found in table["neighbours"])
    verification = metrics_of(files)["verification"]
    assert verification["genuine_pairs"] + verification["impostor_pairs"] == 150 * 150 + 150 * 149 // 2


def test_verification_is_over_all_pairs(run_stage: RunStage, tmp_path: Path) -> None:
    verification = metrics_of(run_stage("retrieve", QUICK, {"features": write(tmp_path)}))["verification"]
    one, other = np.triu_indices(300, 1)
    genuine = DIGITS[100 + one] == DIGITS[100 + other]
    similarities = cosine_similarity(PIXELS[100:400])[one, other]
    assert (verification["genuine_pairs"], verification["impostor_pairs"]) == (genuine.sum(), (~genuine).sum())
    assert abs(verification["auc"] - roc_auc_score(genuine, similarities)) <= verification["error"] + 1e-6
    threshold = np.sort(similarities[~genuine])[-int(0.01 * (~genuine).sum()) :][0]
    missed = (similarities[genuine] < threshold).mean()
    assert verification["fnmr"]["1e-2"] == pytest.approx(missed, abs=verification["error"] + 1e-3)
    assert verification["fnmr"]["1e-4"] is None, "fewer than 30 false matches are expected"
    assert len(verification["roc"]["fmr"]) == len(verification["roc"]["fnmr"]) == len(verification["roc"]["threshold"])


def test_what_is_not_wanted_is_not_measured(run_stage: RunStage, tmp_path: Path) -> None:
    files = run_stage("retrieve", QUICK | {"verification": False, "recall_at": [2]}, {"features": write(tmp_path)})
    metrics = metrics_of(files)
    assert "verification" not in metrics
    assert list(metrics["recall"]) == ["2", "2_ci95"]


def test_the_same_features_give_the_same_bytes(run_stage: RunStage, tmp_path: Path) -> None:
    features = write(tmp_path)
    first, second = (run_stage("retrieve", QUICK, {"features": features}) for _ in range(2))
    for name in ("metrics.json", "neighbours.parquet"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


# Open set


def disjoint(folder: Path, identities: int = 60) -> Path:
    """Classes of four images by four hands, noisy copies of a digit: a third of the classes in each split."""
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(identities), 4)
    features = PIXELS[labels] + random.normal(0, 3, (len(labels), 64))
    splits = [("train", "val", "test")[label % 3] for label in labels]
    return write(
        folder,
        len(labels),
        features=features,
        labels=labels,
        splits=splits,
        drawn_by=["a", "b", "c", "d"] * identities,
        labels_seen=[{"fraction": 1.0}],
    )


def test_open_set_of_disjoint_classes(run_stage: RunStage, tmp_path: Path) -> None:
    settings = QUICK | {"open_set": {"new_share": 0.25}}
    metrics = metrics_of(run_stage("retrieve", settings, {"features": disjoint(tmp_path)}, seed=1))
    assert metrics["protocol"]["classes"] == "disjoint"
    assert metrics["protocol"]["query_classes_in_train"] == 0
    assert metrics["protocol"]["encoder_saw_labels"]
    found = metrics["open_set"]
    assert found["identities"] == found["validation"]["identities"] == {"known": 15, "new": 5}
    assert found["queries"] == {"known": 60, "new": 20}
    assert found["map"]["5"] == pytest.approx(0.75 * found["map"]["5_known"] + 0.25 * found["map"]["5_new"])
    low, high = found["map"]["5_ci95"]
    assert low < found["map"]["5"] < high
    assert found["map"]["5"] > 0.7
    assert [point["new_share"] for point in found["curve"]] == pytest.approx(np.arange(10) / 10)
    for point in found["curve"]:
        share = point["new_share"]
        assert point["map_5"] == pytest.approx((1 - share) * found["map"]["5_known"] + share * found["map"]["5_new"])
    assert 0.5 < found["oscr"] <= found["auroc"] <= 1
    other = metrics_of(run_stage("retrieve", settings, {"features": tmp_path / "features"}, seed=2))
    assert other["recall"]["1"] == metrics["recall"]["1"]
    assert other["open_set"]["map"]["5"] != found["map"]["5"], "the seed draws other new identities"


def test_open_set_by_a_column(run_stage: RunStage, tmp_path: Path) -> None:
    by = {"column": "drawn_by", "queries": ["a"], "gallery": ["b", "c"]}
    settings = QUICK | {"by": by, "open_set": {"new_share": 0.25}}
    metrics = metrics_of(run_stage("retrieve", settings, {"features": disjoint(tmp_path)}))
    assert (metrics["protocol"]["queries"], metrics["protocol"]["gallery"]) == (20, 40)
    found = metrics["open_set"]
    assert found["queries"] == found["identities"] == {"known": 15, "new": 5}
    assert found["validation"]["queries"] == {"known": 15, "new": 5}


def test_the_threshold_is_not_chosen_on_test(run_stage: RunStage, tmp_path: Path) -> None:
    """With other test features the choice is the same."""
    folder = disjoint(tmp_path / "one")
    table = pq.read_table(folder / "features.parquet")
    features = np.stack(table["features"].to_numpy())
    test = np.array(table["split"].to_pylist()) == "test"
    features[test] = np.random.default_rng(1).normal(size=(int(test.sum()), 64))
    labels, splits = np.array(table["label"]), table["split"].to_pylist()
    other = write(tmp_path / "other", len(labels), features=features, labels=labels, splits=splits)
    settings = QUICK | {"open_set": {}}
    one, two = (metrics_of(run_stage("retrieve", settings, {"features": each}))["open_set"] for each in (folder, other))
    assert one["threshold"] == two["threshold"]
    assert one["validation"] == two["validation"]
    assert one["map"]["5"] > two["map"]["5"]


def test_validation_classes_that_are_elsewhere_too_have_no_say(
    run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = np.repeat(np.arange(30), 4)
    splits = [("train", "val", "test")[label % 3] for label in labels]
    splits[0] = "val"  # class 0 is of train
    features = write(tmp_path, len(labels), features=PIXELS[labels] + 0.01 * PIXELS[:120], labels=labels, splits=splits)
    metrics = metrics_of(run_stage("retrieve", QUICK | {"open_set": {}}, {"features": features}))
    assert "1 of the 11 classes of val are classes of train" in capsys.readouterr().err
    assert sum(metrics["open_set"]["validation"]["identities"].values()) == 10


def test_classes_of_training_images_with_several_labels_are_trained_on(
    run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train has each of its classes and one of val and of test, always two at once; the others have one label."""
    labels = np.repeat(np.arange(30), 4)
    splits = [("train", "val", "test")[label % 3] for label in labels]
    several = {row: [int(label), 1 if label == 0 else 2] for row, label in enumerate(labels) if label % 3 == 0}
    features = write(
        tmp_path, len(labels), features=PIXELS[labels] + 0.01 * PIXELS[:120], labels=labels, splits=splits,
        several=several,
    )  # fmt: skip
    metrics = metrics_of(run_stage("retrieve", QUICK | {"open_set": {}}, {"features": features}))
    assert (metrics["protocol"]["classes"], metrics["protocol"]["query_classes_in_train"]) == ("shared", 1)
    assert "1 of the 10 classes of val are classes of train" in capsys.readouterr().err
    assert sum(metrics["open_set"]["validation"]["identities"].values()) == 9


# An index


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_an_index_stands_beside_the_figures(
    run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    features = write(tmp_path)
    plain, files = (run_stage("retrieve", QUICK | {"index": one}, {"features": features}) for one in ("none", kind))
    metrics = metrics_of(files)
    index = metrics.pop("index")
    assert metrics == metrics_of(plain), "figures are those of the exact search"
    assert (files / "neighbours.parquet").read_bytes() == (plain / "neighbours.parquet").read_bytes()
    assert {path.name for path in plain.iterdir()} == {"metrics.json", "neighbours.parquet"}
    assert (index["kind"], index["vectors"], index["dimension"], index["recall_queries"]) == (kind, 300, 64, 60)
    assert index["bytes"] == (files / "index.faiss").stat().st_size
    table = pq.read_table(files / "gallery.parquet").to_pydict()
    rows = np.array(table["id"])
    assert sorted(table["id"]) == [*range(100, 400)]
    assert table["key"] == [f"{number}.png" for number in rows]
    assert table["label"] == [f"digit {label}" for label in DIGITS[rows]]
    assert set(table["split"]) == {"test"}
    unit = PIXELS[rows] / np.linalg.norm(PIXELS[rows], axis=1, keepdims=True)
    np.testing.assert_allclose(load_file(files / "vectors.safetensors")["vectors"], unit, atol=1e-6)
    found = read_indexed_gallery(files, index).index.nearest(torch.from_numpy(PIXELS[100:400]), 10).index.numpy()
    exact = np.argsort(-cosine_similarity(PIXELS[100:400], PIXELS[rows]), axis=1)[:, :10]
    overlap = np.mean([len({*one} & {*other}) / 10 for one, other in zip(found, exact, strict=True)])
    assert overlap == pytest.approx(index["recall"]["10"], abs=0.05)
    assert overlap > 0.93
    said = capsys.readouterr().err
    assert f"index {kind} of 300 images: finds {index['recall']['10']:.1%} of the ten nearest" in said
    (timing,) = [json.loads(line) for line in (files.parent / "timing.jsonl").read_text().splitlines()]
    assert 0 < timing["index_build_seconds"] < 10
    assert 0 < timing["index_query_seconds"] < 1
    assert 0 < timing["exact_query_seconds"] < 1
    assert not any("seconds" in name for name in index), "what is written is a function of the inputs"


def test_an_index_is_of_the_gallery_alone(run_stage: RunStage, tmp_path: Path) -> None:
    files = run_stage("retrieve", QUICK | {"gallery": "train", "index": "hnsw"}, {"features": write(tmp_path)})
    assert sorted(pq.read_table(files / "gallery.parquet")["id"].to_pylist()) == [*range(100)]
    index = metrics_of(files)["index"]
    assert index["recall_queries"] == 300, "none of them is in the gallery, so none is kept out of it"
    found = read_indexed_gallery(files, index).index
    assert measure_recall(found, torch.from_numpy(PIXELS[100:400]).float()) == index["recall"]


def test_an_index_has_the_same_bytes_again(run_stage: RunStage, tmp_path: Path) -> None:
    features = write(tmp_path)
    first, second = (run_stage("retrieve", QUICK | {"index": "hnsw"}, {"features": features}) for _ in range(2))
    names = sorted(path.name for path in first.iterdir())
    assert names == ["gallery.parquet", "index.faiss", "metrics.json", "neighbours.parquet", "vectors.safetensors"]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_small_gallery_gets_no_index_by_size(
    run_stage: RunStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    features = write(tmp_path)
    for index_from, made in ((301, False), (300, True)):
        monkeypatch.setattr("stages.retrieve.INDEX_FROM", index_from)
        files = run_stage("retrieve", QUICK | {"index": "by_size"}, {"features": features})
        assert metrics_of(files).get("index", {}).get("kind") == ("hnsw" if made else None)
        assert (files / "index.faiss").is_file() == made
        said = "no index: 300 gallery images are fewer than 301; `simclr search` takes the features"
        assert (said in capsys.readouterr().err) == (not made)


def test_an_index_that_is_not_worth_it_says_so(
    run_stage: RunStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random directions, of which an index that may not look hard finds few."""
    random = np.random.default_rng(0)
    features = write(tmp_path, 3000, features=random.normal(size=(3000, 64)), labels=random.integers(0, 10, 3000),
                     splits=["test"] * 3000)  # fmt: skip
    monkeypatch.setattr("stages.evaluation.vector_index.LARGEST_EFFORT", 1)
    said = warnings_of(run_stage, capsys, features, index="ivf", verification=False)
    assert "the index finds less than 95% of the ten nearest; `index: none` searches exactly" in said
    monkeypatch.setattr(
        "stages.evaluation.indexed_gallery.measure_speed", lambda index, queries: Speed(exact=1e-5, index=1e-3)
    )
    said = warnings_of(run_stage, capsys, features, index="hnsw", verification=False)
    assert "0.01 times as many queries a second" in said
    assert "the index is no quicker than exact search here" in said


def test_an_index_needs_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.evaluation.vector_index.faiss", None)
    check_settings(Retrieve.model_validate({"features": "f"}))
    for index in ("hnsw", "ivf", "by_size"):
        with pytest.raises(NoIndexLibrary, match=r"pip install 'simclr-pipeline\[index\]'"):
            check_settings(Retrieve.model_validate({"features": "f", "index": index}))


def test_an_index_is_estimated() -> None:
    inputs = {"features": Estimate(1000, 512)}
    plain, indexed = (
        Retrieve.model_validate({"features": "f", "index": index}).estimate(inputs) for index in ("none", "hnsw")
    )
    assert indexed.disk_bytes - plain.disk_bytes == indexed.memory_bytes - plain.memory_bytes
    assert indexed.disk_bytes - plain.disk_bytes == pytest.approx(2 * 1000 * 512 + 280_000)


def test_threads_are_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert retrieve_settings.MOST_THREADS == similarity.MOST_THREADS
    needs = []
    for processors in (1, 5, 64, None):
        monkeypatch.setattr("os.cpu_count", lambda processors=processors: processors)
        needs.append(Retrieve(features="f").estimate({"features": Estimate(1000, 512)}).memory_bytes)
    tiles = [(need - needs[0]) / retrieve_settings.TILE_BYTES for need in needs]
    assert tiles == [0, 4, similarity.MOST_THREADS - 1, 0]


# What is said, and what is refused


def warnings_of(run_stage: RunStage, capsys: pytest.CaptureFixture[str], features: Path, **settings: Any) -> str:
    run_stage("retrieve", QUICK | settings, {"features": features})
    return capsys.readouterr().err


def test_a_query_class_absent_from_the_gallery(
    run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = ["train" if label < 8 and row < 200 else "test" for row, label in enumerate(DIGITS[:400])]
    features = write(tmp_path, splits=splits)
    said = warnings_of(run_stage, capsys, features, gallery="train")
    rows = np.array(splits) == "test"
    lost = int((rows & (DIGITS[:400] >= 8)).sum())
    assert f"no other image of the class 'digit 8', 'digit 9': {lost:,} of {rows.sum():,} queries are left out" in said
    metrics = metrics_of(run_stage("retrieve", QUICK | {"gallery": "train"}, {"features": features}))
    assert metrics["protocol"]["queries_without_match"] == lost
    assert metrics["protocol"]["identities_without_match"] == 2
    expected = expected_figures(np.flatnonzero(rows & (DIGITS[:400] < 8)), np.flatnonzero(~rows), itself=False)
    check_figures(metrics, expected)


def test_no_query_class_in_the_gallery(run_stage: RunStage, tmp_path: Path) -> None:
    splits = ["train" if label < 5 else "test" for label in DIGITS[:400]]
    with pytest.raises(BadData, match=r"^retrieve: no query has another image of its class .* none can be answered"):
        run_stage("retrieve", QUICK | {"gallery": "train"}, {"features": write(tmp_path, splits=splits)})


def test_k_beyond_the_gallery(run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features = write(tmp_path, 150)
    said = warnings_of(run_stage, capsys, features, recall_at=[1, 100, 200], neighbours=500)
    assert "k = 100, 200 is more than the 49 images that a query is compared with: recall there is that at 49" in said
    metrics = metrics_of(run_stage("retrieve", QUICK | {"recall_at": [49, 200]}, {"features": features}))
    assert metrics["recall"]["200"] == metrics["recall"]["49"]
    assert len(metrics["cmc"]) == 50


def test_missing_labels(run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = DIGITS[:400].copy()
    labels[300:350] = -1
    features = write(tmp_path / "some", labels=labels)
    said = warnings_of(run_stage, capsys, features)
    assert "50 of 300 queries have no label and are left out" in said
    assert "50 of 300 gallery images have no label: they count as wrong where they are found" in said
    metrics = metrics_of(run_stage("retrieve", QUICK, {"features": features}))
    assert (metrics["protocol"]["queries"], metrics["protocol"]["gallery"]) == (250, 300)
    assert metrics["protocol"]["gallery_without_label"] == 50
    verification = metrics["verification"]
    assert verification["genuine_pairs"] + verification["impostor_pairs"] == 250 * 249 // 2
    labels[100:] = -1
    with pytest.raises(BadData, match=r"^retrieve: no test image that is a query has a label"):
        run_stage("retrieve", QUICK, {"features": write(tmp_path / "none", labels=labels)})


def test_one_class_only(run_stage: RunStage, tmp_path: Path) -> None:
    labels = np.zeros(400, dtype=np.int64)
    with pytest.raises(BadData, match=r"^retrieve: all 300 gallery images are 'digit 0': whatever is found is right"):
        run_stage("retrieve", QUICK, {"features": write(tmp_path, labels=labels)})


def test_pairs_of_one_kind(run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One class among images that nobody labelled: ranks can be wrong, pairs of two known classes are not there."""
    labels = np.where(DIGITS == 3, 3, -1)
    features = write(tmp_path, labels=labels)
    assert "no verification: there are no pairs of images of different classes" in warnings_of(
        run_stage, capsys, features
    )
    metrics = metrics_of(run_stage("retrieve", QUICK, {"features": features}))
    assert metrics["verification"] is None
    assert 0.5 < metrics["recall"]["1"] <= 1


def test_a_relation_of_one_label_each_is_said_to_do_nothing(
    run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features, word = write(tmp_path), "relation is for images with several labels, and these have one"
    assert word not in warnings_of(run_stage, capsys, features)
    assert word in warnings_of(run_stage, capsys, features, relation={"kind": "jaccard"})


def test_an_open_set_is_for_one_label(run_stage: RunStage, tmp_path: Path) -> None:
    with pytest.raises(
        BadData, match=r"^retrieve.open_set: 7 images have several labels, and an identity is one label"
    ):
        run_stage(
            "retrieve",
            QUICK | {"open_set": {}},
            {"features": write(tmp_path, several={row: [1, 2] for row in range(393, 400)})},
        )


def test_features_that_are_not_finite(run_stage: RunStage, tmp_path: Path) -> None:
    broken = PIXELS.copy()
    broken[250, 3] = np.nan
    with pytest.raises(NotFinite, match="infinite numbers or NaN"):
        run_stage("retrieve", QUICK, {"features": write(tmp_path, features=broken)})


def test_few_classes_and_shared_groups_are_said(
    run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = [f"burst {row // 2}" if row < 320 else None for row in range(400)]
    features = write(tmp_path, labels=DIGITS % 4, groups=groups)
    said = warnings_of(run_stage, capsys, features)
    assert "the queries are of 4 classes: too few for an interval" in said
    assert "220 of 300 queries have images of their own group in the gallery" in said
    metrics = metrics_of(run_stage("retrieve", QUICK, {"features": features}))
    assert metrics["protocol"]["queries_sharing_a_group"] == 220


def test_test_images_with_pseudo_labels_are_said(
    run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for test_images, said in ((0, False), (12, True)):
        seen = [{"fraction": 1.0}, {"fraction": 1.0, "pseudo": {"train": 5, "test": test_images}}]
        warnings = warnings_of(run_stage, capsys, write(tmp_path / str(test_images), labels_seen=seen))
        word = "the encoder was trained on test images with pseudo-labels: transductive, scores on test flatter"
        assert (word in warnings) == said


def test_splits_and_columns_that_are_not_there(run_stage: RunStage, tmp_path: Path) -> None:
    plain = write(tmp_path / "plain")
    with pytest.raises(BadData, match=r"^retrieve: the features have no val split, they have train, test"):
        run_stage("retrieve", QUICK | {"queries": "val"}, {"features": plain})
    with pytest.raises(BadData, match=r"^retrieve: the features have no val split"):
        run_stage("retrieve", QUICK | {"open_set": {}}, {"features": plain})
    by = {"column": "drawn_by", "queries": ["fluent"], "gallery": ["noto"]}
    with pytest.raises(NoSuchAttribute, match=r"no attribute 'drawn_by'; it has none: name it in columns.attributes"):
        run_stage("retrieve", QUICK | {"by": by}, {"features": plain})
    hands: list[str | None] = [("noto", "twemoji", None)[row % 3] for row in range(400)]
    drawn = write(tmp_path / "drawn", drawn_by=hands)
    with pytest.raises(BadData, match=r"^retrieve.by: no test image has drawn_by 'fluent'; there are noto, twemoji$"):
        run_stage("retrieve", QUICK | {"by": by}, {"features": drawn})
    with pytest.raises(NoSuchAttribute, match=r"no attribute 'drawn'; it has drawn_by"):
        run_stage("retrieve", QUICK | {"by": by | {"column": "drawn"}}, {"features": drawn})


def test_an_open_set_needs_identities_apart(run_stage: RunStage, tmp_path: Path) -> None:
    splits = [("train", "val", "test")[row % 3] for row in range(400)]
    with pytest.raises(BadData, match=r"^retrieve.open_set: an open set of 0 classes .* val and test each need two"):
        run_stage("retrieve", QUICK | {"open_set": {}}, {"features": write(tmp_path, splits=splits)})


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"gallery": "train", "open_set": {}}, "open_set takes queries and gallery from one split"),
        ({"queries": "val", "gallery": "val", "open_set": {}}, "a threshold chosen on val cannot be scored there"),
        ({"by": {"column": "c", "queries": ["a"], "gallery": ["b"]}, "test_split": "val", "open_set": {}}, "on val"),
        ({"open_set": {"new_share": 1.0}}, "less than 1"),
        ({"recall_at": []}, "at least 1"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Retrieve.model_validate_json(json.dumps({"features": "f"} | settings), strict=True)


def test_settings_without_effect() -> None:
    by = {"column": "c", "queries": ["a"], "gallery": ["b"]}
    assert Retrieve.model_validate({"features": "f"}).without_effect() == {"test_split", "relation"}
    by_column = Retrieve.model_validate_json(json.dumps({"features": "f", "by": by, "test_split": "val"}))
    assert by_column.without_effect() == {"queries", "gallery", "relation"}
    assert by_column.splits == ("val", "val")
