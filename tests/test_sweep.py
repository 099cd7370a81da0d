"""What gc takes away, and what it keeps."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from stores import age, files_of, is_there, make, name, prepared, run_gc, whats

from pipeline import cli
from pipeline.errors import DamagedArtifact, UsageError
from pipeline.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return prepared(tmp_path)


def test_what_has_a_name_stays_with_all_that_it_was_made_from(store: Store) -> None:
    source = make(store, "source", stage="numbers")
    middle = make(store, "middle", source, stage="numbers")
    result, other = make(store, "result", middle), make(store, "other", source)
    name(store, result)
    found = run_gc(store)
    assert whats(found.moved) == [f"train {other.digest[:8]}"]
    assert [is_there(store, one) for one in (source, middle, result, other)] == [True, True, True, False]
    assert store.current("train", other.key) is None
    assert not store.whole("train", other.digest).exists()
    assert run_gc(store).moved == []


def test_it_only_says_what_would_go(store: Store) -> None:
    other = make(store, "other")
    before = files_of(store)
    found = run_gc(store, apply=False)
    assert files_of(store) == before
    (item,) = found.moved
    files = [path for place in item.paths for path in [place, *place.rglob("*")] if path.is_file()]
    assert item.size_bytes == sum(path.stat().st_size for path in files) > other.size_bytes, "manifest and records too"
    assert found.trash_bytes == item.size_bytes
    applied = run_gc(store)
    assert (applied.moved, applied.trash_bytes) == (found.moved, found.trash_bytes)


def test_the_newest_versions_keep_their_names_and_labelled_ones_do(store: Store) -> None:
    records = [make(store, f"content {number}") for number in range(6)]
    versions = [name(store, record) for record in records]
    store.tag(versions[1], "best")
    store.name("toy", "train", records[2])  # is reused, so that it is `latest`
    found = run_gc(store, keep=2)
    assert whats(found.moved[:2]) == ["toy/train@v1", "toy/train@v4"]
    assert [version.label for version in store.versions("toy", "train")] == ["v2", "v3", "v5", "v6"]
    assert [is_there(store, record) for record in records] == [False, True, True, False, True, True]
    assert name(store, make(store, "content 6")).label == "v7", "numbers are not given anew"
    with pytest.raises(UsageError, match="no such version or alias; toy/train has best, latest, v2"):
        store.resolve("train@v1")


def test_a_version_that_another_was_made_from_loses_its_name_alone(store: Store) -> None:
    old = make(store, "old", stage="numbers")
    name(store, old)
    name(store, make(store, "new", stage="numbers"))
    name(store, make(store, "result", old))
    (item,) = run_gc(store, keep=1).moved
    assert (item.what, item.why) == ("toy/numbers@v1", "older than the newest 1; its files are needed still")
    assert is_there(store, old)


def test_another_record_of_the_same_bytes_stays_if_what_it_was_made_from_does(store: Store) -> None:
    """So that settings which give the same bytes are up to date still."""
    kept, gone = make(store, "kept", stage="numbers"), make(store, "gone", stage="numbers")
    name(store, kept)
    result = make(store, "result", key="a" * 64)
    name(store, result)
    make(store, "result", kept, key="b" * 64)
    make(store, "result", gone, key="c" * 64)
    assert whats(run_gc(store).moved) == [f"numbers {gone.digest[:8]}", f"a record of train {result.digest[:8]}"]
    assert [store.current("train", key * 64) is not None for key in "abc"] == [True, True, False]


def test_what_was_made_lately_waits_for_its_name(store: Store) -> None:
    source = make(store, "source", stage="numbers")
    lately = make(store, "result", source)
    os.utime(store.run_file("train", lately.key, lately.digest))
    assert run_gc(store, grace=0).moved == [], "the run that made it may have been killed before it named it"
    name(store, lately)
    name(store, make(store, "newer"))
    gone = run_gc(store, keep=1).moved
    assert len(gone) == 3, "a name that is taken from it is another thing: it goes, with what it was made from"
    assert not is_there(store, lately)
    assert not is_there(store, source)


def test_nothing_goes_where_a_record_of_what_is_named_cannot_be_read(store: Store) -> None:
    record, other = make(store, "result"), make(store, "other")
    name(store, record)
    store.run_file("train", record.key, record.digest).write_text("{}")
    with pytest.raises(DamagedArtifact, match="not known what it was made from, and nothing was moved"):
        run_gc(store)
    assert is_there(store, other)
    store.run_file("train", record.key, record.digest).unlink()
    with pytest.raises(DamagedArtifact, match="nothing was moved"):
        run_gc(store)


def test_the_command_prints_what_and_bytes(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    record = make(store, "old")
    name(store, record)
    name(store, make(store, "new"))
    arguments = ["gc", "--keep", "1", "--store", str(store.path)]

    def simclr(*more: str) -> str:
        assert cli.guarded(lambda: cli.app([*arguments, *more], standalone_mode=False)) == 0
        return capsys.readouterr().out

    planned = simclr()
    for line in ("toy/train@v1", "older than the newest 1", f"train {record.digest[:8]}", "nothing was done: --apply"):
        assert line in planned
    told = json.loads(simclr("--json"))
    assert (told["applied"], told["freed_bytes"], told["trash_bytes"]) == (False, 0, told["moved_bytes"])
    assert told["moved_bytes"] == sum(one["size_bytes"] for one in told["moved"]) > 0
    applied = simclr("--apply")
    assert "went to the trash" in applied
    (back,) = [line for line in applied.splitlines() if line.startswith("to have it back: ")]
    subprocess.run(shlex.split(back.removeprefix("to have it back: ")), check=True)
    assert store.resolve("train@v1").digest == record.digest
    assert is_there(store, record)
    simclr("--apply")
    freed = json.loads(simclr("--apply", "--grace", "0", "--json"))
    sizes = [one["size_bytes"] for one in freed["deleted"]]
    assert (freed["freed_bytes"], freed["trash_bytes"], freed["moved"]) == (sum(sizes), 0, [])
    assert len(sizes) == 2
    assert freed["trash"] is None
    assert simclr().startswith("0 B would go to the trash")
    assert cli.guarded(lambda: cli.app([*arguments, "--grace", "x"], standalone_mode=False)) == 2


def test_without_a_grace_what_goes_is_freed_at_once(store: Store) -> None:
    record = make(store, "old")
    planned = run_gc(store, grace=0, apply=False)
    found = run_gc(store, grace=0)
    assert whats(found.moved) == whats(planned.moved) == [f"train {record.digest[:8]}"]
    assert planned.freed_bytes == found.freed_bytes == found.moved[0].size_bytes > 0
    assert (found.deleted, found.trash_bytes, found.trash) == ([], 0, None)
    assert planned.trash_bytes == 0
    assert list((store.path / "trash").iterdir()) == []


def test_the_command_tells_what_stays_and_takes_it_when_asked(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    work = store.work("train", "a" * 64) / "checkpoints" / "step-000000001" / "state.json"
    work.parent.mkdir(parents=True)
    work.write_text("{}")
    age(store.path / "work", 8)
    used = store.path / "in_use" / "elsewhere_0_0-1-2-3" / f"train.{make(store, 'old').digest}"
    used.parent.mkdir(parents=True)
    used.touch()

    def simclr(*more: str) -> str:
        assert cli.guarded(lambda: cli.app(["gc", "--store", str(store.path), *more], standalone_mode=False)) == 0
        return capsys.readouterr().out

    told = simclr()
    assert "work of train aaaaaaaa, 2 B kept: unfinished, with 1 checkpoint: --unfinished takes it\n" in told
    assert re.search(r"^1 artifact, [0-9.]+ K?i?B kept: in use by elsewhere process 1$", told, re.M)
    assert [one["why"].partition(":")[0] for one in json.loads(simclr("--json"))["kept"]] == [
        "in use by elsewhere process 1",
        "unfinished, with 1 checkpoint",
    ]
    assert "kept: unfinished" in simclr("--apply")
    assert work.exists()
    assert "unfinished, with 1 checkpoint, untouched for 8 days" in simclr("--unfinished")
    assert "kept: unfinished" not in simclr("--unfinished", "--apply")
    assert not work.exists()
