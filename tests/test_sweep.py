"""What gc takes away, what it keeps, and that nothing goes while it is in use."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline import checkpoint, cli, encoders, sweep, uses, workplace
from pipeline.errors import DamagedArtifact, Held, UsageError
from pipeline.manifest import FILES, canonical_json
from pipeline.processes import may_be_alive, this_process
from pipeline.records import Record, Version
from pipeline.store import Store
from pipeline.sweep import Sweep

DAY = 86400.0
LONG_AGO = time.time() - 30 * DAY


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    store.prepare()
    return store


def make(store: Store, content: str, *inputs: Record, stage: str = "train", key: str | None = None) -> Record:
    """An artifact with a record and without a name, made long ago."""
    folder = store.path / "private"
    (folder / FILES).mkdir(parents=True, exist_ok=True)
    (folder / FILES / "result.txt").write_text(content)
    digest, size = store.publish(folder, stage)
    shutil.rmtree(folder, ignore_errors=True)
    runs = [[one.stage, one.key, one.digest] for one in inputs]
    record = Record(stage, 1, key or digest[::-1], digest, "toy", stage, 0, {}, {}, {}, {}, runs, size)
    store.write_record(record)
    for path in (store.build(stage, digest), store.run_file(stage, record.key, digest)):
        os.utime(path, (LONG_AGO, LONG_AGO))
    return record


def name(store: Store, record: Record) -> Version:
    return store.name("toy", record.stage, record)


def run_gc(store: Store, *, keep: int | None = None, grace: float = 7 * DAY, apply: bool = True) -> Sweep:
    return sweep.sweep(store, keep=keep, grace_seconds=grace, apply=apply)


def whats(items: Sequence[sweep.Item]) -> list[str]:
    return [item.what for item in items]


def is_there(store: Store, record: Record) -> bool:
    whole = store.verify(record.stage, record.digest) == []
    return whole and store.run_file(record.stage, record.key, record.digest).is_file()


def files_of(store: Store) -> dict[str, bytes]:
    return {str(path.relative_to(store.path)): path.read_bytes() for path in store.path.rglob("*") if path.is_file()}


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


def test_the_trash_is_emptied_after_the_grace_and_can_be_had_back_before(store: Store) -> None:
    record = make(store, "old")
    name(store, record)
    name(store, make(store, "new"))
    run_gc(store, keep=1)
    (trash,) = (store.path / "trash").iterdir()
    assert run_gc(store, grace=60).deleted == []
    shutil.copytree(trash, store.path, dirs_exist_ok=True)
    assert store.resolve("train@v1").digest == record.digest
    assert store.current("train", record.key) == record
    assert is_there(store, record)

    size = sum(path.stat().st_size for path in trash.rglob("*") if path.is_file())
    aged = trash.rename(trash.with_name("2020-01-01T00-00-00Z-0"))
    foreign = store.path / "trash" / "of mine"
    foreign.write_text("put here by hand a moment ago")
    found = run_gc(store)
    (item,) = found.deleted
    assert (item.what, item.size_bytes) == (f"trash/{aged.name}", size)
    assert found.trash_bytes == foreign.stat().st_size
    assert whats(run_gc(store, grace=0).deleted) == ["trash/of mine"]


def test_two_may_empty_the_trash_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    make(store, "old")
    run_gc(store)
    real = sweep.reach
    once: list[str] = []

    def other_gc_at(point: str) -> None:
        if point == "gc.delete" and not once:
            once.append(point)
            assert len(run_gc(store, grace=0).deleted) == 1
        real(point)

    monkeypatch.setattr(sweep, "reach", other_gc_at)
    assert len(run_gc(store, grace=0).deleted) == 1
    assert list((store.path / "trash").iterdir()) == []


def test_the_trash_may_be_emptied_while_something_goes_there(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    record = make(store, "old")
    real = sweep.reach

    def other_gc_at(point: str) -> None:
        if point == "gc.moved":
            shutil.rmtree(store.path / "trash")
        real(point)

    monkeypatch.setattr(sweep, "reach", other_gc_at)
    run_gc(store)
    assert not store.build("train", record.digest).exists()
    assert not store.run_file("train", record.key, record.digest).exists()


def test_work_stays_for_a_week(store: Store) -> None:
    idle, lately = store.work("train", "a" * 64), store.work("train", "b" * 64)
    for folder in (idle, lately):
        (folder / "checkpoints" / "step-000000001").mkdir(parents=True)
        (folder / "attempts.jsonl").write_text("{}")
    for path in (idle / "checkpoints" / "step-000000001", idle / "checkpoints", idle / "attempts.jsonl", idle):
        os.utime(path, (time.time() - 8 * DAY,) * 2)
    assert run_gc(store, grace=10 * DAY).moved == [], "a longer grace counts here too"
    (item,) = run_gc(store, grace=0).moved
    assert item.why == "unfinished, with 1 checkpoints, untouched for 8 days"
    assert (idle.exists(), lately.exists()) == (False, True)


def test_what_dead_processes_kept_to_themselves_goes(store: Store) -> None:
    child = subprocess.run([sys.executable, "-c", NAME_ITSELF], capture_output=True, text=True, check=True)
    dead, folder = child.stdout.strip(), store.work("train", "a" * 64)
    places = {}
    for process in (dead, this_process()):
        places[process] = [
            folder / f"{workplace.PRIVATE}{process}-0123",
            folder / "checkpoints" / f"{checkpoint.PRIVATE}{process}-4",
            store.path / "names" / f".latest.{process}.tmp",
            store.path / "in_use" / f"{process}-0123",
        ]
        for place in places[process]:
            place.mkdir(parents=True) if place.suffix != ".tmp" else place.parent.mkdir(exist_ok=True)
        places[process][2].touch()
    assert [item.why for item in run_gc(store, grace=0).moved] == ["left by a process that died"] * 2
    assert [place.exists() for place in places[dead]] == [False] * 4
    assert all(place.exists() for place in places[this_process()])


NAME_ITSELF = "from pipeline.processes import this_process; print(this_process())"


def test_a_process_that_has_ended_and_was_not_waited_for_is_dead() -> None:
    with subprocess.Popen([sys.executable, "-c", NAME_ITSELF], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        name_of_child = child.stdout.read().strip()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not may_be_alive(name_of_child)
    assert not may_be_alive(name_of_child)
    assert may_be_alive(this_process())


def test_the_names_of_private_folders_are_those_of_who_makes_them() -> None:
    assert (workplace.PRIVATE, checkpoint.PRIVATE) == sweep.PRIVATE_FOLDERS


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


def test_what_a_name_needs_is_put_back(store: Store) -> None:
    """A file system that shows other machines too late what is in use may let it go."""
    source = make(store, "source", stage="numbers")
    record = make(store, "result", source)
    name(store, record)
    trash = store.new_trash()
    for path in (store.build("train", record.digest), store.run_file("numbers", source.key, source.digest)):
        store.discard(path, trash)
    run_gc(store, grace=0)
    assert is_there(store, record)
    assert is_there(store, source)


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


@pytest.mark.parametrize(("grace", "seconds"), [("0", 0), ("7d", 7 * DAY), ("12h", 43200), ("30m", 1800), ("10s", 10)])
def test_a_grace_has_a_unit(grace: str, seconds: float) -> None:
    assert sweep.seconds_of(grace) == seconds


@pytest.mark.parametrize("grace", ["7", "d", "-1d", "1w", "", "1.5h", "00"])
def test_another_grace_is_refused(grace: str) -> None:
    with pytest.raises(UsageError, match="as in 7d, 12h"):
        sweep.seconds_of(grace)


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
    assert "went to the trash" in simclr("--apply")
    freed = json.loads(simclr("--apply", "--grace", "0", "--json"))
    assert (freed["freed_bytes"], freed["trash_bytes"], freed["moved"]) == (freed["deleted"][0]["size_bytes"], 0, [])
    assert simclr().startswith("0 B would go to the trash")
    assert cli.guarded(lambda: cli.app([*arguments, "--grace", "x"], standalone_mode=False)) == 2
