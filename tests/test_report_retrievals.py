"""Reports of retrievals: their table, ties and trainings against loops, the page, and one run through all stages."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import RunStage, run_recipe, stage_runner
from report_artifacts import IMAGES, TEST, Store, add_fine_tuning, add_retrieval, digit_store, write_features
from sklearn.datasets import load_digits
from sklearn.metrics import confusion_matrix
from test_report import HOSTILE, PROBES, Page, copy, make, metrics
from test_retrieve import write as write_by_hand

from stages.evaluation.features import FeatureFile
from stages.reports.artifacts import Artifact, Lineage
from stages.reports.formats import NOTHING
from stages.reports.names import Compared, Named, name_with_retrievals
from stages.reports.retrievals import BOOTSTRAP_SAMPLES, Retrieval, paired_difference, read_retrieval, retrieval_table
from stages.reports.verdict import retrieval_verdict
from stages.reports.worst_queries import nearest_classes, pick_worst

RETRIEVALS = ["retrieve_pixels", "retrieve_random", "retrieve"]
DIGITS = np.asarray(load_digits(return_X_y=True)[1])[:IMAGES]
NAMES = [f"digit {number}" for number in range(10)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Pixels, a random encoder and a pretrained one, with a probe and a retrieval of each."""
    root = tmp_path_factory.mktemp("retrievals")
    found = digit_store(root / "digits")
    for step in ("features_pixels", "features_random", "features"):
        add_retrieval(found, stage_runner(root / step), step)
    return found


def read(store: Store, step: str) -> Retrieval:
    one = next(one for one in store.ancestors if one.step == step)
    source = next(other for other in store.ancestors if other.digest == one.inputs["features"])
    artifact = Artifact(one.stage, step, one.digest, 1, one.seed, {}, {}, one.files)
    return read_retrieval(artifact, Named(step, "pretrained", step, ""), FeatureFile(source.files), source.digest)


def noisy(store: Store, run_stage: RunStage, step: str, noise: float, **settings: Any) -> str:
    """A retrieval of pixels with noise on them."""
    pixels = np.asarray(load_digits(return_X_y=True)[0])[:IMAGES] / 16
    features = pixels + np.random.default_rng(3).normal(0, noise, pixels.shape)
    train = np.arange(IMAGES) < IMAGES - TEST
    write_features(store, f"features_{step}", "timm", features, DIGITS, train, NAMES)
    return add_retrieval(store, run_stage, f"features_{step}", step, **settings)


# The table


def test_a_report_of_retrievals_alone(run_stage: RunStage, store: Store) -> None:
    page, numbers, _ = make(run_stage, store, RETRIEVALS)
    rows = numbers["retrieval"]["rows"]
    assert [row["label"] for row in rows] == ["pixels", "random encoder", "pretrained"]
    for row, step in zip(rows, RETRIEVALS, strict=True):
        found = metrics(store, step)
        assert [one["value"] for one in row["cells"]] == [
            found["recall"]["1"],
            found["recall"]["10"],
            found["map_at_r"],
        ]
        assert [one["interval"] for one in row["cells"]] == [
            found["recall"]["1_ci95"],
            found["recall"]["10_ci95"],
            found["map_at_r_ci95"],
        ]
        assert row["linear"] is row["knn"] is None
    assert numbers["comparison"] is None
    assert numbers["probes"] == numbers["neighbours"] == []
    for name in ("retrieval", "retrieved", "retrieval_protocol", "health", "lineage"):
        assert page.section(name)
        assert ("a", {"href": f"#{name}"}) in page.tags
    for name in ("comparison", "confusions", "neighbours", "protocol"):
        assert not page.section(name)
    assert numbers["verdict"]["subject"] == "pretrained"
    recall = metrics(store, "retrieve")["recall"]["1"]
    assert f"the nearest image is of the right class for {100 * recall:.1f}% of 120 queries" in page.text
    assert page.open == []


def test_the_table_for_the_terminal(run_stage: RunStage, store: Store) -> None:
    table = make(run_stage, store, RETRIEVALS)[1]["table"]
    assert table["columns"] == ["encoder", "recall@1 [95%]", "recall@10 [95%]", "MAP@R [95%]", "transductive"]
    assert [row[0] for row in table["rows"]] == ["pixels", "random encoder", "pretrained"]
    found = metrics(store, "retrieve")
    low, high = found["map_at_r_ci95"]
    text = f"{100 * found['map_at_r']:.1f}% [{100 * low:.1f}, {100 * high:.1f}] best"
    assert table["rows"][2][3:] == [text, "yes"]
    assert table["rows"][0][4] == "no"


def test_probes_stand_beside_retrievals_of_the_same_features(run_stage: RunStage, store: Store) -> None:
    steps = ["probe_pixels", "retrieve_pixels", "retrieve", "probe", "probe_random"]
    page, numbers, _ = make(run_stage, store, steps)
    rows = numbers["retrieval"]["rows"]
    assert [row["label"] for row in rows] == ["pixels", "pretrained"]
    for row, step in zip(rows, ["probe_pixels", "probe"], strict=True):
        found = metrics(store, step)
        assert row["linear"]["value"] == found["linear"]["top1"]
        assert row["linear"]["interval"] == found["linear"]["top1_ci95"]
        assert row["knn"]["value"] == found["label_curve"]["100pct"]["knn"]["20"]["top1"]
    assert numbers["retrieval"]["k"] == 20
    assert sum(row["linear"]["best"] for row in rows) == 1
    assert [row["label"] for row in numbers["comparison"]["rows"]] == ["pixels", "pretrained", "random encoder"]
    assert [one["label"] for one in numbers["probes"]] == ["pixels", "pretrained", "random encoder"]
    table = numbers["table"]
    assert table["columns"][1:5] == ["recall@1 [95%]", "recall@10 [95%]", "MAP@R [95%]", "transductive"]
    assert table["columns"][5:] == ["linear 100% [95%]", "linear 10%", "knn-20 100%", "knn-20 10%"]
    assert [row[0] for row in table["rows"]] == ["pixels", "pretrained", "random encoder"]
    assert table["rows"][2][1:5] == [NOTHING] * 4
    assert all(row[5] != NOTHING for row in table["rows"])
    assert numbers["verdict"]["sentence"].startswith("Pretrained reaches")
    assert numbers["verdict"]["retrieval"]["sentence"] in page.text
    assert {"comparison", "retrieval", "confusions", "retrieved", "neighbours"} <= {
        attributes.get("id") for tag, attributes in page.tags if tag == "section"
    }


def test_a_report_of_probes_says_nothing_of_retrievals(run_stage: RunStage, store: Store) -> None:
    page, numbers, _ = make(run_stage, store, PROBES)
    assert not [key for key in numbers if key.startswith("retriev")]
    assert not any(page.section(name) for name in ("retrieval", "retrieved", "retrieval_protocol"))


def test_fine_tunings_have_the_names_that_their_probes_have(run_stage: RunStage, store: Store, tmp_path: Path) -> None:
    tuned = copy(store, tmp_path / "tuned")
    steps = ["probe", "retrieve"]
    for loss, fraction in (("triplet", 1.0), ("arcface", 0.1), ("arcface", 1.0)):
        probe = add_fine_tuning(tuned, loss, fraction)
        steps += [probe, add_retrieval(tuned, run_stage, probe.replace("probe", "features"))]
    labels = ["pretrained", "triplet from pretrained"]
    labels += [f"ArcFace from pretrained, {share}" for share in ("10% of the labels", "all labels")]
    for chosen in (steps, [step for step in steps if "probe" not in step]):
        _, numbers, _ = make(run_stage, tuned, chosen)
        assert [row["label"] for row in numbers["retrieval"]["rows"]] == labels
        assert [one["row"] for one in numbers["retrievals"]][2:] == ["ArcFace from pretrained"] * 2
        assert all(row["transductive"] for row in numbers["retrieval"]["rows"])
    assert numbers["verdict"]["subject"] == "pretrained"
    assert "triplet from pretrained" in numbers["verdict"]["fine_tuned"]


def test_two_retrievals_of_the_same_features_are_told_apart(run_stage: RunStage, store: Store, tmp_path: Path) -> None:
    several = copy(store, tmp_path / "several")
    add_retrieval(several, run_stage, "features", "retrieve_train", gallery="train")
    page, numbers, _ = make(run_stage, several, ["probe", "retrieve", "retrieve_train"])
    assert [row["label"] for row in numbers["retrieval"]["rows"]] == [
        "pretrained (retrieve)",
        "pretrained (retrieve_train)",
    ]
    assert [row["linear"]["value"] for row in numbers["retrieval"]["rows"]] == [
        metrics(several, "probe")["linear"]["top1"]
    ] * 2
    assert not numbers["retrieval"]["comparable"]
    assert not any(cell["best"] or cell["tie"] for row in numbers["retrieval"]["rows"] for cell in row["cells"])
    assert "Queries or gallery differ" in page.text
    assert "Not all have the same queries and gallery" in page.text
    differing = {one["name"]: one["values"] for one in numbers["retrieval_protocol"]["differing"]}
    assert differing["Gallery images"] == [TEST, IMAGES - TEST]
    assert differing["Leave one out"] == [True, False]
    shared = {one["name"]: one["value"] for one in numbers["retrieval_protocol"]["shared"]}
    assert (shared["Queries"], shared["Classes of queries and of train"]) == (TEST, "shared")


def test_an_index_stands_in_the_protocol(run_stage: RunStage, tmp_path: Path) -> None:
    indexed = digit_store(tmp_path)
    noisy(indexed, run_stage, "plain", 0.1)
    noisy(indexed, run_stage, "indexed", 0.1, index="hnsw")
    page, numbers, _ = make(run_stage, indexed, ["plain", "indexed"])
    recall = metrics(indexed, "indexed")["index"]["recall"]["10"]
    line = f"hnsw, finds {100 * recall:.1f}% of the ten nearest"
    name = "Index for searches; the figures are of exact search"
    assert {"name": name, "values": [None, line]} in numbers["retrieval_protocol"]["differing"]
    assert line in page.text
    rows = numbers["retrieval"]["rows"]
    assert [one["value"] for one in rows[0]["cells"]] == [one["value"] for one in rows[1]["cells"]]


def test_a_retrieval_without_a_probe_is_named_beside_probes() -> None:
    features = [Artifact("embed", step, step, 1, None, {}, {}, Path(step)) for step in ("one", "two")]
    card = {"kind": "pixels", "name": "pixels", "stage": None, "labels_seen": []}
    probes = [Compared(card, "probe", features[0])]
    retrievals = [Compared(card, f"find_{one.step}", one) for one in features]
    names, found = name_with_retrievals(Lineage(features), probes, retrievals)
    assert [one.label for one in names] == ["pixels (one)"]
    assert [(one.label, one.step) for one in found] == [("pixels (one)", "find_one"), ("pixels (two)", "find_two")]


# Ties


def slow_interval(one: Retrieval, other: Retrieval, key: str) -> tuple[float, float]:
    """A paired bootstrap by loops: as many classes as there are, drawn with replacement, and the mean over queries."""
    classes = sorted(set(one.labels.tolist()))
    k = {"recall_1": 1, "recall_10": 10}.get(key)
    gains: dict[int, list[float]] = {label: [] for label in classes}
    for query, label in enumerate(one.labels.tolist()):
        both = [
            retrieval.average_precision[query] if k is None else float(0 < retrieval.first_rank[query] <= k)
            for retrieval in (one, other)
        ]
        if one.relevant[query]:
            gains[label].append(float(both[0] - both[1]))
    generator, means = np.random.default_rng(11), []
    for _ in range(3000):
        drawn = [gain for label in generator.choice(classes, len(classes)).tolist() for gain in gains[label]]
        means.append(sum(drawn) / len(drawn))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


@pytest.mark.parametrize("key", ["recall_1", "recall_10", "map_at_r"])
def test_the_interval_of_a_difference_draws_classes(store: Store, key: str) -> None:
    one, other = read(store, "retrieve"), read(store, "retrieve_random")
    difference, interval = paired_difference(one, other, key)
    assert difference == pytest.approx(one.per_query(key).mean() - other.per_query(key).mean(), abs=1e-6)
    low, high = slow_interval(one, other, key)
    width = high - low
    np.testing.assert_allclose(interval, [low, high], atol=0.1 * width)
    assert BOOTSTRAP_SAMPLES >= 1000


def test_what_is_not_told_apart_from_the_best_is_tied(run_stage: RunStage, store: Store, tmp_path: Path) -> None:
    several = copy(store, tmp_path / "noise")
    steps = ["retrieve_pixels"] + [
        noisy(several, run_stage, f"timm_{number}", noise) for number, noise in enumerate((0.02, 2.0))
    ]
    found = [read(several, step) for step in steps]
    table = retrieval_table(found, [])
    assert table["comparable"]
    for column, key in enumerate(("recall_1", "recall_10", "map_at_r")):
        cells = [row["cells"][column] for row in table["rows"]]
        highest = max(cell["value"] for cell in cells)
        best = [cell["value"] == highest for cell in cells]
        assert [cell["best"] for cell in cells] == best
        for one, cell in zip(found, cells, strict=True):
            if cell["best"]:
                assert not cell["tie"]
                continue
            low, high = slow_interval(one, found[best.index(True)], key)
            assert cell["tie"] == (low <= 0 <= high)
        assert not cells[2]["best"]
        assert not cells[2]["tie"]
    ties = [row["cells"][2]["tie"] or row["cells"][2]["best"] for row in table["rows"]]
    assert ties == [True, True, False]
    page, numbers, _ = make(run_stage, several, steps)
    tied = sum(cell["tie"] for row in numbers["retrieval"]["rows"] for cell in row["cells"])
    assert tied
    assert page.text.count("tied with the best") == tied


def test_other_classes_of_the_same_images_are_another_task(run_stage: RunStage, store: Store, tmp_path: Path) -> None:
    other = copy(store, tmp_path / "classes")
    pixels = np.asarray(load_digits(return_X_y=True)[0])[:IMAGES] / 16
    train = np.arange(IMAGES) < IMAGES - TEST
    names = [f"other {name}" for name in NAMES]
    write_features(other, "features_other", "timm", pixels, DIGITS, train, names)
    add_retrieval(other, run_stage, "features_other", "retrieve_other")
    add_retrieval(other, run_stage, "features", "retrieve_train", gallery="train")
    one, same, renamed, elsewhere = (
        read(other, step) for step in ("retrieve", "retrieve_random", "retrieve_other", "retrieve_train")
    )
    assert one.is_comparable_with(same)
    assert not one.is_comparable_with(renamed)
    assert (one.asked == elsewhere.asked, one.searched == elsewhere.searched) == (True, False)
    table = retrieval_table([one, same, renamed], [])
    assert not any(cell["best"] or cell["tie"] for row in table["rows"] for cell in row["cells"])
    found = retrieval_verdict([one, renamed])
    assert found["comparisons"][0]["interval"] is None
    assert "(other queries)" in found["sentence"]


def test_the_gallery_of_a_column_is_known(run_stage: RunStage, tmp_path: Path) -> None:
    """By loops over the rows of the file."""
    hands = [("a", "b", "c")[row % 3] for row in range(400)]
    features = write_by_hand(tmp_path, drawn_by=hands)
    digests = {}
    for gallery in (["b"], ["b", "c"], ["c", "b"]):
        by = {"column": "drawn_by", "queries": ["a"], "gallery": gallery}
        made = run_stage("retrieve", {"bootstrap_samples": 100, "by": by}, {"features": features})
        artifact = Artifact("retrieve", "find", "digest", 1, 0, {}, {}, made)
        name = Named("pixels", "pixels", "find", "")
        digests["".join(gallery)] = read_retrieval(artifact, name, FeatureFile(features), "").searched
    assert digests["bc"] == digests["cb"] != digests["b"]


def test_a_k_that_was_not_measured_is_computed_as_there(run_stage: RunStage, store: Store, tmp_path: Path) -> None:
    other = copy(store, tmp_path / "few")
    add_retrieval(other, run_stage, "features", "retrieve_few", seed=4, recall_at=[5])
    add_retrieval(other, run_stage, "features", "retrieve_same", seed=4)
    few, same = read(other, "retrieve_few"), read(other, "retrieve_same")
    assert "1" not in few.metrics["recall"]
    for key in ("recall_1", "recall_10"):
        assert few.figure(key)[0] == pytest.approx(same.figure(key)[0])
        assert few.figure(key)[1] == pytest.approx(same.figure(key)[1])


def test_a_transductive_row_says_so(run_stage: RunStage, store: Store) -> None:
    page, numbers, _ = make(run_stage, store, RETRIEVALS)
    assert [row["transductive"] for row in numbers["retrieval"]["rows"]] == [False, False, True]
    assert numbers["retrieval"]["rows"][2]["seen"] == [
        {"step": "simclr", "stage": "pretrain", "query_images": 0, "query_classes": 10}
    ]
    assert "simclr: 10 classes of queries" in page.text
    assert "Transductive: pretrained, trained on query images" in numbers["verdict"]["caveat"]
    differing = {one["name"]: one["values"] for one in numbers["retrieval_protocol"]["differing"]}
    assert differing == {"Transductive": [False, False, True]}


# Queries and what they found


def test_the_worst_queries_come_first(run_stage: RunStage, store: Store) -> None:
    page, numbers, out = make(run_stage, store, RETRIEVALS, neighbour_queries=5)
    table = pq.read_table(store.files("retrieve_random")[0] / "neighbours.parquet").to_pylist()
    order = sorted(table, key=lambda row: (-row["first_rank"], row["average_precision_at_r"], row["id"]))
    assert [one["label"] for one in numbers["retrieved"]] == ["pretrained", "pixels", "random encoder"]
    shown = numbers["retrieved"][2]["queries"]
    for query, row in zip(shown, order[:5], strict=True):
        assert query["key"] == f"{row['id']:04d}.png"
        assert query["label"] == NAMES[row["label"]]
        assert (query["first_rank"], query["relevant"]) == (row["first_rank"], row["relevant"])
        assert [one["id"] for one in query["neighbours"]] == row["neighbours"][:8]
        assert [one["right"] for one in query["neighbours"]] == row["right"][:8]
        assert [one["label"] for one in query["neighbours"]] == [NAMES[DIGITS[one]] for one in row["neighbours"][:8]]
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 3 * 5 * 9 + 1  # with the contact sheet
    assert all(attributes["alt"] and attributes["src"].startswith("data:") for attributes in images)
    wrong = sum(
        not one["right"] for found in numbers["retrieved"] for query in found["queries"] for one in query["neighbours"]
    )
    assert sum(attributes.get("class") == "no" for tag, attributes in page.tags if tag == "li") == wrong > 0
    assert (out / "report.html").stat().st_size < 2_000_000


def test_queries_with_nothing_to_find_are_no_worst_ones(store: Store) -> None:
    one = read(store, "retrieve")
    relevant, first = one.relevant.copy(), one.first_rank.copy()
    lost = np.argsort(-first)[:3]
    relevant[lost], first[lost] = 0, 0
    assert not set(lost.tolist()) & set(pick_worst(replace(one, relevant=relevant, first_rank=first), 20).tolist())


def test_classes_of_the_nearest_image(store: Store) -> None:
    one = read(store, "retrieve_random")
    file = FeatureFile(store.files("features_random")[0])
    found = nearest_classes(one, file)
    nearest = DIGITS[one.neighbours[:, 0]]
    expected = confusion_matrix(one.labels, nearest)
    assert found["classes"] == NAMES
    assert {(row, column): count for row, column, count in found["cells"]} == {
        (int(row), int(column)): int(expected[row, column]) for row, column in zip(*np.nonzero(expected), strict=True)
    }
    wrong = Counter(pair for pair in zip(one.labels.tolist(), nearest.tolist(), strict=True) if pair[0] != pair[1])
    assert [pair["count"] for pair in found["pairs"]] == sorted(wrong.values(), reverse=True)[:10]
    file.labels[one.neighbours[:4, 0]] = -1
    assert nearest_classes(one, file)["without_label"] >= 4


def test_only_classes_of_queries_and_of_what_they_found_are_shown(store: Store) -> None:
    one = read(store, "retrieve")
    few = replace(one, relevant=np.where(np.isin(one.labels, [2, 7]), one.relevant, 0))
    found = nearest_classes(few, FeatureFile(store.files("features")[0]))
    rows = np.isin(one.labels, [2, 7])
    involved = sorted({*one.labels[rows].tolist(), *DIGITS[one.neighbours[rows, 0]].tolist()})
    assert found["classes"] == [NAMES[label] for label in involved]
    assert sum(count for _, _, count in found["cells"]) == rows.sum()


# The page


def test_verification_is_a_table_and_a_curve(run_stage: RunStage, store: Store, tmp_path: Path) -> None:
    several = copy(store, tmp_path / "quick")
    add_retrieval(several, run_stage, "features", "retrieve_quick", verification=False)
    page, numbers, _ = make(run_stage, several, ["retrieve_pixels", "retrieve_quick"])
    table = numbers["retrieval"]["verification"]
    found = metrics(store, "retrieve_pixels")["verification"]
    assert [row["label"] for row in table["rows"]] == ["pixels"]
    assert (table["rows"][0]["eer"], table["rows"][0]["auc"]) == (found["eer"], found["auc"])
    assert table["rates"] == ["1e-2", "1e-3", "1e-4"]
    assert table["rows"][0]["fnmr"] == [found["fnmr"][rate] for rate in table["rates"]]
    assert titles(page) == ["Cumulative match (CMC)", "Verification (ROC)"]
    assert numbers["retrieval"]["open_set"] == []
    _, numbers, _ = make(run_stage, several, ["retrieve_quick"])
    assert numbers["retrieval"]["verification"] is None


def titles(page: Page) -> list[str]:
    """Of the figures of retrieval that the page has."""
    known = ("Cumulative match (CMC)", "Verification (ROC)", "Open set: MAP@5", "Open set: OSCR")
    return [title for title in known if title in page.text]


def test_names_with_html_are_text(run_stage: RunStage, tmp_path: Path) -> None:
    store = digit_store(tmp_path / "hostile", [f"{number} {HOSTILE}" for number in range(10)])
    for step in ("features_random", "features"):
        add_retrieval(store, run_stage, step)
    page, numbers, _ = make(run_stage, store, ["retrieve_random", "retrieve", "probe"], title=HOSTILE)
    assert page.open == []
    assert [attributes for attributes, _ in page.scripts] == [{"type": "application/json", "id": "live"}, {}]
    assert not [tag for tag, attributes in page.tags if "onerror" in attributes]
    assert page.text.count(HOSTILE) > 30
    assert numbers["retrievals"][0]["nearest_classes"]["classes"][3] == f"3 {HOSTILE}"


def test_ids_are_unique_and_nothing_is_fetched(run_stage: RunStage, store: Store) -> None:
    page, _, _ = make(run_stage, store, [*RETRIEVALS, *PROBES])
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        link = attributes.get("href", attributes.get("xlink:href", "data:"))
        assert link.startswith("data:") or link[1:] in ids
        assert attributes.get("src", "data:").startswith("data:")


def test_equal_inputs_give_equal_bytes(run_stage: RunStage, store: Store) -> None:
    (_, _, first), (_, _, second) = (make(run_stage, store, RETRIEVALS) for _ in range(2))
    for name in ("report.html", "report.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


# Through all stages

RECIPE = """
name: disjoint
seed: 1
steps:
  shards: {stage: shard, source: "sklearn:digits", split_by: class, val_fraction: 0.3, test_fraction: 0.4}
  everything: {stage: shard, source: "sklearn:digits", labels: none}
  views: {stage: augment, shards: shards, preset: text, image_size: 8, contact_sheet_images: 2}
  simclr: &pretrain
    stage: pretrain
    shards: shards
    views: views
    architecture: &encoder {backbone: resnet10, width: 4}
    projector: {layers: 2, hidden: 16, dimension: 8}
    optimiser: {name: sgd, learning_rate: 0.05}
    max_steps: 3
    batch_size: 64
  simclr_all: {<<: *pretrain, shards: everything}
  tuned:
    stage: finetune
    shards: shards
    views: views
    encoder: simclr_all
    loss: {name: triplet}
    batch_size: 48
    max_steps: 3
  features_pixels: {stage: embed, shards: shards, encoder: pixels, image_size: 8}
  features_{encoder}:
    each: &trained {encoder: [simclr, simclr_all, tuned]}
    stage: embed
    shards: shards
    encoder: "{encoder}"
  find_pixels: {stage: retrieve, features: features_pixels, open_set: {new_share: 0.3}, bootstrap_samples: 100}
  find_{encoder}:
    each: *trained
    stage: retrieve
    features: "features_{encoder}"
    open_set: {new_share: 0.3}
    bootstrap_samples: 100
  report: {each: *trained, stage: report, of: [find_pixels, "find_{encoder}"], neighbour_queries: 3}
"""


@pytest.fixture(scope="module")
def disjoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The files of each step of the recipe."""
    return run_recipe(tmp_path_factory.mktemp("disjoint"), RECIPE)


def test_classes_that_share_no_split_through_all_stages(disjoint: Callable[[str], Path]) -> None:
    numbers = json.loads((disjoint("report") / "report.json").read_text())
    page = Page((disjoint("report") / "report.html").read_text())
    assert page.open == []
    rows = numbers["retrieval"]["rows"]
    assert [row["label"] for row in rows] == [
        "pixels",
        "pretrained (simclr)",
        "pretrained (simclr_all)",
        "triplet from simclr_all",
    ]
    assert [row["transductive"] for row in rows] == [False, False, True, True]
    assert [one["step"] for one in rows[3]["seen"]] == ["tuned", "simclr_all"]
    assert rows[3]["seen"][0] == {"step": "tuned", "stage": "finetune", "query_images": 0, "query_classes": 0}
    index = pq.read_table(disjoint("shards") / "index.parquet").to_pylist()
    train = pq.read_table(disjoint("everything") / "index.parquet").to_pylist()
    hashes = {one["xxh3"] for one in train if one["split"] == "train"}
    expected = sum(one["xxh3"] in hashes for one in index if one["split"] == "test")
    assert 0 < expected == rows[2]["seen"][0]["query_images"]
    assert rows[2]["seen"][0]["query_classes"] == 4
    shared = {one["name"]: one["value"] for one in numbers["retrieval_protocol"]["shared"]}
    assert shared["Classes of queries and of train"] == "disjoint"
    assert shared["Leave one out"]
    for row, step in zip(rows, ("pixels", "simclr", "simclr_all", "tuned"), strict=True):
        metrics = json.loads((disjoint(f"find_{step}") / "metrics.json").read_text())
        assert row["cells"][0]["value"] == metrics["recall"]["1"]


def test_an_open_set_is_shown_with_its_share(disjoint: Callable[[str], Path]) -> None:
    numbers = json.loads((disjoint("report") / "report.json").read_text())
    page = Page((disjoint("report") / "report.html").read_text())
    found = json.loads((disjoint("find_simclr") / "metrics.json").read_text())["open_set"]
    row = numbers["retrieval"]["open_set"][1]
    assert (row["label"], row["new_share"], row["split"]) == ("pretrained (simclr)", 0.3, "val")
    assert (row["map_5"], row["threshold"], row["auroc"]) == (found["map"]["5"], found["threshold"], found["auroc"])
    assert "chosen for 30% of new queries" in page.text
    assert len(titles(page)) == 4
    assert f"{found['threshold']:.3f}" in page.text
