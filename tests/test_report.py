"""The stage `report`: what the page and its numbers hold, that both are functions of the inputs, and that no name in
them is taken for HTML.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import RunStage
from report_artifacts import Store, add_fine_tuning, digit_store, write_features, write_pretraining, write_probe

PROBES = ["probe", "probe_random", "probe_pixels"]
VOID = {"meta", "link", "img", "br", "hr", "input"}
HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)> & \"quoted\" 鳥 $x$ {{ 7 * 7 }}"


class Page(HTMLParser):
    """Tags with their attributes, and the text of the page without that of scripts and styles."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.scripts: list[tuple[dict[str, str], str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append((attributes, ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
        elif self.open and self.open[-1] != "style":
            self.text += data

    def section(self, name: str) -> bool:
        return any(tag == "section" and attributes["id"] == name for tag, attributes in self.tags)


Made = tuple[Page, dict[str, Any], Path]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return digit_store(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def made() -> list[Made]:
    """Holds the report of `digits` once it was made."""
    return []


@pytest.fixture
def digits_report(run_stage: RunStage, digits: Store, made: list[Made]) -> Made:
    if not made:
        made.append(make(run_stage, digits, PROBES))
    return made[0]


def make(run_stage: RunStage, store: Store, steps: Sequence[str], **settings: Any) -> Made:
    out = run_stage("report", settings, {"of": store.files(*steps)}, ancestors=store.ancestors)
    return Page((out / "report.html").read_text()), json.loads((out / "report.json").read_text()), out


def copy(store: Store, root: Path) -> Store:
    """The same artifacts elsewhere, to be added to or changed."""
    copied = Store(root)
    shutil.copytree(store.root, root)
    copied.ancestors += [replace(one, files=root / one.files.relative_to(store.root)) for one in store.ancestors]
    return copied


def metrics(store: Store, step: str) -> dict[str, Any]:
    return json.loads((store.files(step)[0] / "metrics.json").read_text())


def test_a_report_of_probes(digits_report: Made, digits: Store) -> None:
    page, numbers, _ = digits_report
    scores = {step: metrics(digits, step)["linear"]["top1"] for step in PROBES}

    assert numbers["title"] == "test"  # the recipe's name
    assert numbers["verdict"]["subject"] == "pretrained"
    assert numbers["verdict"]["sentence"].startswith(f"Pretrained reaches {100 * scores['probe']:.1f}% top-1")
    assert numbers["verdict"]["sentence"] in page.text
    assert "one seed" in page.text
    differences = {one["against"]: one["difference"] for one in numbers["verdict"]["comparisons"]}
    assert differences["random encoder"] == pytest.approx(scores["probe"] - scores["probe_random"], abs=1e-6)
    assert differences["pixels"] == pytest.approx(scores["probe"] - scores["probe_pixels"], abs=1e-6)

    assert [one["label"] for one in numbers["comparison"]["rows"]] == ["pretrained", "random encoder", "pixels"]
    assert [probe["metrics"] for probe in numbers["probes"]] == [metrics(digits, step) for step in PROBES]
    assert [one["step"] for one in numbers["training"]] == ["simclr"]
    assert [one["dimension"] for one in numbers["health"]] == [32, 32, 64]
    assert not [one for one in numbers["health"] if one["alarm"]]
    for name in (
        "comparison",
        "training",
        "health",
        "confusions",
        "neighbours",
        "views",
        "protocol",
        "data",
        "lineage",
    ):
        assert page.section(name)
        assert ("a", {"href": f"#{name}"}) in page.tags


def test_the_table_for_the_terminal_is_text(digits_report: Made, digits: Store) -> None:
    _, numbers, _ = digits_report
    table = numbers["table"]
    assert table["columns"] == ["encoder", "linear 100% [95%]", "linear 10%", "knn-20 100%", "knn-20 10%"]
    linear = metrics(digits, "probe")["linear"]
    low, high = linear["top1_ci95"]
    assert table["rows"][0][:2] == ["pretrained", f"{100 * linear['top1']:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"]
    assert "±" in table["rows"][0][2]
    assert all(isinstance(item, str) for row in table["rows"] for item in row)


def test_equal_inputs_give_equal_bytes(run_stage: RunStage, digits: Store, digits_report: Made) -> None:
    _, _, first = digits_report
    _, _, second = make(run_stage, digits, PROBES)
    for name in ("report.html", "report.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_the_number_of_threads_leaves_no_trace(run_stage: RunStage, digits: Store, digits_report: Made) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        _, _, out = make(run_stage, digits, PROBES)
    finally:
        torch.set_num_threads(before)
    assert (out / "report.json").read_bytes() == (digits_report[2] / "report.json").read_bytes()


def test_where_files_lie_leaves_no_trace(
    run_stage: RunStage, digits: Store, digits_report: Made, tmp_path: Path
) -> None:
    moved = copy(digits, tmp_path / "elsewhere")
    _, _, here = digits_report
    _, _, there = make(run_stage, moved, PROBES)
    for name in ("report.html", "report.json"):
        assert (here / name).read_bytes() == (there / name).read_bytes()


def test_nothing_is_fetched(digits_report: Made) -> None:
    page, _, out = digits_report
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "data", "action", "poster", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    policy = next(one["content"] for tag, one in page.tags if one.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    html = (out / "report.html").read_text()
    addresses = html.replace("http://www.w3.org/2000/svg", "").replace("http://www.w3.org/1999/xlink", "")
    assert "http" not in addresses.replace("http-equiv", "")
    assert "@import" not in html


def test_ids_are_unique_and_links_have_a_target(digits_report: Made) -> None:
    page, _, _ = digits_report
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        link = attributes.get("href", attributes.get("xlink:href", "data:"))
        assert link.startswith("data:") or link[1:] in ids


def test_images_have_a_text_and_scrolling_parts_take_the_keyboard(digits_report: Made) -> None:
    page, _, _ = digits_report
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 1 + 3 * 8 * 9  # the contact sheet; for three encoders eight queries with eight neighbours
    assert all(attributes["alt"] for attributes in images)
    scrolling = [attributes for _, attributes in page.tags if attributes.get("class") == "scroll"]
    assert scrolling
    assert all(one["tabindex"] == "0" and one["aria-label"] for one in scrolling)


def test_settings_that_differ_are_shown_and_those_that_change_nothing_are_not(
    digits_report: Made, digits: Store
) -> None:
    page, numbers, _ = digits_report
    simclr = next(one for one in numbers["lineage"] if one["step"] == "simclr")
    assert simclr["settings"] == {"epochs": 30, "architecture.backbone": "resnet10", "architecture.width": 8}
    assert simclr["made_of"] == ["shards", "views"]
    shards = next(one for one in numbers["lineage"] if one["step"] == "shards")
    assert shards["settings"] == {}
    assert shards["made_of"] == ["files ffffffffff"]
    assert digits.digest("simclr")[:10] in page.text
    assert [one["step"] for one in numbers["lineage"]] == [one.step for one in digits.ancestors]


def test_rejected_images_are_counted(digits_report: Made) -> None:
    page, numbers, _ = digits_report
    assert numbers["data"][0]["rejected"] == 12
    assert len(numbers["data"][0]["rejected_first"]) == 10
    assert "12 rejected" in page.text
    assert "broken/<img src=x onerror=alert(9)>.jpg" in page.text


@pytest.mark.parametrize("classes", [10, 100])
def test_names_with_html_are_text(run_stage: RunStage, tmp_path: Path, classes: int) -> None:
    store = digit_store(tmp_path / "hostile", [f"{number} {HOSTILE}" for number in range(10)])
    if classes > 10:
        widen(store, [f"{number} {HOSTILE}" for number in range(classes)])
    page, numbers, _ = make(run_stage, store, PROBES, title=HOSTILE)
    assert page.open == []
    assert [attributes for attributes, _ in page.scripts] == [{"type": "application/json", "id": "live"}, {}]
    assert not [tag for tag, attributes in page.tags if "onerror" in attributes or tag == "b-"]
    assert all(attributes["src"].startswith("data:") for tag, attributes in page.tags if tag == "img")
    assert f"9 {HOSTILE}" in page.text
    assert page.text.count(HOSTILE) > 10
    assert numbers["probes"][0]["metrics"]["classes"][3] == f"3 {HOSTILE}"
    live = json.loads(page.scripts[0][1])
    assert [one and len(one["classes"]) for one in live] == [None if classes == 10 else classes] * 3


def test_many_classes_are_a_picture_to_point_at(run_stage: RunStage, tmp_path: Path) -> None:
    store = digit_store(tmp_path / "many")
    names = [f"class {number}" for number in range(100)]
    counts = widen(store, names)
    page, _, _ = make(run_stage, store, PROBES)
    pictures = [attributes for tag, attributes in page.tags if tag == "img" and attributes["width"] == "100"]
    assert len(pictures) == 3
    live = json.loads(page.scripts[0][1])[0]
    assert live["classes"] == names
    assert {(row, column): number for row, column, number in live["cells"]} == {
        (int(row), int(column)): int(counts[row, column]) for row, column in zip(*np.nonzero(counts), strict=True)
    }
    assert "class 7 named class 8" in " ".join(page.text.split())


def widen(store: Store, names: list[str]) -> Any:
    """Give the probes a confusion matrix of many classes."""
    counts = np.diag(np.arange(1, len(names) + 1))
    counts[7, 8] = 50
    for step in PROBES:
        path = store.files(step)[0] / "metrics.json"
        content = json.loads(path.read_text())
        content["classes"], content["linear"]["confusion"] = names, counts.tolist()
        path.write_text(json.dumps(content))
    return counts


def test_without_labels_there_are_health_and_neighbours(run_stage: RunStage, tmp_path: Path) -> None:
    store = digit_store(tmp_path / "unlabelled", labelled=False)
    page, numbers, _ = make(run_stage, store, ["features", "features_random"])
    assert numbers["comparison"] is None
    assert numbers["probes"] == []
    assert numbers["verdict"]["sentence"].startswith("Pretrained: an effective rank of")
    assert numbers["table"]["columns"][:2] == ["encoder", "effective rank"]
    assert [row[0] for row in numbers["table"]["rows"]] == ["pretrained", "random encoder"]
    for name in ("comparison", "confusions", "protocol"):
        assert not page.section(name)
    pages = numbers["neighbours"]
    assert [one["split"] for one in pages] == ["train", "train"]
    for one in pages:
        for query in one["queries"]:
            assert query["right"] is None
            assert query["id"] not in [found["id"] for found in query["neighbours"]]
            assert len(query["neighbours"]) == 8


def test_features_are_compared_where_labels_exist_and_no_probe(run_stage: RunStage, digits: Store) -> None:
    _, numbers, _ = make(run_stage, digits, ["features_pixels"])
    assert numbers["verdict"]["subject"] == "pixels"
    assert numbers["neighbours"][0]["split"] == "test"
    assert numbers["neighbours"][0]["queries"][0]["right"] is not None


def test_collapsed_features_raise_an_alarm(run_stage: RunStage, tmp_path: Path) -> None:
    store = digit_store(tmp_path / "collapsed", labelled=False)
    train, labels = np.arange(480) < 360, np.full(480, -1)
    line = np.random.default_rng(0).normal(size=(480, 1)) * np.ones((1, 32))
    write_features(store, "features_collapsed", "pretrained", line, labels, train, [])
    page, numbers, _ = make(run_stage, store, ["features_collapsed"])
    assert numbers["health"][0]["rankme"] == pytest.approx(1, abs=0.01)
    assert numbers["health"][0]["alarm"].startswith("Looks collapsed")
    assert numbers["health"][0]["alarm"] in page.text
    assert numbers["verdict"]["state"] == "collapsed"


def test_encoders_of_one_kind_get_the_name_of_their_step(run_stage: RunStage, tmp_path: Path) -> None:
    store = digit_store(tmp_path / "two")
    write_pretraining(store, "simclr_long")
    generator = np.random.default_rng(2)
    features, labels = generator.normal(size=(480, 16)), generator.integers(0, 10, size=480)
    train, names = np.arange(480) < 360, [f"digit {number}" for number in range(10)]
    write_features(store, "features_long", "pretrained", features, labels, train, names, "simclr_long")
    write_probe(store, "probe_long", "features_long", "pretrained", features, labels, train, names)
    page, numbers, _ = make(run_stage, store, ["probe", "probe_long", "probe_random"])
    assert [one["label"] for one in numbers["probes"]] == [
        "pretrained (simclr)",
        "pretrained (simclr_long)",
        "random encoder",
    ]
    assert [one["label"] for one in numbers["training"]] == ["simclr", "simclr_long"]
    assert "worse than" not in page.text


def test_a_fixed_penalty_has_no_path(run_stage: RunStage, tmp_path: Path) -> None:
    store = digit_store(tmp_path / "fixed")
    path = store.files("probe")[0] / "metrics.json"
    content = json.loads(path.read_text())
    content["linear"]["path"] = []
    path.write_text(json.dumps(content))
    assert "Penalty path" in make(run_stage, store, PROBES)[0].text
    assert "Penalty path" not in make(run_stage, store, ["probe"])[0].text


def test_a_damaged_input_is_named(run_stage: RunStage, tmp_path: Path) -> None:
    store = digit_store(tmp_path / "damaged")
    (store.files("probe")[0] / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*metrics\.json") as caught:
        make(run_stage, store, PROBES)
    assert getattr(caught.value, "exit_code", None) == 4


def test_the_page_stays_small(run_stage: RunStage, digits: Store) -> None:
    _, _, out = make(run_stage, digits, PROBES, neighbour_queries=50)
    assert (out / "report.html").stat().st_size < 5_000_000


def test_many_fine_tunings_make_a_page_that_can_be_read(run_stage: RunStage, digits: Store, tmp_path: Path) -> None:
    store = copy(digits, tmp_path / "tuned")
    steps = ["probe_pixels", "probe_random", "probe"]
    for loss in ("arcface", "triplet", "cross_entropy"):
        for start in ("simclr", "random"):
            steps += [add_fine_tuning(store, loss, fraction, start) for fraction in (0.01, 0.1, 1.0)]
    page, numbers, out = make(run_stage, store, steps)
    rows = numbers["comparison"]["rows"]
    assert [row["label"] for row in rows] == [
        "pixels",
        "random encoder",
        "pretrained",
        "ArcFace from pretrained",
        "ArcFace from random",
        "triplet from pretrained",
        "triplet from random",
        "cross-entropy from pretrained",
        "cross-entropy from random",
    ]
    assert rows[3]["steps"] == [f"probe_arcface_simclr_{share}" for share in (1, 10, 100)]
    exact = metrics(store, "probe_arcface_simclr_10")["label_curve"]["10pct"]
    assert rows[3]["cells"][0]["value"] == exact["top1"]
    assert rows[3]["cells"][1]["value"] == metrics(store, "probe_arcface_simclr_100")["linear"]["top1"]
    assert [one["saw"] for row in rows for one in row["cells"] if one["saw"]] == []
    assert numbers["verdict"]["subject"] == "pretrained"
    assert numbers["verdict"]["fine_tuned"] in page.text
    assert len(numbers["probes"]) == len({one["label"] for one in numbers["probes"]}) == 21
    assert len(numbers["table"]["rows"]) == 9

    tuned = numbers["fine_tuning"]["rows"]
    assert [one["labels"] for one in tuned[:3]] == [10, 36, 360]
    assert {one["trained"] for one in tuned} == {"all weights"}
    assert tuned[0]["last"] == {"loss": 0.25, "accuracy": 0.975, "gradient_norm": 1.0}
    assert [one["title"] for one in numbers["fine_tuning"]["columns"]] == [
        "Loss",
        "Accuracy in the batch",
        "Gradient norm",
    ]
    assert "97.5%" in page.text
    assert len(numbers["neighbours"]) == 3
    assert [one["label"] for one in numbers["neighbours"]][1:] == [
        "ArcFace from pretrained, all labels",
        "ArcFace from random, all labels",
    ]
    plots = [attributes for tag, attributes in page.tags if tag == "svg" and attributes.get("class") == "plot"]
    assert len(plots) < 15, "no curves for each fine-tuning"
    assert (out / "report.html").stat().st_size < 1_500_000


def test_what_an_encoder_saw_stands_in_the_cell(run_stage: RunStage, digits: Store, tmp_path: Path) -> None:
    store = copy(digits, tmp_path / "saw")
    page, numbers, _ = make(run_stage, store, ["probe", add_fine_tuning(store, "arcface", 0.5, freeze="layer2")])
    few, every = numbers["comparison"]["rows"][1]["cells"][:2]
    assert (few["value"], few["saw"]) == (None, 0.5)
    assert (every["value"] is not None, every["saw"]) == (True, 0.5)
    assert page.text.count("saw 50%") >= 4
    assert "what follows layer2" in page.text
    assert numbers["probes"][1]["label"] == "ArcFace from pretrained, 50% of the labels"


def test_features_of_several_labels_have_health_and_neighbours(
    run_stage: RunStage, digits: Store, tmp_path: Path
) -> None:
    store = copy(digits, tmp_path / "several")
    train, names = np.arange(480) < 360, [f"digit {number}" for number in range(10)]
    lists = [[number % 10, (number + 1) % 10] if number % 2 else [number % 10] for number in range(480)]
    single = np.array([one[0] if len(one) == 1 else -1 for one in lists])
    features = np.random.default_rng(0).normal(size=(480, 8))
    write_features(store, "features_several", "pixels", features, single, train, names, label_lists=lists)
    page, numbers, _ = make(run_stage, store, ["features_several"])
    queries = numbers["neighbours"][0]["queries"]
    shown = {query["label"]: query["right"] for query in queries}
    several = {label: right for label, right in shown.items() if ", " in label}
    assert several, "a query with two labels is named by both"
    assert set(several.values()) == {None}
    assert all(right is not None for label, right in shown.items() if label not in several)
    assert page.section("health")


@pytest.mark.parametrize("beside", [[], ["probe_pixels"]])
def test_probes_of_several_labels_have_a_table_of_their_own(
    run_stage: RunStage, digits: Store, tmp_path: Path, beside: list[str]
) -> None:
    store = copy(digits, tmp_path / "several")
    train, names = np.arange(480) < 360, [f"digit {number}" for number in range(9)] + ["<b>rare</b>"]
    targets = np.random.default_rng(1).random((480, 10)) < 0.7 ** np.arange(2, 12)
    targets[~targets.any(1), 0] = True
    targets[~train, 8] = False
    lists = [np.flatnonzero(row).tolist() for row in targets]
    single = np.array([one[0] if len(one) == 1 else -1 for one in lists])
    probes = []
    for kind in ("pixels", "random"):
        features = targets + np.random.default_rng(2).normal(size=(480, 10))
        write_features(store, f"features_{kind}_several", kind, features, single, train, names, label_lists=lists)
        given: dict[str, Any] = {"transfer": kind == "random", "bootstrap_samples": 100}
        probes.append(f"probe_{kind}_several")
        files = store.add("probe", probes[-1], given, {"features": store.digest(f"features_{kind}_several")})
        made = run_stage("probe", given, {"features": store.files(f"features_{kind}_several")[0]})
        shutil.copytree(made, files, dirs_exist_ok=True)
    page, numbers, _ = make(run_stage, store, [*beside, *probes])
    assert page.section("several_labels")
    assert [one["metrics"] for one in numbers["several_labels"]] == [metrics(store, step) for step in probes]
    linear = metrics(store, probes[0])["linear"]
    assert page.text.count(f"{100 * linear['map']:.1f}%") >= 1
    assert "<b>rare</b>" in page.text, "as text"
    assert "Labels of the nearest training image" in page.text
    assert [one["step"] for one in numbers["probes"]] == beside
    if beside:
        assert "top-1" in numbers["verdict"]["sentence"]
    else:
        assert "nothing is scored" not in page.text
        assert f"mean average precision of {100 * linear['map']:.1f}%" in numbers["verdict"]["sentence"]
        assert [row[0] for row in numbers["table"]["rows"]] == ["pixels", "random encoder"]
        assert "comparison" not in page.text.lower().split("several labels")[0]


def test_groups_are_counted_in_the_data(run_stage: RunStage, digits: Store, tmp_path: Path) -> None:
    store = copy(digits, tmp_path / "groups")
    path = store.files("shards")[0] / "shards.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"groups": 37, "several_labels": True}))
    text = " ".join(make(run_stage, store, PROBES)[0].text.split())
    assert "10 classes, 37 groups; some images have several labels." in text


def test_thousands_of_classes_are_a_list_of_pairs(run_stage: RunStage, digits: Store, tmp_path: Path) -> None:
    store = copy(digits, tmp_path / "emoji")
    for step in PROBES:
        path = store.files(step)[0] / "metrics.json"
        content = json.loads(path.read_text())
        content["classes"] = [f"emoji {number}" for number in range(1906)]
        del content["linear"]["confusion"]
        content["linear"]["confusion_cells"] = [[number, max(number, 7), 1 + (number == 3)] for number in range(1906)]
        path.write_text(json.dumps(content))
    page, numbers, out = make(run_stage, store, PROBES)
    assert "1,906 classes are too many for a picture" in " ".join(page.text.split())
    assert "emoji 3 named emoji 7" in " ".join(page.text.split())
    assert not [1 for tag, attributes in page.tags if tag == "img" and attributes["width"] == "1906"]
    assert numbers["probes"][0]["metrics"]["linear"]["confusion_cells"][3] == [3, 7, 2]
    assert (out / "report.html").stat().st_size < 2_000_000
