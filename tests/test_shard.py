import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import RunStage
from PIL import Image
from pydantic import ValidationError

from pipeline.errors import BadData
from pipeline.settings import hashed_subset
from stages.images import open_shards, packing_processes
from stages.images.decode import decode_rgb
from stages.settings.shard import Shard
from stages.sources.candidates import SourceError


def save(path: Path, number: int, size: tuple[int, int] = (12, 10), **options: Any) -> Path:
    """An image whose pixels and format follow from the number and the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def make_folder(root: Path) -> Path:
    """Two classes, JPEG and PNG, equal file names in both."""
    for number in range(20):
        for name in ("cat", "a dog, v1.2"):
            save(root / name / f"{number}.{'jpg' if number % 2 else 'png'}", number)
    return root


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def summary(files: Path) -> dict[str, Any]:
    return json.loads((files / "shards.json").read_text())


def rejected(files: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (files / "rejected.jsonl").read_text().splitlines()]


def source(folder: Path) -> str:
    return f"folder:{folder}"


def test_a_folder_becomes_shards(tmp_path: Path, run_stage: RunStage):
    folder = make_folder(tmp_path / "images")
    (folder / "notes.txt").write_text("no image")
    files = run_stage("shard", {"source": source(folder), "test_fraction": 0.25, "images_per_shard": 8})
    assert [path.name for path in sorted(files.glob("*.tar"))] == [
        *(f"test-{number:06d}.tar" for number in range(2)),
        *(f"train-{number:06d}.tar" for number in range(4)),
    ]
    facts = summary(files)
    assert facts["classes"] == ["a dog, v1.2", "cat"]
    assert facts["source_kind"] == "folder"
    assert facts["splits"]["train"]["class_counts"] == [15, 15]
    assert facts["splits"]["test"]["class_counts"] == [5, 5]
    assert (facts["images_in"], facts["samples_out"], facts["rejected"]) == (40, 40, 0)
    assert (facts["copied"], facts["encoded"]) == (20, 20)
    assert rejected(files) == []

    rows = pq.read_table(files / "index.parquet").to_pylist()
    assert [row["id"] for row in rows] == list(range(40))
    assert [(row["split"], row["key"]) for row in rows] == sorted(
        ((row["split"], row["key"]) for row in rows), key=lambda pair: (pair[0] != "train", pair[1])
    )
    for split in ("train", "test"):
        shards = open_shards(files, split)
        assert facts["splits"][split]["samples"] == len(shards)
        assert facts["splits"][split]["bytes"] == sum(row["size"] for row in rows if row["split"] == split)
        for position, key in enumerate(shards.keys):
            assert shards.classes[int(shards.labels[position])] == key.split("/")[0]
            expected = decode_rgb((folder / key).read_bytes())
            assert np.array_equal(shards[position].image.permute(1, 2, 0).numpy(), expected)


def test_statistics_are_of_the_stored_training_pixels(tmp_path: Path, run_stage: RunStage):
    for number in range(12):
        save(tmp_path / "images/train/a" / f"{number}.jpg", number, size=(20 + number, 40))
        save(tmp_path / "images/test/a" / f"{number}.png", number)
    files = run_stage("shard", {"source": source(tmp_path / "images"), "max_long_side": 30})
    shards = open_shards(files, "train")
    pixels = np.concatenate([shards[position].image.reshape(3, -1).numpy() for position in range(12)], axis=1) / 255
    statistics = summary(files)["statistics"]
    assert statistics["pixels"] == pixels.shape[1]
    assert np.allclose(statistics["mean"], pixels.mean(axis=1), rtol=0, atol=1e-12)
    assert np.allclose(statistics["std"], pixels.std(axis=1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("who", ["both", "the other"])
def test_bytes_do_not_depend_on_processes_or_place(
    tmp_path: Path, run_stage: RunStage, monkeypatch: pytest.MonkeyPatch, who: str
):
    monkeypatch.setattr(packing_processes, "PROCESSES_FROM", 0)
    monkeypatch.setattr(packing_processes, "PARTS_PER_PROCESS", 6)
    if who == "the other":  # or this process, which works while the other starts, is done before it has begun
        monkeypatch.setattr(packing_processes._Work, "take_back", lambda work: False)
    folder = make_folder(tmp_path / "images")
    (folder / "cat/broken.jpg").write_bytes(b"\xff\xd8\xff")
    settings = {"images_per_shard": 7, "max_rejected": 0.1, "val_fraction": 0.1}
    one = run_stage("shard", {"source": source(folder), "workers": 1, **settings})
    moved = shutil.copytree(folder, tmp_path / "elsewhere/deep")
    two = run_stage("shard", {"source": source(moved), "workers": 2, **settings})
    assert digests(one) == digests(two)
    assert len(rejected(one)) == 1


def test_the_seed_draws_the_splits_and_nothing_else(tmp_path: Path, run_stage: RunStage):
    drawn = make_folder(tmp_path / "drawn")
    first, second = (run_stage("shard", {"source": source(drawn)}, seed=seed) for seed in (0, 1))
    assert open_shards(first, "test").keys != open_shards(second, "test").keys
    given = tmp_path / "given"
    for split in ("train", "test"):
        shutil.copytree(drawn, given / split)
    first, second = (run_stage("shard", {"source": source(given)}, seed=seed) for seed in (0, 1))
    assert digests(first) == digests(second)


def test_given_splits_know_no_fractions(tmp_path: Path, run_stage: RunStage):
    shutil.copytree(make_folder(tmp_path / "drawn"), tmp_path / "given/train")
    files = run_stage("shard", {"source": source(tmp_path / "given"), "test_fraction": 0.5})
    assert list(summary(files)["splits"]) == ["train"]


def test_every_unreadable_image_is_listed(tmp_path: Path, run_stage: RunStage, capsys: pytest.CaptureFixture[str]):
    folder = make_folder(tmp_path / "images")
    (folder / "cat/empty.png").touch()
    os.mkfifo(folder / "cat/pipe.jpg")
    (folder / "cat/page.jpg").write_text("<html>")
    content = save(folder / "cat/whole.jpg", 1, size=(64, 64)).read_bytes()
    (folder / "cat/cut.jpg").write_bytes(content[: len(content) // 2])
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(folder / "cat/deep.png")
    save(folder / "cat/fine.jpg", 2)
    files = run_stage("shard", {"source": source(folder), "max_rejected": 0.2, "test_fraction": 0.0})
    listed = rejected(files)
    assert {one["path"]: one["reason"] for one in listed} == {
        "cat/cut.jpg": "Premature end of JPEG file",
        "cat/deep.png": "16-bit or 32-bit image (PNG, mode I;16): set `window: [low, high]`, or convert it to 8 bits a "
        "channel",
        "cat/empty.png": "the file is empty",
        "cat/page.jpg": "not an image of a known kind",
    }
    facts = summary(files)
    assert (facts["images_in"], facts["samples_out"], facts["rejected"]) == (46, 42, 4)
    assert len(open_shards(files, "train")) == 42
    assert "4 of 46 images cannot be used, the first: cat/cut.jpg" in capsys.readouterr().err


def test_too_many_unreadable_images_fail_by_their_reasons(tmp_path: Path, run_stage: RunStage):
    folder = make_folder(tmp_path / "images")
    for number in range(12):
        (folder / f"cat/broken {number:02d}.jpg").touch()
    with pytest.raises(BadData, match=r"12 of 52 images .*max_rejected \(0.50%\)") as error:
        run_stage("shard", {"source": source(folder)})
    assert error.value.exit_code == 6
    first = ", ".join(f"cat/broken {number:02d}.jpg" for number in range(3))
    assert f"allows: {first} and 9 more (the file is empty). Mend" in str(error.value)
    assert "\n" not in str(error.value)


def test_no_image_for_train(tmp_path: Path, run_stage: RunStage):
    save(tmp_path / "images/test/a/1.png", 1)
    with pytest.raises(BadData, match="no image is left for train"):
        run_stage("shard", {"source": source(tmp_path / "images")})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/1.png").touch()
    with pytest.raises(BadData, match="no image is left for train"):
        run_stage("shard", {"source": source(tmp_path / "broken"), "max_rejected": 1.0})


def test_a_missing_folder(tmp_path: Path, run_stage: RunStage):
    with pytest.raises(SourceError, match="there is no folder"):
        run_stage("shard", {"source": source(tmp_path / "nowhere")})


def test_images_without_labels(tmp_path: Path, run_stage: RunStage):
    for number in range(10):
        save(tmp_path / f"flat/{number}.jpg", number)
    flat = run_stage("shard", {"source": source(tmp_path / "flat")})
    unlabelled = run_stage("shard", {"source": source(make_folder(tmp_path / "classes")), "labels": "none"})
    for files, count in ((flat, 8), (unlabelled, 32)):
        shards = open_shards(files, "train")
        assert shards.classes == []
        assert shards.labels.tolist() == [-1] * count
        assert summary(files)["splits"]["train"]["class_counts"] == []


def test_files_that_the_key_does_not_know_change_no_byte(
    tmp_path: Path, run_stage: RunStage, capsys: pytest.CaptureFixture[str]
):
    folder = make_folder(tmp_path / "images")
    before = run_stage("shard", {"source": source(folder)})
    assert "; 0 other files left out\n" in capsys.readouterr().err
    (folder / "notes.txt").write_text("no image")
    (folder / "cat/phone.HEIC").touch()
    (folder / "cat/page.heic").touch()
    (folder / "cat/lost.jpg").symlink_to("nowhere.jpg")
    assert digests(run_stage("shard", {"source": source(folder)})) == digests(before)
    said = capsys.readouterr().err
    assert "4 other files left out (.heic 2, .txt 1, links to nothing, pipes and the like 1)" in said
    assert "2 images are of a kind that is not read (.heic 2): make them JPEG or PNG" in said
    assert (
        "1 names of images lead to no file (broken links, pipes) and were passed over, the first: cat/lost.jpg" in said
    )


def test_splits_that_deserve_a_look(tmp_path: Path, run_stage: RunStage, capsys: pytest.CaptureFixture[str]):
    for path in ("train/a/1.png", "val/a/1.png"):
        save(tmp_path / "wrapped/images" / path, 1)
    run_stage("shard", {"source": source(tmp_path / "wrapped/images")})
    advice = "no test split: a probe needs one (probe test_split: val, or splits: drawn)"
    said = capsys.readouterr().err
    assert advice in said
    assert "named like a split" not in said
    run_stage("shard", {"source": source(tmp_path / "wrapped")})
    said = capsys.readouterr().err
    assert advice not in said
    assert "images/train is named like a split and was taken for part of a class path" in said


def test_labels_that_deserve_a_look(tmp_path: Path, run_stage: RunStage, capsys: pytest.CaptureFixture[str]):
    for path in ("train/a/1.png", "train/b/1.png", "train/top.png", "test/b/1.png", "test/new/1.png", "val/c/1.png"):
        save(tmp_path / "images" / path, 1)
    files = run_stage("shard", {"source": source(tmp_path / "images")})
    said = capsys.readouterr().err
    assert "1 classes are in test but not in train: new" in said
    assert "1 classes are in val but not in train: c" in said
    assert "1 images lie in no class folder" in said
    assert open_shards(files, "train").labels.tolist() == [0, 1, -1]
    assert summary(files)["splits"]["test"]["class_counts"] == [0, 1, 0, 1]


def test_jpeg_bytes_that_need_no_change_are_copied(tmp_path: Path, run_stage: RunStage):
    folder = tmp_path / "images"
    exif = Image.Exif()
    exif[0x0112] = 6
    save(folder / "plain.jpg", 1, size=(30, 20))
    save(folder / "turned.jpg", 2, size=(30, 20), exif=exif)
    save(folder / "large.jpg", 3, size=(90, 60))
    files = run_stage("shard", {"source": source(folder), "max_long_side": 45, "test_fraction": 0.0})
    facts = summary(files)
    assert (facts["copied"], facts["encoded"]) == (1, 2)
    for row in pq.read_table(files / "index.parquet").to_pylist():
        content = (files / row["shard"]).read_bytes()[row["offset"] : row["offset"] + row["size"]]
        assert (content == (folder / row["key"]).read_bytes()) == (row["key"] == "plain.jpg")
        expected = {"plain.jpg": (30, 20), "turned.jpg": (20, 30), "large.jpg": (45, 30)}
        assert (row["height"], row["width"]) == expected[row["key"]]
    assert open_shards(files, "train").canvas == (45, 30)


def test_digits(run_stage: RunStage):
    files = run_stage("shard", {"source": "sklearn:digits"})
    facts = summary(files)
    assert facts["source_kind"] == "sklearn"
    assert facts["classes"] == list("0123456789")
    assert sum(part["samples"] for part in facts["splits"].values()) == facts["samples_out"] == 1797
    assert facts["splits"]["test"]["samples"] == round(0.2 * 1797)
    shards = open_shards(files, "test")
    assert shards.canvas == (8, 8)
    assert [int(key[0]) for key in shards.keys] == shards.labels.tolist()


@pytest.mark.parametrize(
    "wrong",
    [
        {"source": "ftp:somewhere"},
        {"source": "folder:"},
        {"source": "folder:a", "val_fraction": 0.5, "test_fraction": 0.5},
        {"source": "folder:a", "background": [0, 0, 256]},
        {"source": "folder:a", "workers": 0},
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValidationError):
        Shard.model_validate(wrong)


def test_a_wrong_source_is_told_in_words():
    with pytest.raises(ValidationError, match=r"write folder:PATH, csv:PATH, .* or sklearn:digits"):
        Shard.model_validate({"source": "images"})
    one, several = Shard.model_json_schema()["properties"]["source"]["anyOf"]
    assert (one["type"], several["type"]) == ("string", "array")
    right = ("folder:a", "csv:a.csv", "parquet:a*", "wds:a/b.tar", "torchvision:CIFAR10", "sklearn:digits")
    assert all(re.search(one["pattern"], text) for text in right)
    assert not any(re.search(one["pattern"], text) for text in ("a", "csv:", "torchvision:a b", "sklearn:iris"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"source": []}, "a list of sources has folder:PATH only"),
        ({"source": ["folder:a", "csv:b.csv"]}, "a list of sources has folder:PATH only"),
        ({"source": ["folder:a", "folder:a/"]}, "names a folder once"),
        ({"source": "folder:a", "columns": {"label": "x"}}, "columns is for csv:, parquet:, wds: and not for folder:a"),
        ({"source": "wds:a", "images_root": "b"}, "images_root is for csv:, parquet: and not for wds:a"),
        ({"source": "csv:a", "download_folder": "b"}, "download_folder is for torchvision: and not for csv:a"),
        ({"source": "folder:a", "split_values": {"x": "train"}}, "split_values is for csv:, parquet:, wds:"),
        ({"source": "csv:a", "split_values": {"x": "dev"}}, "Input should be 'train', 'val' or 'test'"),
        ({"source": "csv:a", "columns": {"label": "x", "labels": "y"}}, "name one of them"),
        ({"source": "csv:a", "columns": {"group": "x"}, "group_pattern": "y"}, "name one of them"),
        ({"source": "csv:a", "columns": {"attributes": ["x", "x"]}}, "each names a column, once"),
        ({"source": "csv:a", "columns": {"attributes": [""]}}, "each names a column, once"),
        ({"source": "folder:a", "columns": {"attributes": ["x"]}}, "columns is for csv:, parquet:, wds: and not for"),
        ({"source": "torchvision:CIFAR10", "columns": {"attributes": ["x"]}}, "columns is for .* and not for torchvis"),
        ({"source": "folder:a", "split_by": "class", "splits": "given"}, "both say what the splits are: leave one out"),
        ({"source": "folder:a", "split_by": "class", "labels": "none"}, "one label an image, which labels: none does"),
        ({"source": "csv:a", "split_by": "class", "columns": {"labels": "x"}}, "which columns.labels does not give"),
        ({"source": "folder:a", "split_classes": {"train": ["a"]}}, "say `split_by: class` with it"),
        ({"source": "folder:a", "split_by": "class", "split_classes": {"train": []}}, "at least 1 item"),
        (
            {"source": "folder:a", "split_by": "class", "split_classes": {"train": ["a", "b"], "test": ["a"]}},
            "a class is in one split, and 'a' is named twice",
        ),
        ({"source": "folder:a", "group_pattern": "(a"}, "no regular expression .*unterminated subpattern"),
    ],
)
def test_settings_of_sources_fit_together(wrong: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        Shard.model_validate_json(json.dumps(wrong), strict=True)


def test_where_files_lie_does_not_count_and_how_they_are_read_does():
    kept = hashed_subset(Shard.model_validate({"source": "csv:a", "images_root": "b"}))
    assert not {"source", "images_root", "download_folder", "workers"} & kept.keys()
    assert {"columns", "split_values", "group_pattern", "allow_group_in_splits", "splits", "labels"} <= kept.keys()
    assert {"split_by", "split_classes", "val_fraction", "test_fraction"} <= kept.keys()


def test_where_classes_are_named_neither_seed_nor_fractions_count():
    drawn = {"source": "folder:a", "split_by": "class"}
    assert Shard.model_validate(drawn).depends_on_seed()
    named = Shard.model_validate(drawn | {"split_classes": {"train": ("a",), "test": ("b",)}})
    assert not named.depends_on_seed()
    kept = hashed_subset(named)
    assert kept["split_classes"] == {"train": ["a"], "val": [], "test": ["b"]}
    assert not {"val_fraction", "test_fraction"} & kept.keys()
