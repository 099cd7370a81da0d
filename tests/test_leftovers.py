"""What of work/ goes, and what stays for the run that goes on from it."""

import subprocess
import sys
from pathlib import Path

import pytest
from stores import DAY, NAME_ITSELF, age, prepared, run_gc

from pipeline import checkpoint, leftovers, workplace
from pipeline.processes import this_process
from pipeline.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return prepared(tmp_path)


def test_work_stays_for_a_week(store: Store) -> None:
    idle, lately = store.work("train", "a" * 64), store.work("train", "b" * 64)
    for folder in (idle, lately):
        folder.mkdir(parents=True)
        (folder / "attempts.jsonl").write_text("{}")
    age(idle, 8)
    assert run_gc(store, grace=10 * DAY).moved == [], "a longer grace counts here too"
    (item,) = run_gc(store, grace=0).moved
    assert item.why == "unfinished, untouched for 8 days"
    assert (idle.exists(), lately.exists()) == (False, True)


@pytest.mark.parametrize("place", ["checkpoints", "quarantine"])
def test_work_with_checkpoints_stays_until_it_is_asked_for(store: Store, place: str) -> None:
    """Also with damaged ones alone: their run ends, rather than begin anew without a word."""
    idle, lately = store.work("train", "a" * 64), store.work("train", "b" * 64)
    for folder in (idle, lately):
        for step in (1, 2):
            checkpoint.save(folder / place, step, {"numbers": [step]})
    private = idle / f"{workplace.PRIVATE}elsewhere-1-2-3"
    private.mkdir()
    age(idle, 40)
    what = f"work of train {'a' * 8}"
    for apply in (False, True):
        found = run_gc(store, apply=apply)
        assert [(item.what, item.why) for item in found.moved] == [(what, "left by a process that may have died")]
        assert [(item.what, item.why) for item in found.kept] == [
            (what, "unfinished, with 2 checkpoints: --unfinished takes it")
        ]
        assert found.kept[0].size_bytes == sum(path.stat().st_size for path in idle.rglob("*") if path.is_file())
    assert not private.exists()
    assert len([*(idle / place).iterdir()]) == 2
    assert len(run_gc(store).kept) == 1, "to take something out of a folder is not to touch it"
    found = run_gc(store, unfinished=True)
    assert [item.why for item in found.moved] == ["unfinished, with 2 checkpoints, untouched for 40 days"]
    assert found.kept == []
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


def test_the_names_of_private_folders_are_those_of_who_makes_them() -> None:
    assert (workplace.PRIVATE, checkpoint.PRIVATE) == leftovers.PRIVATE_FOLDERS
