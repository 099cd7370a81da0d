"""What `simclr gc` takes away: what no name needs any more. See pipeline/uses.py for how it keeps clear of the rest.

Kept are the artifacts that have a name (a version, `latest`, an alias), those that a process has in use, and everything
that they were made from, with the records of all. The rest goes: names beyond the newest N of a step, where asked for;
artifacts and records that nothing names; the private folders of attempts that died; work folders. But what a run left
unfinished, or was killed over before it gave it a name, stays for `UNFINISHED_SECONDS` since it was last touched (for
the grace, if that is longer): the same command still goes on from there. Where there are checkpoints it always does,
unless what is unfinished is asked for.

What goes is moved to trash/<time>-<token>/ by one rename each, and keeps its path below that, so that it can be had
back: `cp -a trash/<time>-<token>/. .`. What was there for longer than the grace is deleted (see pipeline/trash.py).

A name goes first, then the record, then the artifact. Killed anywhere, all that has a name is whole, and the next gc
finds out from what the killed one had condemned that it need not wait for the rest.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline import leftovers, trash, uses
from pipeline.errors import DamagedArtifact, NoSpace
from pipeline.failpoints import reach
from pipeline.manifest import sync
from pipeline.processes import process_in_words
from pipeline.records import Version
from pipeline.resources import is_full_disk
from pipeline.store import VERSION, Store
from pipeline.trash import Item, below, size_of, touched_at
from pipeline.uses import Claim

UNFINISHED_SECONDS = 7 * 86400.0
TRIES = 3
"""To look, where names come and go meanwhile."""
Artifact = tuple[str, str]
"""(stage, digest)."""
RunPlace = tuple[str, str, str]
"""(stage, key, digest)."""


@dataclass(frozen=True)
class Rules:
    """What may go.

    Attributes:
        keep: so many versions of each step keep their names, the newest ones; `latest` and what has an alias always do.
        grace_seconds: for which what went stays in the trash.
        unfinished: whether work with checkpoints goes as well, once it was not touched for long: the same command
            begins anew then.
    """

    keep: int | None = None
    grace_seconds: float = 7 * 86400.0
    unfinished: bool = False


@dataclass(frozen=True)
class Sweep:
    """What goes, or has gone.

    Attributes:
        moved: to the trash.
        deleted: from the trash, where it was before.
        kept: what would go, if it were not in use, or were asked for.
        freed_bytes: of what is deleted.
        trash_bytes: what is in the trash afterwards.
        trash: where it went; None if nothing did, or it is deleted already.
    """

    moved: list[Item]
    deleted: list[Item]
    kept: list[Item]
    freed_bytes: int
    trash_bytes: int
    trash: Path | None = None


def sweep(store: Store, rules: Rules, *, apply: bool) -> Sweep:
    """Find what goes, and let it go if `apply`.

    Raises:
        DamagedArtifact: what a name needs cannot be known, since a record cannot be read; nothing is moved then.
        NoSpace: the disk is so full that nothing can be moved; what expired is deleted.
    """
    if apply:
        trash.put_back(store)
    expired = trash.expired(store, rules.grace_seconds)
    found, kept = _look(store, rules), _look_for_kept(store, rules)
    freed_bytes = sum(item.size_bytes for item in expired)
    if not apply:
        more = sum(item.size_bytes for item in found)
        freed_bytes += more if rules.grace_seconds == 0 else 0
        return Sweep(found, expired, kept, freed_bytes, size_of(store.path / "trash") + more - freed_bytes)
    trash.delete(expired)  # before anything is written: the disk may be full
    place = store.new_trash()
    try:
        found = _take_away(store, rules, found, place)
    except OSError as error:
        if not is_full_disk(error):
            raise
        raise NoSpace(
            f"the disk is too full to move anything to {place.parent}: what is there may be deleted by hand, and then "
            "the same command goes on"
        ) from error
    if rules.grace_seconds == 0:
        more = trash.expired(store, 0)
        freed_bytes += sum(item.size_bytes for item in more)
        trash.delete(more)
    trash.tidy(store)
    return Sweep(found, expired, kept, freed_bytes, size_of(store.path / "trash"), place if place.is_dir() else None)


# What goes


def _look(store: Store, rules: Rules) -> list[Item]:
    """What goes."""
    return _patiently(lambda: _Look(store, rules, uses.claims(store.path)).items())


def _look_for_kept(store: Store, rules: Rules) -> list[Item]:
    """What would go, if it were not in use, or if it were asked for."""
    claims = uses.claims(store.path)
    kept = _patiently(lambda: [*_Look(store, rules, {}).kept_for(claims)]) if claims else []
    return [*kept, *_Look(store, rules, claims).work()[1]]


def _patiently(look: Callable[[], list[Item]]) -> list[Item]:
    for _ in range(TRIES - 1):
        with suppress(DamagedArtifact):  # or another gc took something away between two looks
            return look()
    return look()


class _Look:
    """One look at a store. What is claimed comes first and names come next: that order is what uses.py builds on."""

    def __init__(self, store: Store, rules: Rules, claims: Mapping[str, set[Claim]]):
        """Args:
        claims: by process, looked for a moment ago; what is in them stays.
        """
        self.store, self.rules = store, rules
        self.since = time.time() - max(UNFINISHED_SECONDS, rules.grace_seconds)
        """What was touched since then may be gone on with."""
        self.claimed: set[Claim] = set().union(*claims.values())
        self.dropped, self.named = self._names()
        self.runs: dict[Artifact, set[RunPlace]] = {artifact: set() for artifact in _builds(store)}
        """All records, by artifact; of some there is none."""
        for run in _runs(store):
            self.runs.setdefault(_artifact(run), set()).add(run)
        self._inputs: dict[RunPlace, set[RunPlace]] = {}

    def items(self) -> list[Item]:
        """What goes: names, artifacts with their records, records alone, and what is in work/."""
        kept_runs, kept = self._kept()
        keep = self.rules.keep
        names = [
            Item(
                version.reference,
                f"older than the newest {keep}" + ("; its files are needed still" if artifact in kept else ""),
                claims=frozenset({artifact}),
                names=(path,),
            )
            for path, version in self.dropped
            if (artifact := (version.stage, version.digest))
        ]
        return [*names, *self._artifacts_to_go(kept_runs, kept), *self.work()[0]]

    def work(self) -> tuple[list[Item], list[Item]]:
        """What is in work/ and goes, and what stays for its checkpoints alone."""
        return leftovers.sort_out(self.store, self.claimed, self.since, unfinished=self.rules.unfinished)

    def _names(self) -> tuple[list[tuple[Path, Version]], set[RunPlace]]:
        """Versions that lose their names, and the runs that have one still."""
        dropped: list[tuple[Path, Version]] = []
        named: set[RunPlace] = set()
        for folder in below(self.store.path / "names", 2):
            paths = [path for path in below(folder, 1) if not path.name.startswith(".")]
            versions = {path: version for path in paths if (version := self.store.read_if_there(path)) is not None}
            newest = sorted((one.number for path, one in versions.items() if _is_number(path)), reverse=True)
            stay = set(newest[: self.rules.keep])
            stay |= {version.number for path, version in versions.items() if not _is_number(path)}
            for path, version in versions.items():
                if version.number in stay or (version.stage, version.digest) in self.claimed:
                    named.add(_place(version))
                else:
                    dropped.append((path, version))
        return sorted(dropped, key=lambda one: (one[1].recipe, one[1].step, one[1].number)), named

    def kept_for(self, claims: Mapping[str, set[Claim]]) -> Iterator[Item]:
        """The artifacts that would go by this look, and that a process has in use, or what it has was made from."""
        _, kept = self._kept()
        for process, its_claims in sorted(claims.items()):
            used = self._with_ancestors(self._claimed_runs(its_claims), must_be_read=False)
            artifacts = (set(map(_artifact, used)) | its_claims) & self.runs.keys() - kept
            paths = [path for artifact in artifacts for path in self._paths_of(artifact, self.runs[artifact])]
            if artifacts:
                what = f"{len(artifacts)} artifact{'s' if len(artifacts) > 1 else ''}"
                yield Item(what, f"in use by {process_in_words(process)}", sum(map(size_of, paths)))

    def _kept(self) -> tuple[set[RunPlace], set[Artifact]]:
        """The records and the artifacts that stay, each for one of these reasons."""
        runs = self._with_ancestors(self.named | self._claimed_runs(self.claimed), must_be_read=True)
        kept = set(map(_artifact, runs)) | (self.claimed & self.runs.keys())
        lately = self._made_lately(kept)
        runs |= self._with_ancestors(set().union(*(self.runs[one] for one in lately)), must_be_read=False)
        kept |= lately | set(map(_artifact, runs))
        return self._with_other_records(runs, kept), kept

    def _claimed_runs(self, claims: set[Claim]) -> set[RunPlace]:
        """The records of what is claimed by its digest, and of steps that are by their keys."""
        all_runs = set().union(*self.runs.values())
        return {run for run in all_runs if _artifact(run) in claims or run[:2] in claims}

    def _made_lately(self, kept: set[Artifact]) -> set[Artifact]:
        """What a run may have been killed over before it gave it a name; what lost its name waits for none."""
        fallen = self._with_ancestors([_place(version) for _, version in self.dropped], must_be_read=False)
        condemned = set(map(_artifact, fallen)).union(*uses.left_condemned(self.store.path).values())
        return {artifact for artifact in self.runs.keys() - kept - condemned if self._touched(artifact)}

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

    def _with_other_records(self, kept_runs: set[RunPlace], kept: set[Artifact]) -> set[RunPlace]:
        """Other settings gave the same bytes: their records stay as well, where all that these were made from does."""
        all_runs = set().union(*self.runs.values())
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
        return any(touched_at(path) > self.since for path in paths)

    def _artifacts_to_go(self, kept_runs: set[RunPlace], kept: set[Artifact]) -> Iterator[Item]:
        for (stage, digest), its_runs in sorted(self.runs.items()):
            runs = its_runs - kept_runs
            claims = frozenset({(stage, digest), *(run[:2] for run in runs)})
            if ((stage, digest) in kept and not runs) or claims & self.claimed:
                continue
            is_alone = (stage, digest) in kept
            paths = self._paths_of((stage, digest), runs, is_alone=is_alone)
            what = f"a record of {stage} {digest[:8]}" if is_alone else f"{stage} {digest[:8]}"
            why = "what it was made from goes" if is_alone else "nothing that has a name needs it"
            yield Item(what, why, sum(map(size_of, paths)), claims, paths=tuple(paths))

    def _paths_of(self, artifact: Artifact, runs: set[RunPlace], *, is_alone: bool = False) -> list[Path]:
        """These records of an artifact, and then, unless they go alone, its files."""
        paths = [path for run in sorted(runs) for path in _files_of(self.store, run)]
        return paths if is_alone else [*paths, self.store.build(*artifact)]


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
    for path in below(store.path / "runs", 3):
        if path.suffix == ".json" and path.stem != "current" and not path.name.startswith("."):
            yield path.parent.parent.name, path.parent.name, path.stem


def _builds(store: Store) -> Iterator[Artifact]:
    for path in below(store.path / "builds", 3):
        yield path.parent.parent.name, path.name


# Going


def _take_away(store: Store, rules: Rules, found: list[Item], place: Path) -> list[Item]:
    """Move what is still to go once it is condemned to a place in the trash; what that was."""
    left = uses.left_condemned(store.path)
    condemned = frozenset(claim for item in found for claim in item.claims)
    reach("gc.begin")
    if not found and not left:
        return []
    with uses.condemning(store.path, sorted(condemned.union(*left.values()))) as mark:
        items = [item for item in _look(store, rules) if item.claims <= condemned]
        names = [path for item in items for path in item.names]
        for path in names:
            mark.stay_alive()
            store.discard(path, place)
            reach("gc.unnamed")
        for folder in {path.parent for path in names}:
            sync(folder)  # no name comes back after a power failure without what it names
        for item in items:
            for path in item.paths:
                mark.stay_alive()
                reach("gc.move")
                store.discard(path, place)
                reach("gc.moved")
        for folder in {path.parent for item in items for path in item.paths}:
            if folder.is_relative_to(store.path / "runs"):
                with suppress(OSError):  # another record is there
                    folder.rmdir()
        for path in left:  # what a killed one condemned
            path.unlink(missing_ok=True)
    return items
