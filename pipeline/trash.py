"""The trash of a store: what `simclr gc` took away lies there for a time, and is deleted then."""

import os
import re
import shutil
import time
from calendar import timegm
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline import uses
from pipeline.errors import DamagedArtifact, UsageError
from pipeline.failpoints import reach
from pipeline.manifest import MANIFEST
from pipeline.processes import may_be_alive
from pipeline.store import TRASHED_AT, Store
from pipeline.uses import Claim

DELETING = "deleting-"
"""How the name of a folder in trash/ begins that is being deleted."""
GRACE = re.compile(r"(\d+)([smhd])|0")
"""How long things stay there, as of `seconds_of`."""
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Item:
    """Something that goes, is deleted, or stays though it might go.

    Attributes:
        claims: whoever has one of them in use keeps it.
        names: files below names/.
        paths: files and folders, in the order in which they go.
    """

    what: str
    why: str
    size_bytes: int = 0
    claims: frozenset[Claim] = frozenset()
    names: tuple[Path, ...] = ()
    paths: tuple[Path, ...] = ()


def seconds_of(grace: str) -> float:
    """Seconds of `7d`, `12h`, `30m`, `10s` or `0`.

    Raises:
        UsageError: it is none of these.
    """
    match = GRACE.fullmatch(grace)
    if match is None:
        raise UsageError(f"--grace {grace}: is a number with a unit, as in 7d, 12h, 30m or 10s, or 0")
    return float(match[1]) * UNITS[match[2]] if match[1] else 0.0


def put_back(store: Store) -> None:
    """Move what a name needs and what lies in the trash back to its place.

    Nothing that has a name is ever moved there, but where a file system shows another machine files too late.
    """
    trashes = [one for one in reversed(below(store.path / "trash", 1)) if not one.name.startswith(DELETING)]
    pending = [(one.stage, one.key, one.digest) for one in store.all_versions()] if trashes else []
    seen = set(pending)
    while pending:
        run = pending.pop()
        for path in (store.run_file(*run), store.build(run[0], run[2])):
            places = (trash / path.relative_to(store.path) for trash in trashes)
            place = None if path.exists() else next((one for one in places if one.exists()), None)
            if place is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                with suppress(OSError):  # it was made again meanwhile
                    place.rename(path)
        with suppress(DamagedArtifact):  # told by who needs it
            more = {(stage, key, digest) for stage, key, digest in store.record(*run).input_runs} - seen
            pending += more
            seen |= more


def expired(store: Store, grace_seconds: float) -> list[Item]:
    """What was in the trash for so long that it is deleted."""
    items = []
    for folder in below(store.path / "trash", 1):
        name = folder.name.removeprefix(DELETING)
        try:
            since = float(timegm(time.strptime(name.rpartition("-")[0], TRASHED_AT)))
        except ValueError:
            if not os.path.lexists(folder):  # another gc deleted it
                continue
            since = folder.lstat().st_ctime  # of a name of its own: when it was moved here
        if folder.name != name or time.time() - since >= grace_seconds:
            why = f"in the trash since {time.strftime('%Y-%m-%d %H:%M', time.localtime(since))}"
            items.append(Item(f"trash/{folder.name}", why, size_of(folder), paths=(folder,)))
    return items


def delete(items: Sequence[Item]) -> None:
    """Delete what expired. Nothing is written, so that it can be done on a full disk."""
    for folder in (path for item in items for path in item.paths):
        reach("gc.delete")
        gone = folder
        with suppress(FileNotFoundError):  # another gc is at it as well
            if not folder.name.startswith(DELETING):  # of which a part is missing from now on
                gone = folder.with_name(f"{DELETING}{folder.name}")
                folder.rename(gone)
            shutil.rmtree(gone) if gone.is_dir() and not gone.is_symlink() else gone.unlink()


def tidy(store: Store) -> None:
    """Delete what nobody can want: what dead processes kept to themselves, and what is known of artifacts that went."""
    uses.forget_dead(store.path)
    for path in below(store.path / "whole", 2):
        if path.suffix == ".json" and not (store.build(path.parent.name, path.stem) / MANIFEST).is_file():
            path.unlink(missing_ok=True)
    for folder in ("names", "runs", "whole", "sources", "condemned"):
        for path in all_below(store.path / folder):
            if path.suffix == ".tmp" and not may_be_alive(path.name.removesuffix(".tmp").rpartition(".")[2]):
                path.unlink(missing_ok=True)


# What lies in a folder; what goes meanwhile is passed over


def below(folder: Path, depth: int) -> list[Path]:
    """What lies so deep in a folder, each level in order."""
    level = [folder]
    for _ in range(depth):
        folders, level = level, []
        for one in folders:
            with suppress(FileNotFoundError, NotADirectoryError):
                level += sorted(one.iterdir())
    return level


def all_below(folder: Path) -> Iterator[Path]:
    """Files and folders, however deep."""
    for place, folders, files in os.walk(folder):
        yield from (Path(place) / name for name in folders + files)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    size_bytes = 0
    for one in [path, *all_below(path)]:
        with suppress(FileNotFoundError):
            size_bytes += 0 if one.is_dir() else one.lstat().st_size
    return size_bytes


def touched_at(path: Path) -> float:
    """When it was last written to, in seconds since 1970; 0 if it is gone."""
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:
        return 0.0
