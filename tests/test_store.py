"""Names, versions, REFs, and what the store refuses."""

import json
import os
import shutil
from pathlib import Path

import pytest

from pipeline import manifest
from pipeline import store as store_module
from pipeline.errors import DamagedArtifact, UsageError
from pipeline.manifest import FILES
from pipeline.records import Record, Version
from pipeline.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    store.prepare()
    return store


def publish(store: Store, content: str, key: str, recipe: str = "toy", step: str = "train") -> tuple[Record, Version]:
    folder = store.path / "private"
    (folder / FILES).mkdir(parents=True, exist_ok=True)
    (folder / FILES / "result.txt").write_text(content)
    digest, size = store.publish(folder, "train")
    record = Record("train", 1, key * 64, digest, recipe, step, 0, {}, {}, {}, {}, [], size)
    current = store.write_record(record)
    return current, store.name(recipe, step, current)


def test_versions_count_up_and_equal_bytes_make_none(store: Store) -> None:
    assert [publish(store, *one)[1].label for one in [("x", "a"), ("y", "b"), ("x", "c")]] == ["v1", "v2", "v1"]
    latest = store.latest("toy", "train")
    assert latest is not None
    assert (latest.label, latest.key) == ("v1", "c" * 64)


def test_the_first_digest_under_a_key_is_current(store: Store) -> None:
    first, _ = publish(store, "x", "a")
    assert publish(store, "y", "a")[0] == first
    folder = store.path / "private"
    (folder / FILES).mkdir(parents=True, exist_ok=True)
    (folder / FILES / "result.txt").write_text("z")
    digest, size = store.publish(folder, "train")
    forced = Record("train", 1, "a" * 64, digest, "toy", "train", 0, {}, {}, {}, {}, [], size)
    assert store.write_record(forced, repoint=True) == forced
    assert store.current("train", "a" * 64) == forced


def test_references(store: Store) -> None:
    record, first = publish(store, "x", "a")
    _, second = publish(store, "y", "b")
    store.tag(first, "best")
    assert store.labels(first) == ["best"]
    assert store.labels(second) == ["latest"]
    for reference in ("train@v1", "toy/train@v1", "train@best", record.digest, record.digest[:8]):
        assert store.resolve(reference).label == "v1", reference
    for reference in ("train", "train@latest", "toy/train"):
        assert store.resolve(reference).label == "v2", reference


def test_references_that_name_nothing_or_too_much(store: Store) -> None:
    publish(store, "x", "a")
    publish(store, "y", "b", recipe="other")
    with pytest.raises(UsageError, match=r"several recipes have that step; say which: other/train, toy/train"):
        store.resolve("train")
    with pytest.raises(UsageError, match=r"no such version or alias; toy/train has latest, v1"):
        store.resolve("toy/train@v9")
    with pytest.raises(UsageError, match=r"no artifact of that name .*other/train, toy/train"):
        store.resolve("probe@latest")
    with pytest.raises(UsageError, match="no artifact has a digest"):
        store.resolve("0123456789")


@pytest.mark.parametrize("alias", ["v3", "latest", "../up", "a b", "", "1st"])
def test_aliases_are_plain_words(store: Store, alias: str) -> None:
    _, version = publish(store, "x", "a")
    with pytest.raises(UsageError, match="an alias is a word"):
        store.tag(version, alias)


def test_verify_names_the_damaged_file(store: Store) -> None:
    record, _ = publish(store, "x", "a")
    assert store.verify("train", record.digest) == []
    (store.files("train", record.digest) / "result.txt").write_text("y")
    assert [problem.path for problem in store.verify("train", record.digest)] == ["result.txt"]
    manifest = store.build("train", record.digest) / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    assert "digest" in store.verify("train", record.digest)[0].problem


def test_an_artifact_that_was_deleted_is_not_current(store: Store) -> None:
    record, _ = publish(store, "x", "a")
    (store.build("train", record.digest) / "manifest.json").unlink()
    assert store.current("train", record.key) is None


def test_a_store_of_a_newer_version_is_refused(store: Store) -> None:
    (store.path / "format.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(UsageError, match="upgrade simclr-pipeline"):
        Store(store.path)


def test_the_default_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMCLR_STORE", "/somewhere")
    assert Store().path == Path("/somewhere")
    monkeypatch.delenv("SIMCLR_STORE")
    assert Store().path == Path("artifacts")


def test_a_bit_that_changes_no_time_is_found_in_what_is_small(store: Store) -> None:
    record, _ = publish(store, "content", "a")
    store.require_whole(record)
    path = store.files("train", record.digest) / "result.txt"
    seen = store.whole("train", record.digest)
    path.write_text("cOntent")
    seen.write_bytes(manifest.canonical_json(manifest.stamps(store.build("train", record.digest))))
    with pytest.raises(DamagedArtifact, match=r"result\.txt has other content"):
        store.require_whole(record)


def test_a_large_artifact_is_read_once_and_a_changed_one_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "ALWAYS_READ_BYTES", 0)
    record, _ = publish(store, "content", "a")
    read: list[Path] = []
    real = manifest.sha256_file
    monkeypatch.setattr(manifest, "sha256_file", lambda path: read.append(path) or real(path))
    store.require_whole(record)
    assert read == [], "it was hashed a moment ago, when it was published"
    path = store.files("train", record.digest) / "result.txt"
    os.utime(path, (1, 1))
    store.require_whole(record)
    store.require_whole(record)
    assert read == [path], "another time: it is read again, once"
    shutil.rmtree(store.path / "whole")
    store.require_whole(record)
    assert read == [path, path], "what is known of it can be deleted at any time"

    path.write_text("CONTENT")
    with pytest.raises(DamagedArtifact, match=r"toy/train: result\.txt has other content.*RECIPE train --force"):
        store.require_whole(record)
    path.write_text("longer content")
    with pytest.raises(DamagedArtifact, match="has 14 bytes instead of 7"):
        store.require_whole(record)
    path.unlink()
    with pytest.raises(DamagedArtifact, match=r"result\.txt is missing"):
        store.require_whole(record)
    path.write_text("content")
    (path.parent / "more.txt").write_text("more")
    with pytest.raises(DamagedArtifact, match=r"more\.txt is not in the manifest"):
        store.require_whole(record)
