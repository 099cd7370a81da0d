"""The parts of a report, each against a slow or obvious reference."""

import base64
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report_artifacts import write_features

from stages.evaluation.features import FeatureFile
from stages.reports.artifacts import Artifact, Lineage
from stages.reports.confusions import confused_pairs, confusion_cells, confusion_table
from stages.reports.figures import colours
from stages.reports.formats import capitalised, percent, plural, share_name, value
from stages.reports.health import alarm, health, sample_positions, thin_spectrum
from stages.reports.lineage import NODE_HEIGHT, NODE_WIDTH, drawing, flatten, lineage_rows
from stages.reports.names import Named, distinguish, name_features
from stages.reports.neighbours import nearest_in_file, pick_queries
from stages.reports.plots import marker_number
from stages.reports.probes import Probe, cell, comparison, console_table, protocol, share_title
from stages.reports.thumbnails import contact_sheet, matrix_picture, thumbnail
from stages.reports.training import MOST_POINTS, curve, training
from stages.reports.verdict import compare, verdict


def probe(label: str, kind: str, correct: Any, **changes: Any) -> Probe:
    right = np.asarray(correct, dtype=bool)
    top1 = float(right.mean())
    knn = {"20": {"top1": 0.5, "k_used": 20}}
    fair = {"encoder_saw": 0, "encoder_saw_exactly": True}
    few = {"top1": 0.4, "sd": 0.03, "subsets": 10, "labels": 14, "penalties": [1.0], "fixed_penalty": True}
    few |= {"subset_indices": list(range(10)), "by_subset": [0.4] * 10}
    near = {"20": {"top1": 0.3, "sd": 0.02, "by_subset": [0.1 * number for number in range(10)]}}
    every = {"top1": top1, "subsets": 1, "labels": 1437, "penalties": [1.0], "fixed_penalty": False}
    every |= {"subset_indices": [0], "by_subset": [top1]}
    metrics = {
        "linear": {"top1": top1, "top1_ci95": [top1 - 0.01, top1 + 0.01], "penalty": 1.0, "penalty_at_edge": False},
        "knn": knn,
        "label_curve": {
            "0.5pct": few | fair | {"knn": near},
            "100pct": every | fair | {"knn": {"20": {"top1": 0.5, "by_subset": [0.5]}}},
        },
        "protocol": {"test": len(right), "train": 1437, "something_new": True},
    }
    return Probe(
        Named(label, kind, "step", "net"), "d", "f", metrics | changes, np.arange(len(right)).astype(str), right
    )


# Verdict


def test_the_interval_of_a_difference_is_a_paired_bootstrap() -> None:
    generator = np.random.default_rng(5)
    ours, theirs = generator.random(400) < 0.8, generator.random(400) < 0.7
    found = compare(probe("a", "pretrained", ours), probe("b", "random", theirs))
    gains = ours.astype(float) - theirs
    slow = [gains[generator.integers(0, 400, size=400)].mean() for _ in range(4000)]
    assert found["difference"] == pytest.approx(gains.mean())
    np.testing.assert_allclose(found["interval"], np.quantile(slow, [0.025, 0.975]), atol=0.006)


def test_other_test_images_are_not_paired() -> None:
    """As many of them, with the same numbers, are other images all the same."""
    ours, same = (probe(name, "pretrained", np.arange(300) < 200) for name in "ab")
    theirs = replace(same, keys=np.roll(same.keys, 1))
    assert (compare(ours, theirs)["interval"], compare(ours, theirs)["state"]) == (None, "unpaired")
    for other, marked in ((same, True), (theirs, False)):
        assert any(one["best"] for row in comparison([ours, other])["rows"] for one in row["cells"]) is marked
    assert "other test images" in verdict([ours, theirs])["sentence"]


def test_the_caveat_says_what_flatters() -> None:
    first, second = probe("a", "pretrained", [1, 0, 1]), replace(probe("b", "pretrained", [1, 1, 0]), seed=1)
    assert verdict([first])["caveat"].startswith("On these 3 test images, one seed:")
    assert verdict([first, second])["caveat"].startswith("On these 3 test images, 2 seeds:")
    groups = {"train": 5, "test": 2, "test_images_shared": 2}
    protocol = {"test": 3, "train": 9, "groups": groups, "encoder_saw_other_labels": True}
    caveat = verdict([probe("a", "pretrained", [1, 0, 1], protocol=protocol)])["caveat"]
    assert "2 of the test images are of groups that have training images too" in caveat
    assert "a learned from labels that are not among those at hand" in caveat


def test_a_column_is_named_for_what_it_comes_to() -> None:
    """One label of each of many classes is more than the share that was asked for."""
    one = probe("a", "pretrained", [1, 0])
    assert share_title([one.metrics], "0.5pct") == "0.5%"  # 14 of 1,437 are 0.97%: rounded to whole labels
    one.metrics["label_curve"]["0.5pct"]["labels"] = 69
    assert share_title([one.metrics], "0.5pct") == "4.8%"
    assert comparison([one])["groups"][0]["columns"][0]["title"] == "4.8%"
    assert share_title([one.metrics], "100pct") == "100%"


def test_states_of_a_comparison() -> None:
    good, bad = np.arange(300) < 270, np.arange(300) < 150
    assert compare(probe("a", "pretrained", good), probe("b", "random", bad))["state"] == "better"
    assert compare(probe("a", "pretrained", bad), probe("b", "random", good))["state"] == "worse"
    assert compare(probe("a", "pretrained", good), probe("b", "random", good))["state"] == "same"
    other_images = probe("b", "random", bad[:100])
    assert compare(probe("a", "pretrained", good), other_images)["interval"] is None


def test_the_subject_of_the_verdict_is_what_was_trained_here_not_what_is_best() -> None:
    weak, strong = np.arange(100) < 50, np.arange(100) < 90
    probes = [
        probe("pixels", "pixels", strong),
        probe("timm x", "timm", strong),
        probe("pretrained", "pretrained", weak),
    ]
    found = verdict(probes)
    assert found["subject"] == "pretrained"
    assert found["state"] == "worse"
    assert found["sentence"] == (
        "Pretrained reaches 50.0% top-1 with a linear probe (95% interval 49.0 to 51.0): "
        "worse than pixels by 40.0 points (30.0 to 50.0) and worse than timm x by 40.0 points (30.0 to 50.0)."
    )
    assert found["few_labels"] == (
        "With 0.5% of the labels (14), 20 nearest neighbours reach 30.0%, against 30.0% (pixels) and 30.0% (timm x)."
    )
    assert verdict([probe("pixels", "pixels", weak)])["state"] == "alone"


# Tables


def test_names_come_from_the_encoder_card() -> None:
    def label(kind: str, name: str, stage: str | None = None) -> str:
        return name_features({"kind": kind, "name": name, "stage": stage, "labels_seen": []}, "step").label

    assert label("pixels", "pixels") == "pixels"
    assert label("random", "resnet10") == "random encoder"
    assert label("pretrained", "resnet10", "pretrain") == "pretrained"
    assert label("pretrained", "resnet10", "finetune") == "fine-tuned"
    assert label("timm", "timm:resnet18") == "timm resnet18"


def test_equal_names_are_told_apart() -> None:
    tells = [("simclr", "one", "v1"), ("simclr_long", "two", "v2"), ("simclr", "three", "v3")]
    labels = ["pretrained", "pretrained", "random encoder"]
    assert distinguish(labels, tells) == ["pretrained (simclr)", "pretrained (simclr_long)", "random encoder"]
    assert distinguish(["pretrained"] * 3, tells) == ["pretrained (one)", "pretrained (two)", "pretrained (three)"]
    versions = [("simclr", "one", "v1"), ("simclr", "one", "v2"), ("", "one", "v3")]
    assert distinguish(["pretrained"] * 3, versions) == ["pretrained (v1)", "pretrained (v2)", "pretrained (v3)"]
    assert distinguish(["pretrained"] * 2, [("", "a"), ("simclr", "b")]) == ["pretrained (a)", "pretrained (b)"]


def test_cells_hold_what_was_measured() -> None:
    metrics = probe("a", "pretrained", [1, 1, 0, 0]).metrics
    full, few = cell(metrics, "linear", "100pct"), cell(metrics, "20", "0.5pct")
    assert full is not None
    assert few is not None
    assert (full.value, full.interval) == (0.5, [0.49, 0.51])
    assert (few.value, few.spread) == (0.3, 0.02)
    assert cell(metrics, "20", "100pct") is not None
    assert cell(metrics, "200", "100pct") is None
    assert cell(metrics, "linear", "10pct") is None


def test_a_table_of_probes_that_measured_different_things() -> None:
    other = probe("pixels", "pixels", [1, 0, 0, 0], knn={"5": {"top1": 0.9, "k_used": 5}})
    curve = {"100pct": other.metrics["label_curve"]["100pct"] | {"knn": {"5": {"top1": 0.9, "by_subset": [0.9]}}}}
    other.metrics["label_curve"] = curve
    table = comparison([probe("pretrained", "pretrained", [1, 1, 0, 0]), other])
    assert [group["title"] for group in table["groups"]] == [
        "Linear probe",
        "5 nearest neighbours",
        "20 nearest neighbours",
    ]
    assert [[one and one["best"] for one in row["cells"]] for row in table["rows"]] == [
        [True, True, None, None, True, True],
        [None, False, None, True, None, None],
    ]
    printed = console_table(table)
    assert printed["columns"] == ["encoder", "linear 100% [95%]", "linear 0.5%", "knn-5 100%", "knn-5 0.5%"]
    nothing = "\N{EN DASH}"
    assert printed["rows"][1] == ["pixels", "25.0% [24.0, 26.0]", nothing, "90.0%", nothing]


def test_the_protocol_says_once_what_is_shared() -> None:
    first, second = probe("a", "pretrained", [1, 0]), probe("b", "pixels", [1, 0, 0])
    card = protocol([first, second])
    shared = {item["name"]: item["value"] for item in card["shared"]}
    assert shared["Training images"] == 1437
    assert shared["Something new"] is True
    assert shared["Subsets at 0.5%"] == "10 of 14 labels, penalty fixed"
    assert card["differing"] == [{"name": "Test images", "values": [2, 3]}]


def test_confused_pairs_are_sorted_and_leave_out_what_is_right() -> None:
    counts = np.array([[5, 1, 0], [3, 2, 0], [0, 4, 6]])
    cells = confusion_cells({"confusion": counts.tolist()})
    pairs = confused_pairs(cells, ["a", "b", "c"], most=2)
    assert [(pair["true"], pair["predicted"], pair["count"], pair["of"]) for pair in pairs] == [
        ("c", "b", 4, 10),
        ("b", "a", 3, 5),
    ]
    assert confused_pairs(np.array([[0, 0, 3], [1, 1, 4]]), ["a", "b"]) == []
    assert (confusion_cells({"confusion_cells": cells.tolist()}) == cells).all()
    table = confusion_table(cells, ["a", "b", "c"])
    np.testing.assert_allclose([sum(one["share"] for one in row["cells"]) for row in table], 1)
    assert [[one["count"] for one in row["cells"]] for row in table] == counts.tolist()
    empty = confusion_table(confusion_cells({"confusion_cells": []}), ["a"])
    assert empty[0]["cells"][0]["share"] == 0


def test_formats() -> None:
    assert (percent(0.55234), percent(0.5, 0)) == ("55.2%", "50%")
    assert (plural(1, "class", "classes"), plural(2000, "image")) == ("1 class", "2,000 images")
    assert share_name("0.5pct") == "0.5%"
    assert capitalised("timm ViT") == "Timm ViT"
    assert [value(one) for one in (True, 50_000, 1e-8, [0.4, 1.0], {"a": 1})] == [
        "yes",
        "50,000",
        "1e-08",
        "0.4, 1",
        "a 1",
    ]


def test_a_colour_belongs_to_a_kind_and_to_one_encoder() -> None:
    names = [("p1", "pretrained"), ("r", "random"), ("x", "pixels"), ("p2", "pretrained"), ("p1", "pretrained")]
    palette = colours(names)
    assert [palette[label] for label in ("p1", "r", "x")] == [0, 1, 2]
    assert len(set(palette.values())) == 4
    many = colours([(f"p{number}", "pretrained") for number in range(40)]).values()
    assert len({(number % 8, marker_number(number)) for number in many}) == 40


# Training


def test_curves_are_thinned_by_means_and_keep_their_end() -> None:
    lines = [{"step": number, "epoch": number / 10, "loss": float(number % 2)} for number in range(1, 4002)]
    thin = curve(lines, "loss")
    assert len(thin["value"]) == MOST_POINTS
    assert (thin["epoch"][-1], thin["value"][-1]) == (400.1, 1.0)
    np.testing.assert_allclose(thin["value"][:-1], 0.5, atol=0.05)
    assert np.all(np.diff(thin["epoch"]) > 0)


def test_a_curve_leaves_out_what_was_not_recorded_or_is_not_finite() -> None:
    lines = [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "rankme": 5.0}, {"epoch": 3, "loss": float("nan")}]
    assert curve(lines, "loss") == {"epoch": [1.0], "value": [2.0]}
    assert curve(lines, "alignment") == {"epoch": [], "value": []}


def test_a_training_without_health_lines() -> None:
    card = {
        "architecture": {"backbone": "resnet10", "width": 8},
        "projector": {"layers": 2, "hidden": 8, "dimension": 4},
        "weights": {"source": "initialised", "licence": None},
    } | dict.fromkeys(("parameters", "embedding_size", "image_size"), 8)
    numbers = training([{"step": 2, "epoch": 0.5, "loss": 1.0}], card)
    assert numbers["projector_rank"] is None
    assert numbers["last"] == {"loss": 1.0}
    assert numbers["steps"] == 2


# Health


def test_health_of_features_of_a_known_rank() -> None:
    generator = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(generator.normal(size=(12, 12)))
    features = np.zeros((600, 16), dtype=np.float32)
    columns, _ = np.linalg.qr(generator.normal(size=(600, 12)))
    features[:, :12] = columns @ rotation  # twelve equal singular values
    features[:, 13] = 1e-9
    found = health(features, learned=True)
    assert found["rankme"] == pytest.approx(12, rel=1e-3)
    assert (found["constant"], found["dead"]) == (4, 3)
    assert found["few_samples"] is False
    assert found["alarm"] is None
    np.testing.assert_allclose(found["spectrum"]["value"], 1, atol=1e-3)
    assert health(features[:100], learned=True)["few_samples"] is True


def test_alarms() -> None:
    assert alarm(20, 128, 0) is None
    collapsed, constant, dying = alarm(1.5, 128, 0), alarm(1, 128, 128), alarm(20, 128, 70)
    assert collapsed is not None
    assert constant is not None
    assert dying is not None
    assert "about 1.5 of 128" in collapsed
    assert "same features" in constant
    assert "70 of 128" in dying
    assert health(np.ones((50, 8), dtype=np.float32), learned=True)["alarm"] == alarm(1, 8, 8)
    assert health(np.ones((50, 8), dtype=np.float32), learned=False)["alarm"] is None


def test_samples_are_spread_over_all_rows() -> None:
    rows = np.arange(1000)
    picked = sample_positions(rows, 100)
    assert (len(picked), picked[0], picked[-1]) == (100, 0, 999)
    assert np.ptp(np.diff(picked)) <= 1
    assert sample_positions(rows, 5000) is rows


def test_a_long_spectrum_is_thinned_and_noise_left_out() -> None:
    spectrum = thin_spectrum(np.geomspace(10, 1e-9, 4000))
    assert (spectrum["rank"][0], spectrum["value"][0]) == (1, 1.0)
    assert len(spectrum["rank"]) <= 200
    assert min(spectrum["value"]) > 1e-7
    assert thin_spectrum(np.zeros(3)) == {"rank": [], "value": []}


# Neighbours


@pytest.fixture
def features(tmp_path: Path) -> FeatureFile:
    class Folder:
        def add(self, *_: Any) -> Path:
            return tmp_path

        def digest(self, _: str) -> str:
            return ""

    generator = np.random.default_rng(3)
    values = generator.normal(size=(480, 24))
    values[100] = values[3]  # two that are equally near to all others
    values[200:220] = values[450] * 3  # more of equals than are asked for
    labels = np.arange(480) % 7
    write_features(Folder(), "f", "pixels", values, labels, np.arange(480) < 400, list("abcdefg"))  # type: ignore[arg-type]
    return FeatureFile(tmp_path)


@pytest.mark.parametrize("block", [1, 7, 100, 1000])
def test_neighbours_are_those_of_brute_force(
    features: FeatureFile, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr("stages.evaluation.features.BLOCK_NUMBERS", 24 * block)
    gallery = features.splits == "train"
    queries = np.array([450, 3, 100, 399])
    rows, similarities = nearest_in_file(features, queries, gallery, 5)
    everything = features.rows(np.arange(480)).astype(np.float64)
    unit = everything / np.linalg.norm(everything, axis=1, keepdims=True)
    for query, found, scores in zip(queries, rows, similarities, strict=True):
        cosine = np.round(unit[query] @ unit.T, 6)
        candidates = [row for row in range(400) if row != query]
        expected = sorted(candidates, key=lambda row: (-cosine[row], row))[:5]
        assert found.tolist() == expected
        np.testing.assert_allclose(scores, cosine[expected])


def test_a_gallery_smaller_than_asked_for(features: FeatureFile) -> None:
    gallery = np.zeros(480, dtype=bool)
    gallery[[1, 2, 3]] = True
    assert nearest_in_file(features, np.array([2]), gallery, 8)[0].shape == (1, 2)
    assert nearest_in_file(features, np.array([9]), gallery, 8)[0].shape == (1, 3)


def test_rows_come_in_the_order_asked_for(features: FeatureFile) -> None:
    rows = np.array([470, 0, 250])
    np.testing.assert_array_equal(features.rows(rows), features.rows(np.arange(480))[rows])


def test_queries_are_spread_over_classes() -> None:
    labels = np.array([0] * 500 + [1] * 30 + [2] * 5)
    assert sorted(labels[pick_queries(labels, 6)].tolist()) == [0, 0, 1, 1, 2, 2]
    assert pick_queries(labels, 6).tolist() == pick_queries(labels, 6).tolist()
    assert len(set(pick_queries(np.full(20, -1), 8).tolist())) == 8
    assert len(pick_queries(np.array([0, 1]), 8)) == 2


# Pictures


def decode(picture: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(picture["uri"].split(",", 1)[1])))


def test_a_small_thumbnail_is_the_image_itself() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, size=(3, 20, 32), dtype=np.uint8)
    picture = thumbnail(pixels)
    np.testing.assert_array_equal(np.asarray(decode(picture)), pixels.transpose(1, 2, 0))
    assert (picture["width"], picture["height"], picture["small"]) == (32, 20, True)


def test_a_large_thumbnail_keeps_its_shape() -> None:
    picture = thumbnail(np.full((3, 300, 600), 90, dtype=np.uint8))
    assert (picture["width"], picture["height"], picture["small"]) == (96, 48, False)
    assert abs(int(np.asarray(decode(picture)).mean()) - 90) <= 2


def test_a_large_contact_sheet_is_made_smaller() -> None:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, size=(700, 2000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    sheet = contact_sheet(buffer.getvalue())
    assert sheet["width"] == 1600
    assert str(sheet["uri"]).startswith("data:image/jpeg")
    assert len(str(sheet["uri"])) < len(buffer.getvalue())


def test_a_matrix_is_a_pixel_a_cell() -> None:
    pixels = np.asarray(decode(matrix_picture(np.array([[1.0, 0.0], [0.25, 0.75]]))))
    assert pixels[..., 3].tolist() == [[255, 0], [128, 221]]
    assert pixels[0, 0, :3].tolist() == pixels[1, 1, :3].tolist() != pixels[1, 0, :3].tolist()


# Lineage


def artifact(step: str, *sources: str) -> Artifact:
    return Artifact("stage", step, f"digest of {step}", 1, 0, {}, {"field": sources}, Path(step))


def test_groups_of_settings_are_flattened() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": [1, 2]}, "e": None}) == {"a.b.c": 1, "a.d": [1, 2], "e": None}


def test_the_drawing_has_every_artifact_below_its_sources_and_none_over_another() -> None:
    steps = {
        "shards": ("foreign:abc",),
        "views": ("shards",),
        "simclr": ("shards", "views"),
        "random": ("shards",),
        "features": ("shards", "simclr"),
        "probe_random": ("random",),
        "probe": ("features",),
    }
    artifacts = [
        artifact(step, *(f"digest of {one}" if one in steps else one for one in sources))
        for step, sources in steps.items()
    ]
    lineage = Lineage(artifacts)
    drawn = drawing(lineage, "the page")
    places = {node["step"]: (node["x"], node["y"]) for node in drawn["nodes"]}
    assert set(places) == {*steps, "the page"}
    for step, sources in steps.items():
        assert all(places[source][1] < places[step][1] for source in sources if source in places)
    for first in places:
        for second in places:
            (x1, y1), (x2, y2) = places[first], places[second]
            assert first == second or abs(x1 - x2) >= NODE_WIDTH or abs(y1 - y2) >= NODE_HEIGHT
    assert all(NODE_WIDTH / 2 <= x <= drawn["width"] - NODE_WIDTH / 2 for x, _ in places.values())
    assert max(y for _, y in places.values()) + NODE_HEIGHT == drawn["height"]
    rows = {row["step"]: row["made_of"] for row in lineage_rows(lineage)}
    assert rows["simclr"] == ["shards", "views"]
    assert rows["shards"] == ["files abc"]


def test_runs_that_gave_equal_bytes_are_one_artifact() -> None:
    first, again = artifact("shards"), artifact("shards")
    lineage = Lineage([first, again, artifact("views", first.digest)])
    assert [one.step for one in lineage.artifacts] == ["shards", "views"]
