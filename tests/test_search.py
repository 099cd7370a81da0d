"""`simclr search`: the same order as plain cosines, from features and from a folder, and what is refused."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import RunStage
from PIL import Image

from benchmarks.mosaics import make_mosaics, write_mosaics
from pipeline import cli
from stages.encoders import search as searching
from stages.evaluation import indexed_gallery

RECIPE = """
name: tiny
steps:
  shards:   {{stage: shard, source: "folder:{images}"}}
  views:    {{stage: augment, shards: shards, image_size: 16, contact_sheet_images: 1}}
  simclr:   {{stage: pretrain, shards: shards, views: views, architecture: {{backbone: resnet10, width: 4}},
              epochs: 1, max_steps: 1, batch_size: 4, projector: {{dimension: 4}}, device: cpu}}
  other:    {{stage: pretrain, shards: shards, views: views, encoder: simclr, epochs: 1, max_steps: 1, batch_size: 4,
              projector: {{dimension: 4}}, device: cpu}}
  features: {{stage: embed, shards: shards, encoder: simclr, device: cpu}}
  averaged: {{stage: embed, shards: shards, encoder: simclr, device: cpu, mirror: true, crops: 5}}
  indexed:  {{stage: retrieve, features: averaged, gallery: train, index: hnsw, bootstrap_samples: 100}}
  plain:    {{stage: retrieve, features: features, gallery: train, bootstrap_samples: 100}}
  by_size:  {{stage: retrieve, features: features, gallery: train, index: by_size, bootstrap_samples: 100}}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of two classes, and a store."""
    folder = tmp_path_factory.mktemp("search")
    random = np.random.default_rng(0)
    for number in range(12):
        path = folder / "images" / ("train" if number < 9 else "test") / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    (folder / "tiny.yaml").write_text(RECIPE.format(images=folder / "images"))
    assert call("run", str(folder / "tiny.yaml"), "--store", str(folder / "store")) == 0
    return folder


def call(*arguments: str) -> int:
    return cli.guarded(lambda: cli.app([*arguments], standalone_mode=False))


def found(world: Path, capsys: pytest.CaptureFixture[str], gallery: str, *options: str) -> list[dict]:
    queries = [str(world / "images/train/a/0.png"), str(world / "images/test/b/9.png")]
    capsys.readouterr()
    code = call("search", "simclr", *queries, "--gallery", gallery, "--store", str(world / "store"), *options, "--json")
    assert code == 0
    return json.loads(capsys.readouterr().out)["found"]


def test_the_nearest_are_those_of_plain_cosines(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = json.loads((world / "store/names/tiny/features/v1.json").read_text())
    (folder,) = (world / "store/builds/embed").rglob(name["digest"])
    table = pq.read_table(folder / "files/features.parquet")
    rows = np.array(table["features"].to_pylist(), dtype=np.float64)
    unit, keys = rows / np.linalg.norm(rows, axis=1, keepdims=True), table["key"].to_pylist()
    answers = found(world, capsys, "tiny/features", "--neighbours", "4")
    for answer, key in zip(answers, ("train/a/0.png", "test/b/9.png"), strict=True):
        cosines = unit @ unit[keys.index(key)]
        order = sorted(range(12), key=lambda place: -cosines[place])[:4]
        assert [one["key"] for one in answer["neighbours"]] == [keys[place] for place in order]
        assert answer["neighbours"][0]["key"] == key, "the query itself is in the gallery"
        for one, place in zip(answer["neighbours"], order, strict=True):
            assert one["similarity"] == pytest.approx(cosines[place], abs=1e-5)
            assert one["distance"] == pytest.approx(np.linalg.norm(unit[place] - unit[keys.index(key)]), abs=2e-3)
            assert one["label"] == keys[place].split("/")[1]


def test_a_query_is_looked_at_as_the_gallery_was(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for answer, key in zip(found(world, capsys, "tiny/averaged"), ("train/a/0.png", "test/b/9.png"), strict=True):
        assert answer["neighbours"][0]["key"] == key
        assert answer["neighbours"][0]["similarity"] == pytest.approx(1, abs=1e-5)


def test_a_folder_gives_what_features_give(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "images/train/a/broken.png").write_bytes(b"no image")
    by_features = found(world, capsys, "tiny/features")
    by_folder = found(world, capsys, str(world / "images"))
    (world / "images/train/a/broken.png").unlink()
    for ours, theirs in zip(by_folder, by_features, strict=True):
        assert [one["key"] for one in ours["neighbours"]] == [one["key"] for one in theirs["neighbours"]]
        assert [one["label"] for one in ours["neighbours"]] == [one["label"] for one in theirs["neighbours"]]
        assert len(ours["neighbours"]) == 10


def test_an_index_gives_what_features_give_and_says_what_it_is(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_features = found(world, capsys, "tiny/averaged", "--neighbours", "12")
    by_index = found(world, capsys, "tiny/indexed", "--neighbours", "5")
    for ours, theirs in zip(by_index, by_features, strict=True):
        of_train = [one for one in theirs["neighbours"] if one["key"].startswith("train/")][:5]
        assert [(one["key"], one["label"]) for one in ours["neighbours"]] == [
            (one["key"], one["label"]) for one in of_train
        ]
        for one, other in zip(ours["neighbours"], of_train, strict=True):
            assert one["similarity"] == pytest.approx(other["similarity"], abs=1e-5)

    query = str(world / "images/train/a/0.png")
    arguments = ["search", "simclr", query, "--store", str(world / "store"), "--gallery"]
    assert call(*arguments, "tiny/indexed") == 0
    said = capsys.readouterr()
    assert "the gallery has 9 images, fewer than the 10 that are asked for" in said.err
    assert len(said.out.splitlines()) == 11
    assert said.out.splitlines()[-1].startswith(
        "approximate, by an index (hnsw) that found 100.0% of the ten nearest of 3 queries; features as --gallery"
    )
    assert call(*arguments, "tiny/indexed", "--json") == 0
    index = json.loads(capsys.readouterr().out)["index"]
    assert (index["kind"], index["vectors"], index["recall"]) == ("hnsw", 9, {"1": 1.0, "10": 1.0})
    assert call(*arguments, "tiny/averaged", "--json") == 0
    assert json.loads(capsys.readouterr().out)["index"] is None
    assert call(*arguments, "tiny/averaged") == 0
    assert "approximate" not in capsys.readouterr().out


def test_the_collage_of_an_index_shows_its_images(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = world / "indexed.png"
    found(world, capsys, "tiny/indexed", "--neighbours", "2", "--collage", str(sheet))
    with Image.open(sheet) as picture:
        pixels = np.asarray(picture)
    query, nearest = (pixels[8 : 8 + 112, 8 + 120 * column :][:, :112] for column in range(2))
    assert np.array_equal(query, nearest), "of train, so it finds itself"


def test_several_labels_are_all_named(run_stage: RunStage, tmp_path: Path) -> None:
    """By an index and by features alike; an image without a label has no name."""
    parts = {"train": make_mosaics(20, part="train"), "test": make_mosaics(16, part="test")}
    parts["train"].targets[0] = False
    table = write_mosaics(tmp_path / "mosaics", parts, [f"digit {number}" for number in range(10)])
    wanted = {row["path"]: row["labels"] or None for row in csv.DictReader(table.read_text().splitlines())}
    shards = run_stage("shard", {"source": f"csv:{table}", "near_duplicates": False})
    features = run_stage("embed", {"encoder": "pixels", "image_size": 8}, {"shards": shards})
    settings = {"queries": "train", "gallery": "train", "index": "hnsw", "bootstrap_samples": 100}
    files = run_stage("retrieve", settings, {"features": features})
    index = json.loads((files / "metrics.json").read_text())["index"]
    ways = searching.gallery_of_features(features, shards), searching.gallery_of_index(files, shards, index)
    by_features, by_index = (dict(zip(one.keys, one.labels, strict=True)) for one in ways)
    assert by_features == wanted
    assert by_index == {key: wanted[key] for key in by_index}
    assert (len(by_index), list(by_index.values()).count(None)) == (20, 1)
    assert any("|" in (name or "") for name in by_index.values())


def test_a_changed_index_is_never_read(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """faiss trusts what it reads, so its reader is not reached."""
    (path,) = (world / "store/builds/retrieve").rglob("index.faiss")
    content, read = path.read_bytes(), []
    monkeypatch.setattr(indexed_gallery.faiss, "read_index", lambda name: read.append(name))
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    arguments = [str(world / "images/train/a/0.png"), "--gallery", "tiny/indexed", "--store", str(world / "store")]
    capsys.readouterr()
    code = call("search", "simclr", *arguments)
    path.write_bytes(content)
    assert code == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert "index.faiss has other content" in line
    assert not read


def test_the_collage_shows_queries_and_what_they_found(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = world / "found.png"
    found(world, capsys, "tiny/features", "--neighbours", "3", "--collage", str(sheet))
    with Image.open(sheet) as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (2 * (112 + 8 + 26) + 8, 4 * 120 + 8, 3)
    for row in range(2):  # the nearest of each is the query itself
        top = 8 + row * 146
        query, nearest, next_one = (pixels[top : top + 112, 8 + 120 * column :][:, :112] for column in range(3))
        assert np.array_equal(query, nearest)
        assert not np.array_equal(query, next_one)


def test_fewer_images_than_asked_for_are_told(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    query = str(world / "images/train/a/0.png")
    assert (
        call("search", "simclr", query, "--gallery", str(world / "images/test"), "--store", str(world / "store")) == 0
    )
    said = capsys.readouterr()
    assert "the gallery has 3 images, fewer than the 10 that are asked for" in said.err
    assert said.out.splitlines()[0].split() == ["query", "rank", "cosine", "distance", "label", "image"]
    assert len(said.out.splitlines()) == 4


@pytest.mark.parametrize(
    ("reference", "query", "gallery", "options", "code", "message"),
    [
        ("simclr", "images/nowhere.png", "tiny/features", [], 2, "nowhere.png: no such file"),
        ("simclr", "tiny.yaml", "tiny/features", [], 6, "tiny.yaml: not an image of a known kind"),
        ("other", "images/train/a/0.png", "tiny/features", [], 2, "holds features of another encoder than other"),
        ("simclr", "images/train/a/0.png", "tiny/simclr", [], 2, "tiny/simclr was made by pretrain: a gallery is a"),
        ("simclr", "images/train/a/0.png", "tiny/plain", [], 2, "tiny/plain has no index (it is made by index: hnsw"),
        ("simclr", "images/train/a/0.png", "tiny/by_size", [], 2, "hnsw, and by by_size of a large gallery only)"),
        ("other", "images/train/a/0.png", "tiny/indexed", [], 2, "holds features of another encoder than other"),
        ("simclr", "images/train/a/0.png", "tiny/nothing", [], 2, "nothing"),
        ("features", "images/train/a/0.png", "tiny/features", [], 2, "holds no encoder"),
        ("simclr", "images/train/a/0.png", "tiny/features", ["--collage", "x.jpg"], 2, "x.jpg: --collage is a"),
        ("simclr", "images/train/a/0.png", "empty", [], 2, "empty: no files here ending in"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_one_line(
    world: Path,
    capsys: pytest.CaptureFixture[str],
    reference: str,
    query: str,
    gallery: str,
    options: list[str],
    code: int,
    message: str,
) -> None:
    (world / "empty").mkdir(exist_ok=True)
    where = str(world / gallery) if gallery == "empty" else gallery
    capsys.readouterr()
    arguments = [str(world / query), "--gallery", where, "--store", str(world / "store"), *options]
    assert call("search", reference, *arguments) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
