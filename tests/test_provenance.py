"""Keys and fingerprints: what they hold, and what they must not."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline import provenance
from pipeline.errors import UsageError
from pipeline.provenance import Fingerprint, fingerprint, step_key
from pipeline.settings import Call, ForeignInput

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


def test_a_root_may_be_a_file_or_a_pattern(tmp_path: Path) -> None:
    folder = fill(tmp_path / "one")

    def looked(path: Path) -> list[str]:
        found = fingerprint(ForeignInput("files", (path,)), tmp_path / "cache" / path.name)
        assert found is not None
        (listing,) = (tmp_path / "cache" / path.name).glob("*.files.json")
        return sorted(json.loads(listing.read_bytes()))

    assert looked(folder / "notes.txt") == ["0/notes.txt"]
    assert looked(folder / "*.txt") == ["0/notes.txt"]
    assert looked(tmp_path / "o*" / "**" / "*.jpg") == ["0/one/cats/a.jpg"]
    (folder / "[x].txt").write_bytes(b"a name, not a pattern")
    assert looked(folder / "[x].txt") == ["0/[x].txt"]
    with pytest.raises(UsageError, match=r"files:.*\*\.png: no files here$"):
        looked(folder / "*.png")


def test_named_files_count_by_content_and_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that are not there: the fingerprint changes when they come."""
    folder, cache = fill(tmp_path / "one"), tmp_path / "cache"
    names = {"a": str(folder / "cats/a.jpg"), "gone": str(folder / "gone"), "none": "\0"}
    listing = Call("somewhere", "names", ("an argument",))
    source = ForeignInput("table", (folder / "notes.txt",), listing=listing)
    calls: list[Call] = []
    reads: list[Path] = []
    real = provenance.sha256_file
    monkeypatch.setattr(provenance, "sha256_file", lambda path: (reads.append(path), real(path))[1])

    def look() -> Fingerprint:
        found = fingerprint(source, cache, call=lambda call: (calls.append(call), (7, names))[1])
        assert found is not None
        return found

    first = look()
    assert (first.files, first.samples, len(reads)) == (4, 7, 2)
    assert look().value == first.value
    assert (len(calls), len(reads)) == (2, 2)
    assert fingerprint(source, cache, look=False) is not None
    assert calls == [listing, listing], "nothing is parsed where the last look is trusted"
    (folder / "gone").write_bytes(b"here")
    second = look()
    assert second.value != first.value
    (folder / "cats/a.jpg").write_bytes(b"uno")
    assert look().value not in (first.value, second.value)
    assert len(reads) == 4


def test_what_a_call_is_given_tells_looks_apart(tmp_path: Path) -> None:
    folder = fill(tmp_path / "one")
    calls = [Call("somewhere", "names", (column,)) for column in ("a", "b")]
    sources = [ForeignInput("table", (folder / "notes.txt",), listing=call) for call in calls]
    seen = fingerprint(sources[0], tmp_path / "cache", call=lambda _: (1, {"x": str(folder / "b.JPG")}))
    assert seen is not None
    assert fingerprint(sources[1], tmp_path / "cache", look=False) is None
