"""Keys and fingerprints: what they hold, and what they must not."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UsageError
from pipeline.provenance import code, environment, fingerprint, step_key
from pipeline.settings import ForeignInput

IMAGES = frozenset({".jpg"})


def fill(folder: Path) -> Path:
    (folder / "cats").mkdir(parents=True)
    (folder / "cats" / "a.jpg").write_bytes(b"one")
    (folder / "b.JPG").write_bytes(b"two")
    (folder / ".hidden.jpg").write_bytes(b"three")
    (folder / "notes.txt").write_bytes(b"four")
    return folder


def value(folder: Path, cache: Path) -> str:
    found = fingerprint(ForeignInput("folder", (folder,), IMAGES), cache)
    assert found is not None
    return found.value


def test_a_key_holds_all_that_decides_the_bytes() -> None:
    facts: dict[str, Any] = {"stage": "a", "version": 1, "seed": 0, "settings": {"x": 1}, "inputs": {"i": "d"}}
    keys = {
        step_key(**facts),
        step_key(**facts | {"stage": "b"}),
        step_key(**facts | {"version": 2}),
        step_key(**facts | {"seed": None}),
        step_key(**facts | {"settings": {"x": 2}}),
        step_key(**facts | {"inputs": {"i": "e"}}),
        step_key(**facts, names=["r"]),
    }
    assert len(keys) == 7
    assert step_key(**facts | {"settings": {"x": 1}}) in keys


def test_the_same_content_has_the_same_fingerprint_anywhere(tmp_path: Path) -> None:
    one, other = fill(tmp_path / "one"), fill(tmp_path / "other")
    assert value(one, tmp_path / "cache") == value(other, tmp_path / "cache")
    (other / "b.JPG").rename(other / "c.JPG")
    assert value(one, tmp_path / "cache") != value(other, tmp_path / "cache"), "relative paths count: they are classes"


def test_only_wanted_files_count(tmp_path: Path) -> None:
    folder = fill(tmp_path / "one")
    before = value(folder, tmp_path / "cache")
    found = fingerprint(ForeignInput("folder", (folder,), IMAGES), tmp_path / "cache")
    assert found is not None
    assert (found.files, found.size_bytes) == (2, 6)
    (folder / "notes.txt").write_bytes(b"other")
    assert value(folder, tmp_path / "cache") == before
    (folder / "cats" / "a.jpg").write_bytes(b"uno")
    assert value(folder, tmp_path / "cache") != before


def test_files_of_the_same_size_and_time_are_not_read_again(tmp_path: Path) -> None:
    folder, cache = fill(tmp_path / "one"), tmp_path / "cache"
    before = value(folder, cache)
    status = (folder / "b.JPG").stat()
    (folder / "b.JPG").write_bytes(b"TWO")
    os.utime(folder / "b.JPG", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert value(folder, cache) == before, "this is the price of not reading them again, and is documented"
    os.utime(folder / "b.JPG")
    assert value(folder, cache) != before


def test_links_pipes_and_strange_names(tmp_path: Path) -> None:
    folder = fill(tmp_path / "one")
    (folder / "cats" / "up").symlink_to(folder)
    (folder / "gone.jpg").symlink_to(folder / "nothing")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "self.jpg").symlink_to(folder / "self.jpg")
    (folder / "link.jpg").symlink_to(folder / "b.JPG")
    with open(os.fsencode(folder) + b"/\xff.jpg", "wb") as file:
        file.write(b"five")
    found = fingerprint(ForeignInput("folder", (folder,), IMAGES), tmp_path / "cache")
    assert found is not None
    assert found.files == 4


def test_without_looking_the_last_look_counts(tmp_path: Path) -> None:
    source = ForeignInput("folder", (fill(tmp_path / "one"),), IMAGES)
    assert fingerprint(source, tmp_path / "cache", look=False) is None
    seen = fingerprint(source, tmp_path / "cache")
    (tmp_path / "one" / "b.JPG").unlink()
    assert fingerprint(source, tmp_path / "cache", look=False) == seen


def test_missing_and_empty_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="gone: no such folder"):
        value(tmp_path / "gone", tmp_path / "cache")
    with pytest.raises(UsageError, match=r"empty: no files here ending in \.jpg"):
        value(tmp_path / "empty", tmp_path / "cache")


def test_code_and_environment_are_plain_data() -> None:
    assert len(code()["source_sha256"]) == 64
    assert environment()["libraries"]["torch"]
    json.dumps([code(), environment()])
