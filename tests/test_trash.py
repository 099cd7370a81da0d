"""What went can be had back for a time, and is deleted then."""

import shutil
from pathlib import Path

import pytest
from stores import DAY, is_there, make, name, prepared, run_gc, whats

from pipeline import sweep, trash
from pipeline.errors import UsageError
from pipeline.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return prepared(tmp_path)


def test_the_trash_is_emptied_after_the_grace_and_can_be_had_back_before(store: Store) -> None:
    record = make(store, "old")
    name(store, record)
    name(store, make(store, "new"))
    run_gc(store, keep=1)
    (place,) = (store.path / "trash").iterdir()
    assert run_gc(store, grace=60).deleted == []
    shutil.copytree(place, store.path, dirs_exist_ok=True)
    assert store.resolve("train@v1").digest == record.digest
    assert store.current("train", record.key) == record
    assert is_there(store, record)

    size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    aged = place.rename(place.with_name("2020-01-01T00-00-00Z-0"))
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
    real = trash.reach
    once: list[str] = []

    def other_gc_at(point: str) -> None:
        if point == "gc.delete" and not once:
            once.append(point)
            assert len(run_gc(store, grace=0).deleted) == 1
        real(point)

    monkeypatch.setattr(trash, "reach", other_gc_at)
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


def test_what_a_name_needs_is_put_back(store: Store) -> None:
    """A file system that shows other machines too late what is in use may let it go."""
    source = make(store, "source", stage="numbers")
    record = make(store, "result", source)
    name(store, record)
    place = store.new_trash()
    for path in (store.build("train", record.digest), store.run_file("numbers", source.key, source.digest)):
        store.discard(path, place)
    run_gc(store, grace=0)
    assert is_there(store, record)
    assert is_there(store, source)


@pytest.mark.parametrize(("grace", "seconds"), [("0", 0), ("7d", 7 * DAY), ("12h", 43200), ("30m", 1800), ("10s", 10)])
def test_a_grace_has_a_unit(grace: str, seconds: float) -> None:
    assert trash.seconds_of(grace) == seconds


@pytest.mark.parametrize("grace", ["7", "d", "-1d", "1w", "", "1.5h", "00"])
def test_another_grace_is_refused(grace: str) -> None:
    with pytest.raises(UsageError, match="as in 7d, 12h"):
        trash.seconds_of(grace)


def test_a_link_in_the_trash_is_deleted_and_not_followed(store: Store, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine").touch()
    (store.path / "trash").mkdir()
    (store.path / "trash" / "2020-01-01T00-00-00Z-0").symlink_to(other)
    assert len(run_gc(store).deleted) == 1
    assert list((store.path / "trash").iterdir()) == []
    assert (other / "mine").exists()
