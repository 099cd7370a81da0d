"""Stores with artifacts that no stage made, and a gc in them."""

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline import sweep
from pipeline.manifest import FILES
from pipeline.records import Record, Version
from pipeline.store import Store
from pipeline.sweep import Rules, Sweep
from pipeline.trash import Item

DAY = 86400.0
LONG_AGO = time.time() - 30 * DAY
NAME_ITSELF = "from pipeline.processes import this_process; print(this_process())"
"""A program."""


def prepared(folder: Path) -> Store:
    store = Store(folder / "store")
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


def run_gc(
    store: Store, *, keep: int | None = None, grace: float = 7 * DAY, unfinished: bool = False, apply: bool = True
) -> Sweep:
    return sweep.sweep(store, Rules(keep, grace, unfinished), apply=apply)


def whats(items: Sequence[Item]) -> list[str]:
    return [item.what for item in items]


def is_there(store: Store, record: Record) -> bool:
    whole = store.verify(record.stage, record.digest) == []
    return whole and store.run_file(record.stage, record.key, record.digest).is_file()


def files_of(store: Store) -> dict[str, bytes]:
    return {str(path.relative_to(store.path)): path.read_bytes() for path in store.path.rglob("*") if path.is_file()}


def age(folder: Path, days: float) -> None:
    """Let a folder, and all in it, be as if nobody had touched it for so long."""
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (time.time() - days * DAY,) * 2)
