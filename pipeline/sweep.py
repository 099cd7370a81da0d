"""What `simclr gc` takes away: what no name needs any more. See pipeline/uses.py for how it keeps clear of the rest.

Kept are the artifacts that have a name (a version, `latest`, an alias), those that a process has in use, and everything
that they were made from, with the records of all. The rest goes: names beyond the newest N of a step, where asked for;
artifacts and records that nothing names; the private folders of attempts that died; work folders. But what a run left
unfinished, or was killed over before it gave it a name, stays for `UNFINISHED_SECONDS` since it was last touched (for
the grace, if that is longer): the same command still goes on from there.

What goes is moved to trash/<time>-<token>/ by one rename each, and keeps its path below that, so that it can be had
back: `cp -a trash/<time>-<token>/. .`. What was there for longer than the grace is deleted.

A name goes first, then the record, then the artifact. Killed anywhere, all that has a name is whole, and the next gc
finds out from what the killed one had condemned that it need not wait for the rest.
"""

import os
import re
import shutil
import time
from calendar import timegm
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline import uses
from pipeline.errors import DamagedArtifact, UsageError
from pipeline.failpoints import reach
from pipeline.manifest import MANIFEST, sync
from pipeline.processes import may_be_alive
from pipeline.records import Version
from pipeline.store import TRASHED_AT, VERSION, Store
from pipeline.uses import Claim

UNFINISHED_SECONDS = 7 * 86400.0
PRIVATE_FOLDERS = ("out.tmp-", ".private-")
"""How the names of folders begin that an attempt, or who writes a checkpoint, keeps to itself; the process follows."""
DELETING = "deleting-"
"""How the name of a folder in trash/ begins that is being deleted."""
TRIES = 3
"""To look, where names come and go meanwhile."""
GRACE = re.compile(r"(\d+)([smhd])|0")
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

Artifact = tuple[str, str]
"""(stage, digest)."""
RunPlace = tuple[str, str, str]
"""(stage, key, digest)."""


@dataclass(frozen=True)
class Item:
    """Something that goes, or is deleted.

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


@dataclass(frozen=True)
class Sweep:
    """What goes, or has gone.

    Attributes:
        moved: to the trash.
        deleted: from the trash.
        trash_bytes: what is in the trash afterwards.
    """

    moved: list[Item]
    deleted: list[Item]
    trash_bytes: int


def seconds_of(grace: str) -> float:
    """Seconds of `7d`, `12h`, `30m`, `10s` or `0`.

    Raises:
        UsageError: it is none of these.
    """
    match = GRACE.fullmatch(grace)
    if match is None:
        raise UsageError(f"--grace {grace}: is a number with a unit, as in 7d, 12h, 30m or 10s, or 0")
    return float(match[1]) * UNITS[match[2]] if match[1] else 0.0


def sweep(store: Store, *, keep: int | None, grace_seconds: float, apply: bool) -> Sweep:
    """Find what goes, and let it go if `apply`.

    Args:
        keep: so many versions of each step keep their names, the newest ones; `latest` and what has an alias always do.
        grace_seconds: for which what went stays in the trash.

    Raises:
        DamagedArtifact: what a name needs cannot be known, since a record cannot be read; nothing is moved then.
    """
    if apply:
        _put_back(store)
    expired = _expired(store, grace_seconds)
    found = _look(store, keep, grace_seconds)
    if apply:
        _delete(store, expired)
        found = _take_away(store, found, keep, grace_seconds)
        _tidy(store)
    in_trash = _size(store.path / "trash")
    if not apply:
        in_trash += sum(item.size_bytes for item in found) - sum(item.size_bytes for item in expired)
    return Sweep(found, expired, in_trash)


# What goes


def _look(store: Store, keep: int | None, grace_seconds: float) -> list[Item]:
    for _ in range(TRIES - 1):
        with suppress(DamagedArtifact):  # or another gc took something away between two looks
            return _Look(store, keep, grace_seconds).items()
    return _Look(store, keep, grace_seconds).items()


class _Look:
    """One look at a store. What is claimed comes first and names come next: that order is what uses.py builds on."""

    def __init__(self, store: Store, keep: int | None, grace_seconds: float):
        self.store, self.keep = store, keep
        self.since = time.time() - max(UNFINISHED_SECONDS, grace_seconds)
        """What was touched since then may be gone on with."""
        self.claimed = uses.claims(store.path)
        self.dropped, self.named = self._names()
        self.runs: dict[Artifact, set[RunPlace]] = {artifact: set() for artifact in _builds(store)}
        """All records, by artifact; of some there is none."""
        for run in _runs(store):
            self.runs.setdefault(_artifact(run), set()).add(run)
        self._inputs: dict[RunPlace, set[RunPlace]] = {}

    def items(self) -> list[Item]:
        """What goes: names, artifacts with their records, records alone, and what is in work/."""
        kept_runs, kept = self._kept()
        names = [
            Item(
                version.reference,
                f"older than the newest {self.keep}" + ("; its files are needed still" if artifact in kept else ""),
                claims=frozenset({artifact}),
                names=(path,),
            )
            for path, version in self.dropped
            if (artifact := (version.stage, version.digest))
        ]
        return [*names, *self._artifacts_to_go(kept_runs, kept), *self._work_to_go()]

    def _names(self) -> tuple[list[tuple[Path, Version]], set[RunPlace]]:
        """Versions that lose their names, and the runs that have one still."""
        dropped: list[tuple[Path, Version]] = []
        named: set[RunPlace] = set()
        for folder in _below(self.store.path / "names", 2):
            paths = [path for path in _below(folder, 1) if not path.name.startswith(".")]
            versions = {path: version for path in paths if (version := self.store.read_if_there(path)) is not None}
            newest = sorted((one.number for path, one in versions.items() if _is_number(path)), reverse=True)
            stay = set(newest[: self.keep])
            stay |= {version.number for path, version in versions.items() if not _is_number(path)}
            for path, version in versions.items():
                if version.number in stay or (version.stage, version.digest) in self.claimed:
                    named.add(_place(version))
                else:
                    dropped.append((path, version))
        return sorted(dropped, key=lambda one: (one[1].recipe, one[1].step, one[1].number)), named

    def _kept(self) -> tuple[set[RunPlace], set[Artifact]]:
        all_runs = set().union(*self.runs.values())
        claimed = {run for run in all_runs if _artifact(run) in self.claimed or run[:2] in self.claimed}
        runs = self._with_ancestors(self.named | claimed, must_be_read=True)
        fallen = self._with_ancestors([_place(version) for _, version in self.dropped], must_be_read=False)
        condemned = set(map(_artifact, fallen)).union(*uses.left_condemned(self.store.path).values())
        kept = set(map(_artifact, runs)) | (self.claimed & self.runs.keys())
        for artifact in self.runs.keys() - kept - condemned:
            if self._touched(artifact):
                kept.add(artifact)
                runs |= self._with_ancestors(self.runs[artifact], must_be_read=False)
        kept |= set(map(_artifact, runs))
        return self._with_other_records(all_runs, runs, kept), kept

    def _with_ancestors(self, runs: Iterable[RunPlace], *, must_be_read: bool) -> set[RunPlace]:
        """These runs, and those of everything that they were made from."""
        found: set[RunPlace] = set()
        pending = [*runs]
        while pending:
            run = pending.pop()
            if run in found:
                continue
            found.add(run)
            try:
                pending += self._made_from(run)
            except DamagedArtifact as error:
                if must_be_read:
                    raise DamagedArtifact(
                        f"{error}; so it is not known what it was made from, and nothing was moved: `simclr run RECIPE "
                        f"STEP --force` makes it again, or delete the names that point there"
                    ) from error
        return found

    def _made_from(self, run: RunPlace) -> set[RunPlace]:
        if run not in self._inputs:
            self._inputs[run] = {(stage, key, digest) for stage, key, digest in self.store.record(*run).input_runs}
        return self._inputs[run]

    def _with_other_records(
        self, all_runs: set[RunPlace], kept_runs: set[RunPlace], kept: set[Artifact]
    ) -> set[RunPlace]:
        """Other settings gave the same bytes: their records stay as well, where all that these were made from does."""
        found = set(kept_runs)
        pending = {run for run in all_runs - found if _artifact(run) in kept}
        while True:
            more = {run for run in pending if self._inputs_are_in(run, found)}
            if not more:
                return found
            found |= more
            pending -= more

    def _inputs_are_in(self, run: RunPlace, found: set[RunPlace]) -> bool:
        try:
            return found.issuperset(self._made_from(run))
        except DamagedArtifact:
            return False

    def _touched(self, artifact: Artifact) -> bool:
        """Whether it was made so lately that the run which made it may have been killed before it gave it a name."""
        paths = [self.store.build(*artifact)]
        paths += [self.store.run_file(*run) for run in self.runs[artifact]]
        return any(_touched_at(path) > self.since for path in paths)

    def _artifacts_to_go(self, kept_runs: set[RunPlace], kept: set[Artifact]) -> Iterator[Item]:
        for (stage, digest), its_runs in sorted(self.runs.items()):
            runs = its_runs - kept_runs
            claims = frozenset({(stage, digest), *(run[:2] for run in runs)})
            if ((stage, digest) in kept and not runs) or claims & self.claimed:
                continue
            paths = [path for run in sorted(runs) for path in _files_of(self.store, run)]
            is_alone = (stage, digest) in kept
            if not is_alone:
                paths.append(self.store.build(stage, digest))
            what = f"a record of {stage} {digest[:8]}" if is_alone else f"{stage} {digest[:8]}"
            why = "what it was made from goes" if is_alone else "nothing that has a name needs it"
            yield Item(what, why, sum(map(_size, paths)), claims, paths=tuple(paths))

    def _work_to_go(self) -> Iterator[Item]:
        for folder in _below(self.store.path / "work", 2):
            claim = (folder.parent.name, folder.name)
            if claim in self.claimed:
                continue
            what, claims = f"work of {claim[0]} {claim[1][:8]}", frozenset({claim})
            touched_at = max(map(_touched_at, [folder, *_all_below(folder)]))
            if touched_at <= self.since:
                days = (time.time() - touched_at) / 86400
                checkpoints = sum(path.name.startswith("step-") for path in _below(folder / "checkpoints", 1))
                holds = f"unfinished, with {checkpoints} checkpoints" if checkpoints else "unfinished"
                yield Item(what, f"{holds}, untouched for {days:.0f} days", _size(folder), claims, paths=(folder,))
                continue
            for path in [*_below(folder, 1), *_below(folder / "checkpoints", 1)]:
                begins = next((prefix for prefix in PRIVATE_FOLDERS if path.name.startswith(prefix)), None)
                if begins is not None and not may_be_alive(path.name.removeprefix(begins)):
                    yield Item(what, "left by a process that died", _size(path), claims, paths=(path,))


def _place(version: Version) -> RunPlace:
    return (version.stage, version.key, version.digest)


def _artifact(run: RunPlace) -> Artifact:
    return (run[0], run[2])


def _files_of(store: Store, run: RunPlace) -> list[Path]:
    """A record with what lies beside it; the pointer that says that it is current comes first."""
    pointer = store.pointer(run[0], run[1])
    try:
        is_current = run[2].encode() in pointer.read_bytes()
    except FileNotFoundError:
        is_current = False
    files = [store.run_file(*run), store.timing(*run)]
    return [*([pointer] if is_current else []), *(path for path in files if path.is_file())]


def _is_number(path: Path) -> bool:
    return path.suffix == ".json" and VERSION.match(path.stem) is not None


def _runs(store: Store) -> Iterator[RunPlace]:
    """All records, by their paths."""
    for path in _below(store.path / "runs", 3):
        if path.suffix == ".json" and path.stem != "current" and not path.name.startswith("."):
            yield path.parent.parent.name, path.parent.name, path.stem


def _builds(store: Store) -> Iterator[Artifact]:
    for path in _below(store.path / "builds", 3):
        yield path.parent.parent.name, path.name


def _below(folder: Path, depth: int) -> list[Path]:
    """What lies so deep in a folder; what goes meanwhile is passed over, as by the next two."""
    level = [folder]
    for _ in range(depth):
        folders, level = level, []
        for one in folders:
            with suppress(FileNotFoundError, NotADirectoryError):
                level += sorted(one.iterdir())
    return level


def _all_below(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        yield from (Path(place) / name for name in folders + files)


def _touched_at(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:
        return 0.0


def _size(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    size_bytes = 0
    for one in [path, *_all_below(path)]:
        with suppress(FileNotFoundError):
            size_bytes += 0 if one.is_dir() else one.lstat().st_size
    return size_bytes


# Going


def _take_away(store: Store, found: list[Item], keep: int | None, grace_seconds: float) -> list[Item]:
    """Move what is still to go once it is condemned; what that was."""
    left = uses.left_condemned(store.path)
    condemned = frozenset(claim for item in found for claim in item.claims)
    trash = store.new_trash()
    reach("gc.begin")
    if not found and not left:
        return []
    with uses.condemning(store.path, sorted(condemned.union(*left.values()))) as mark:
        items = [item for item in _look(store, keep, grace_seconds) if item.claims <= condemned]
        names = [path for item in items for path in item.names]
        for path in names:
            mark.stay_alive()
            store.discard(path, trash)
            reach("gc.unnamed")
        for folder in {path.parent for path in names}:
            sync(folder)  # no name comes back after a power failure without what it names
        for item in items:
            for path in item.paths:
                mark.stay_alive()
                reach("gc.move")
                store.discard(path, trash)
                reach("gc.moved")
        for folder in {path.parent for item in items for path in item.paths}:
            if folder.is_relative_to(store.path / "runs"):
                with suppress(OSError):  # another record is there
                    folder.rmdir()
        for path in left:  # what a killed one condemned
            path.unlink(missing_ok=True)
    return items


def _put_back(store: Store) -> None:
    """Move what a name needs and what lies in the trash back to its place.

    Nothing that has a name is ever moved there, but where a file system shows another machine files too late.
    """
    trashes = [one for one in reversed(_below(store.path / "trash", 1)) if not one.name.startswith(DELETING)]
    pending = [_place(version) for version in store.all_versions()] if trashes else []
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


def _expired(store: Store, grace_seconds: float) -> list[Item]:
    """What was in the trash for so long that it is deleted."""
    items = []
    for folder in _below(store.path / "trash", 1):
        name = folder.name.removeprefix(DELETING)
        try:
            since = float(timegm(time.strptime(name.rpartition("-")[0], TRASHED_AT)))
        except ValueError:
            if not os.path.lexists(folder):  # another gc deleted it
                continue
            since = folder.lstat().st_ctime  # of a name of its own: when it was moved here
        if folder.name != name or time.time() - since >= grace_seconds:
            why = f"in the trash since {time.strftime('%Y-%m-%d %H:%M', time.localtime(since))}"
            items.append(Item(f"trash/{folder.name}", why, _size(folder), paths=(folder,)))
    return items


def _delete(store: Store, expired: list[Item]) -> None:
    for folder in (path for item in expired for path in item.paths):
        reach("gc.delete")
        gone = folder
        with suppress(FileNotFoundError):  # another gc is at it as well
            if not folder.name.startswith(DELETING):  # of which a part is missing from now on
                gone = folder.with_name(f"{DELETING}{folder.name}")
                folder.rename(gone)
            shutil.rmtree(gone) if gone.is_dir() else gone.unlink()


def _tidy(store: Store) -> None:
    """Delete what nobody can want: what dead processes kept to themselves, and what is known of artifacts that went."""
    uses.forget_dead(store.path)
    for path in _below(store.path / "whole", 2):
        if path.suffix == ".json" and not (store.build(path.parent.name, path.stem) / MANIFEST).is_file():
            path.unlink(missing_ok=True)
    for folder in ("names", "runs", "whole", "sources", "condemned"):
        for path in _all_below(store.path / folder):
            if path.suffix == ".tmp" and not may_be_alive(path.name.removesuffix(".tmp").rpartition(".")[2]):
                path.unlink(missing_ok=True)
