"""Nothing goes while it is in use, and nobody uses what goes."""

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from stores import is_there, make, name, prepared, run_gc

from pipeline import cli, encoders, uses
from pipeline.errors import Held
from pipeline.manifest import canonical_json
from pipeline.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return prepared(tmp_path)


def test_what_is_in_use_keeps_its_names(store: Store) -> None:
    source = make(store, "source", stage="numbers")
    old, new = make(store, "old", source), make(store, "new")
    name(store, old)
    name(store, new)
    with store.using() as used:
        assert used.resolve("train@v1").digest == old.digest
        with used.using() as same:
            assert same is used
        assert run_gc(store, keep=1).moved == []
    with store.using() as used:
        assert used.current("train", old.key) == old
        assert run_gc(store, keep=1).moved == []
    with store.using() as used:
        used.claim("train", old.key)
        assert run_gc(store, keep=1).moved[0].names != (), "whoever is at a step makes it anew, if it must"
    assert list((store.path / "in_use").iterdir()) == []


def test_an_encoder_is_in_use_while_it_is_loaded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    name(store, make(store, "old"))
    name(store, make(store, "new"))
    swept = []
    monkeypatch.setattr(encoders, "load", lambda *_: swept.append(run_gc(store, keep=1)))
    store.load("train@v1")
    assert swept[0].moved == []
    assert len(run_gc(store, keep=1).moved) == 2


def test_who_comes_while_gc_is_at_work_waits(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    record = make(store, "old")
    name(store, record)
    claim = [("train", record.digest)]
    looked = threading.Event()

    def use() -> None:
        with store.using() as used:
            used.resolve("train")
            looked.set()

    with uses.condemning(store.path, claim):
        thread = threading.Thread(target=use)
        thread.start()
        assert not looked.wait(0.2)
        with store.using() as used:
            used.claim("train", "another")
    thread.join()
    assert looked.is_set()

    monkeypatch.setattr(uses, "WAIT_SECONDS", 0.05)
    with uses.condemning(store.path, claim), store.using() as used, pytest.raises(Held, match="simclr gc"):
        used.resolve("train")


def test_a_gc_that_was_suspended_does_not_go_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with uses.condemning(store.path, [("train", "0" * 64)]) as mark:
        mark.stay_alive()
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + uses.CONDEMNED_SECONDS)
        with pytest.raises(Held, match="was suspended"):
            mark.stay_alive()


@pytest.mark.parametrize("age", [0.0, 2 * uses.CLAIM_SECONDS])
def test_what_another_machine_has_in_use_counts_for_a_time(store: Store, age: float) -> None:
    record = make(store, "old")
    folder = store.path / "in_use" / "elsewhere-1-2-3"
    folder.mkdir(parents=True)
    (folder / f"train.{record.digest}").touch()
    os.utime(folder, (time.time() - age,) * 2)
    assert bool(run_gc(store).moved) == (age > 0)
    assert folder.exists() == (age == 0)


@pytest.mark.parametrize("age", [0.0, 2 * uses.CONDEMNED_SECONDS])
def test_a_gc_on_another_machine_counts_for_a_time(store: Store, age: float, monkeypatch: pytest.MonkeyPatch) -> None:
    name(store, make(store, "old"))
    path = store.path / "condemned" / "elsewhere-1-2-3.json"
    path.parent.mkdir()
    path.write_bytes(canonical_json([["train", store.resolve("train").digest]]))
    os.utime(path, (time.time() - age,) * 2)
    monkeypatch.setattr(uses, "WAIT_SECONDS", 0.05)
    with store.using() as used:
        if age == 0:
            with pytest.raises(Held):
                used.resolve("train")
        else:
            assert used.resolve("train").label == "v1"


def test_a_time_to_come_counts_for_as_long_as_one_that_is_past(store: Store) -> None:
    record = make(store, "old")
    in_use, condemned = store.path / "in_use" / "elsewhere-1-2-3", store.path / "condemned" / "elsewhere-1-2-4.json"
    in_use.mkdir(parents=True)
    (in_use / f"train.{record.digest}").touch()
    condemned.parent.mkdir()
    condemned.write_bytes(canonical_json([["train", record.digest]]))
    for path in (in_use, condemned):
        os.utime(path, (time.time() + 10, time.time() + 10))
    assert uses.claims(store.path) == {"elsewhere-1-2": {("train", record.digest)}}, "clocks differ a little"
    assert uses.left_condemned(store.path) == {}
    for path in (in_use, condemned):
        os.utime(path, (time.time() + 3600, time.time() + 3600))
    assert uses.claims(store.path) == {"elsewhere-1-2": {("train", record.digest)}}, "rather too much than too little"
    assert uses.left_condemned(store.path) == {condemned: {("train", record.digest)}}
    os.utime(in_use, (time.time() + 31 * 86400, time.time() + 31 * 86400))
    assert uses.claims(store.path) == {}
    assert len(run_gc(store).moved) == 1


@pytest.mark.parametrize(
    "content", [b"x", b"[1]", b"{}", b'[["../..", "x"]]', b"[" * 100_000, b'"ab"', b"\xff", b"[[[], 1]]"]
)
def test_what_is_none_of_ours_is_passed_over(store: Store, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    """These folders may come from elsewhere, like the rest of a store."""
    record = make(store, "old")
    name(store, record)
    gone = make(store, "gone")
    condemned, in_use = store.path / "condemned", store.path / "in_use"
    for folder in (condemned / "folder.json", condemned / "elsewhere-1-2-4.json", in_use / "mine"):
        folder.mkdir(parents=True)
    for path in (condemned / "x.json", condemned / "elsewhere-1-2-3.json", in_use / ".DS_Store", in_use / "host-1-2-3"):
        path.write_bytes(content)
    elsewhere = in_use / "elsewhere-1-2-3"
    elsewhere.mkdir()
    for one in ("x", f"..{gone.digest}", f"train.{gone.digest}.x", "train.."):
        (elsewhere / one).touch()
    for command in (["ls"], ["show", "toy/train"], ["gc", "--apply"], ["gc", "--apply"]):
        arguments = [*command, "--store", str(store.path)]
        assert cli.guarded(lambda words=arguments: cli.app(words, standalone_mode=False)) == 0
    assert "train" in capsys.readouterr().out
    assert is_there(store, record)
    assert not store.build("train", gone.digest).exists()
    assert (in_use / "mine").is_dir()
    assert (condemned / "x.json").read_bytes() == content


def test_a_claim_that_cannot_be_written_is_an_error(store: Store) -> None:
    with store.using() as used, pytest.raises(OSError, match="too long"):
        used.claim("train", "a" * 300)


def test_where_nothing_may_be_written_nothing_is_kept_from_a_gc() -> None:
    used = uses.Uses(Path("/sys"))  # where nobody makes a folder
    used.claim("train", "0" * 64)
    used.end()
    assert not Path("/sys/in_use").exists()


def test_gc_tells_what_stays_for_whom(store: Store) -> None:
    """Of what would go: `source` has a name, and stays by that."""
    source, other = make(store, "source", stage="numbers"), make(store, "another source", stage="numbers")
    name(store, source)
    old = make(store, "old", source, other)
    for process, digest in (("far_away_1234abcd_42-77-88", old.digest), ("elsewhere-1-2", source.digest)):
        folder = store.path / "in_use" / f"{process}-abcd"
        folder.mkdir(parents=True)
        (folder / f"train.{digest}").touch()
    for apply in (False, True):
        found = run_gc(store, apply=apply)
        assert found.moved == []
        (item,) = found.kept
        assert (item.what, item.why) == ("2 artifacts", "in use by far_away process 77")
        files = [
            path
            for one in (old, other)
            for place in (store.build(one.stage, one.digest), store.run_file(one.stage, one.key, one.digest).parent)
            for path in place.rglob("*")
            if path.is_file()
        ]
        assert item.size_bytes == sum(path.stat().st_size for path in files)
    with store.using() as used:
        used.claim("train", old.key)
        assert len(run_gc(store).kept) == 2, "whoever makes it anew keeps what was made before"
    shutil.rmtree(store.path / "in_use")
    assert len(run_gc(store).moved) == 2
