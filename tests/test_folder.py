"""Folders of images, one or several: classes, splits, and what is left out."""

import json
import os
from pathlib import Path
from typing import Literal

import pytest
from conftest import RunStage
from PIL import Image

from pipeline.provenance import fingerprint
from pipeline.settings import ForeignInput
from stages.images import open_shards
from stages.settings.shard import Shard
from stages.settings.source import folder_names
from stages.sources.candidates import Source, SourceError
from stages.sources.folder import read_folder, read_folders

SUFFIXES = frozenset({".jpg", ".png"})


def write(root: Path, *paths: str) -> Path:
    """Files that look like images by name."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")
    return root


def read(
    root: Path, labels: Literal["folder", "none"] = "folder", splits: Literal["given", "drawn"] | None = None
) -> Source:
    return read_folder(root, SUFFIXES, labels, splits)


def listed(source: Source) -> list[tuple[str, str | None, str | None]]:
    return [(one.key, one.split, next(iter(one.labels), None)) for one in source.candidates]


def test_the_class_is_the_parent_folder(tmp_path: Path):
    write(tmp_path, "b/2.jpg", "a/1.png", "deep/er/a/1.png", "b/10.jpg")
    source = read(tmp_path)
    assert listed(source) == [
        ("a/1.png", None, "a"),
        ("b/10.jpg", None, "b"),
        ("b/2.jpg", None, "b"),
        ("deep/er/a/1.png", None, "a"),
    ]
    assert source.classes == ["a", "b"]
    assert {one.labels for one in read(tmp_path, labels="none").candidates} == {()}


@pytest.mark.parametrize("validation", ["val", "valid", "validation", "Val"])
def test_top_folders_give_the_splits(tmp_path: Path, validation: str):
    write(tmp_path, "train/a/1.jpg", f"{validation}/x/a/1.jpg", "Test/b/1.jpg", "train/2.jpg")
    assert set(listed(read(tmp_path))) == {
        ("train/2.jpg", "train", None),
        ("train/a/1.jpg", "train", "a"),
        (f"{validation}/x/a/1.jpg", "val", "a"),
        ("Test/b/1.jpg", "test", "b"),
    }


def test_images_without_a_folder_have_no_class(tmp_path: Path):
    source = read(write(tmp_path, "1.jpg", "2.jpg"))
    assert listed(source) == [("1.jpg", None, None), ("2.jpg", None, None)]
    assert source.classes == []


def test_split_folders_beside_others_are_ambiguous(tmp_path: Path):
    write(tmp_path, "train/1.jpg", "bus/1.jpg", "tram/1.jpg", "top.jpg")
    with pytest.raises(
        SourceError, match=r"has train beside others \(bus, top.jpg, tram, ...\).*splits: drawn"
    ) as error:
        read(tmp_path)
    assert error.value.exit_code == 6
    drawn = read(tmp_path, splits="drawn")
    assert drawn.classes == ["bus", "train", "tram"]
    assert {one.split for one in drawn.candidates} == {None}
    given_splits = read(tmp_path, splits="given")
    assert listed(given_splits) == [("train/1.jpg", "train", None)]
    assert given_splits.left_out == {"images outside the splits": 3}


def test_given_splits_must_be_there(tmp_path: Path):
    with pytest.raises(SourceError, match="no image in train/, val/ or test/"):
        read(write(tmp_path, "a/1.jpg"), splits="given")


def test_an_image_named_like_a_split_is_no_split(tmp_path: Path):
    (tmp_path / "train").mkdir()
    source = read(write(tmp_path, "a/train.jpg", "b/test/1.jpg"))
    assert listed(source) == [("a/train.jpg", None, "a"), ("b/test/1.jpg", None, "test")]


def test_other_files_are_counted_and_hidden_ones_skipped(tmp_path: Path):
    write(tmp_path, "a/1.JPG", "a/notes.txt", "a/noending", ".git/x.jpg", "a/.x.jpg", "a/._1.jpg", "a/Thumbs.db")
    source = read(tmp_path)
    assert listed(source) == [("a/1.JPG", None, "a")]
    assert source.left_out == {".txt": 1, ".db": 1, "without an ending": 1}


NAMES = ["a b", "x,y;z", "v1.2.3", "ζωή", "猫", "cafe\u0301", "caf\u00e9", "<b>&'\"", "back\\slash", "new\nline", "🦊"]


def test_names_may_be_anything(tmp_path: Path):
    write(tmp_path, *[f"{name}/{name}.jpg" for name in NAMES])
    source = read(tmp_path)
    assert source.classes == sorted(NAMES)
    assert [one.key for one in source.candidates] == sorted(f"{name}/{name}.jpg" for name in NAMES)


def test_names_that_are_no_text_are_escaped(tmp_path: Path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    with open(folder + b"/\xff.jpg", "wb") as file:
        file.write(b"here")
    (candidate,) = read(tmp_path).candidates
    assert candidate.key == r"caf\xe9/\xff.jpg"
    assert candidate.labels == (r"caf\xe9",)
    assert isinstance(candidate.image, str)
    assert (tmp_path / candidate.image).read_bytes() == b"here"


def test_links_are_followed_but_not_in_circles(tmp_path: Path):
    write(tmp_path / "elsewhere", "fox/1.jpg", "2.jpg")
    root = write(tmp_path / "root", "owl/1.jpg")
    (root / "linked").symlink_to(tmp_path / "elsewhere/fox")
    (root / "owl/2.jpg").symlink_to(tmp_path / "elsewhere/2.jpg")
    (root / "owl/lost.jpg").symlink_to("nowhere.jpg")
    (root / "owl/up").symlink_to(root)
    (root / "there").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(root)
    assert [one.key for one in read(root).candidates] == [
        "linked/1.jpg",
        "owl/1.jpg",
        "owl/2.jpg",
        "there/2.jpg",
        "there/fox/1.jpg",
    ]


def test_what_is_no_file_is_left_out(tmp_path: Path):
    write(tmp_path, "a/1.jpg", "a/2.txt")
    os.mkfifo(tmp_path / "a/2.jpg")
    (tmp_path / "a/3.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "a/circle.jpg").symlink_to("circle.jpg")
    (tmp_path / "a/circle").symlink_to("circle")
    (tmp_path / "a/5.jpg").symlink_to("1.jpg")
    source = read(tmp_path)
    assert [one.key for one in source.candidates] == ["a/1.jpg", "a/5.jpg"]
    assert source.left_out == {"links to nothing, pipes and the like": 4, ".txt": 1}
    (remark,) = source.remarks
    assert remark.startswith("3 names of images lead to no file")
    assert remark.endswith("the first: a/2.jpg")


def test_candidates_are_the_files_of_the_fingerprint(tmp_path: Path):
    """Otherwise equal keys would stand for other content."""
    root = write(tmp_path / "root", "a/1.jpg", "b/2.PNG", "b/c/3.jpg", "b/notes.txt", ".hidden/4.jpg")
    write(tmp_path / "elsewhere", "5.jpg", "deep/6.jpg")
    (root / "b/up").symlink_to(root)
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "again").symlink_to(tmp_path / "elsewhere")
    (root / "7.jpg").symlink_to(tmp_path / "elsewhere/5.jpg")
    (root / "lost.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(root / "pipe.jpg")
    seen = fingerprint(ForeignInput("folder", (root,), SUFFIXES), tmp_path)
    assert seen is not None
    (listing,) = tmp_path.glob("*.files.json")
    assert [f"0/{one.key}" for one in read(root).candidates] == sorted(json.loads(listing.read_text()))
    assert seen.files == 8


def test_endings_that_are_none_are_not_repeated(tmp_path: Path):
    write(tmp_path, "1.jpg", "a.\x1b[31m", "b. and so on", "c.averyveryverylongending", "d.HEIC", "e.heic")
    assert read(tmp_path).left_out == {".heic": 2, "of other endings": 3}


def test_splits_below_the_top_are_told(tmp_path: Path):
    write(tmp_path, "images/train/a/1.jpg", "images/Val/a/1.jpg")
    source = read(tmp_path)
    assert {one.split for one in source.candidates} == {None}
    assert source.remarks == (
        f"images/Val is named like a split and was taken for part of a class path: point the source at "
        f"{tmp_path / 'images'} to use it",
    )
    assert {one.split for one in read(tmp_path / "images").candidates} == {"train", "val"}
    assert read(tmp_path / "images").remarks == ()
    assert read(tmp_path, splits="drawn").remarks == ()
    write(tmp_path, "more/train/a/1.jpg")
    (remark,) = read(tmp_path).remarks
    assert remark.endswith("put them at the top of the source, the classes inside")


def test_a_missing_or_empty_folder_is_named(tmp_path: Path):
    with pytest.raises(SourceError, match=r"no folder .*nowhere"):
        read(tmp_path / "nowhere")
    write(tmp_path, "readme.txt", ".hidden/1.jpg")
    with pytest.raises(SourceError, match=r"no image in .*\(1 other files left out \(\.txt 1\)\).*\.jpg \.png"):
        read(tmp_path)


# Several folders


def read_several(roots: list[Path], splits: Literal["given", "drawn"] | None = None) -> Source:
    return read_folders(roots, folder_names(tuple(roots)), SUFFIXES, "folder", splits)


def test_keys_of_several_folders_begin_with_their_names(tmp_path: Path):
    write(tmp_path, "one/cats/1.jpg", "one/top.jpg", "two/cats/1.jpg", "two/notes.txt")
    source = read_several([tmp_path / "two", tmp_path / "one"])
    assert listed(source) == [
        ("one/cats/1.jpg", None, "cats"),
        ("one/top.jpg", None, None),
        ("two/cats/1.jpg", None, "cats"),
    ]
    assert source.left_out == {".txt": 1}
    assert source.candidates[0].image == str(tmp_path / "one/cats/1.jpg")


def test_folders_of_one_name_are_told_apart():
    assert folder_names((Path("/a/images"), Path("/b/images"), Path("/b/more"))) == ("a-images", "b-images", "more")
    assert folder_names((Path("/x/a/i"), Path("/y/a/i"))) == ("x-a-i", "y-a-i")


def test_several_folders_agree_on_splits(tmp_path: Path):
    write(tmp_path, "one/train/a/1.jpg", "one/test/a/1.jpg", "two/train/a/1.jpg", "three/a/1.jpg")
    both = read_several([tmp_path / "one", tmp_path / "two"])
    assert listed(both) == [
        ("one/test/a/1.jpg", "test", "a"),
        ("one/train/a/1.jpg", "train", "a"),
        ("two/train/a/1.jpg", "train", "a"),
    ]
    with pytest.raises(SourceError, match=r"one has split folders and the other folders of the source have none"):
        read_several([tmp_path / "one", tmp_path / "three"])
    assert len(read_several([tmp_path / "one", tmp_path / "three"], splits="drawn").candidates) == 3
    with pytest.raises(SourceError, match=r"no folder .*gone"):
        read_several([tmp_path / "one", tmp_path / "gone"])


def test_folders_that_are_named_like_splits_are_told(tmp_path: Path):
    write(tmp_path, "set/train/a/1.jpg", "set/Test/a/1.jpg", "more/val/a/1.jpg", "plain/a/1.jpg")
    train, test, plain = tmp_path / "set/train", tmp_path / "set/Test", tmp_path / "plain"
    source = read_several([train, test])
    assert {one.split for one in source.candidates} == {None}
    assert source.remarks == (
        f"{train}, {test} are named like splits, but the folders of a list are mixed and splits drawn anew: point the "
        f"source at {tmp_path / 'set'} to use these names, or say `splits: drawn`",
    )
    assert {one.split for one in read(tmp_path / "set").candidates} == {"train", "test"}
    assert read_several([train, test], splits="drawn").remarks == ()
    (remark,) = read_several([train, tmp_path / "more/val"]).remarks
    assert "put the folders into one and name that to use these names" in remark
    (remark,) = read_several([train, plain]).remarks
    assert remark.startswith(f"{train} is named like a split, but")
    assert read_several([train]).remarks == ()


def test_folders_whose_images_have_no_class_are_told(tmp_path: Path):
    write(tmp_path, "set/cats/1.jpg", "set/dogs/1.jpg", "more/1.jpg", "flat/train/1.jpg", "flat/test/1.jpg")
    cats, dogs = tmp_path / "set/cats", tmp_path / "set/dogs"
    source = read_several([cats, dogs])
    assert source.classes == []
    head = "no image has a label, because all lie directly in the folders that the source names: "
    assert source.remarks == (
        f"{head}point the source at {tmp_path / 'set'}, and each folder is a class (or say `labels: none`)",
    )
    assert read(tmp_path / "set").classes == ["cats", "dogs"]
    assert read_folders([cats, dogs], ["cats", "dogs"], SUFFIXES, "none", None).remarks == ()
    (remark,) = read_several([cats, tmp_path / "more"]).remarks
    assert remark.startswith(f"{head}put the folders into one and name that, and each")
    like_splits, no_label = read_several([tmp_path / "flat/train", tmp_path / "flat/test"]).remarks
    assert "named like splits" in like_splits
    assert no_label == f"{head}put them into folders of their classes (or say `labels: none`)"
    write(tmp_path, "set/dogs/old/1.jpg")
    assert read_several([cats, dogs]).remarks == ()


def test_the_fingerprint_of_several_folders_has_their_names(tmp_path: Path):
    """They begin the keys, and keys are in the index."""
    write(tmp_path, "one/a/1.jpg", "two/a/1.jpg")
    settings = Shard.model_validate({"source": (f"folder:{tmp_path}/one", f"folder:{tmp_path}/two")})
    before = fingerprint(settings.foreign_inputs()["source"], tmp_path / "cache")
    (tmp_path / "two").rename(tmp_path / "three")
    settings = Shard.model_validate({"source": (f"folder:{tmp_path}/one", f"folder:{tmp_path}/three")})
    after = fingerprint(settings.foreign_inputs()["source"], tmp_path / "cache")
    assert before is not None
    assert after is not None
    assert (before.files, after.files) == (2, 2)
    assert before.value != after.value
    names = {name for listing in (tmp_path / "cache").glob("*.files.json") for name in json.loads(listing.read_text())}
    assert names == {"one/a/1.jpg", "two/a/1.jpg", "three/a/1.jpg"}


def test_several_folders_become_shards(tmp_path: Path, run_stage: RunStage):
    for number, path in enumerate(("one/a/1.png", "one/b/1.png", "two/a/1.png", "two/a/2.png")):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (50 * number, 0, 0)).save(tmp_path / path)
    sources = [f"folder:{tmp_path / name}" for name in ("one", "two")]
    files = run_stage("shard", {"source": sources, "test_fraction": 0.0})
    shards = open_shards(files, "train")
    assert shards.keys == ["one/a/1.png", "one/b/1.png", "two/a/1.png", "two/a/2.png"]
    assert shards.labels.tolist() == [0, 1, 0, 0]
    assert [int(shards[place].image[0, 0, 0]) for place in range(4)] == [0, 50, 100, 150]
