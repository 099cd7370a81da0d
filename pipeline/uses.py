"""How processes that use artifacts, and `simclr gc`, which takes away what nobody needs, keep clear of one another.

    in_use/<process>-<token>/<stage>.<digest or key>   an empty file for each artifact or step that a process is at
    condemned/<process>-<token>.json                   [stage, digest or key] of all that a gc is about to take away

A claim is a stage with a digest (an artifact, all records of it, what it was made from) or with a key (the work folder
of a step, and the records to come). No lock is trusted: each side writes first, and looks second.

    whoever uses something                           gc
    1. writes its claim                              1. writes what it condemns
    2. waits while a gc that is alive condemns it    2. looks what is claimed, and after that what has a name
    3. looks whether it is there, and only then      3. of what it condemned, takes away what has neither
       reads it, makes it or gives it a name         4. withdraws 1.
    4. withdraws its claim

Of the two writes one comes first. If it is the claim, gc sees it, and leaves alone the artifact and its names. If it is
gc's, the other waits at its second step until gc is through, and sees at its third what came of it. If the claim is
gone again by the time that gc looks, then all names given under it are there, since gc looks at names after claims. So
nothing is taken away while it is read, and nothing that is gone gets a name.

A process that was killed counts for nothing, whatever it left (see `may_be_alive`): a killed gc takes nothing away any
more, and what it condemned is told to the next one. What a process of another machine left cannot be known to be dead;
it counts for a time. What lies in these folders and is none of ours counts for nothing.
"""

import errno
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import DamagedArtifact, Held
from pipeline.manifest import canonical_json, replace_file
from pipeline.processes import is_of_this_machine, may_be_alive, process_of, this_process
from pipeline.records import claim_of, read_condemned

Claim = tuple[str, str]
"""(stage, digest or key)."""

WAIT_SECONDS = 60.0
"""For a gc, which is through within a second unless it was stopped."""
LOOK_SECONDS = 0.01
CONDEMNED_SECONDS = 600.0
"""Without a sign of life, for a gc on another machine."""
CLAIM_SECONDS = 30 * 86400.0
"""For what a process on another machine has in use."""
READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


class Uses:
    """What one process, or a part of it, has in use. Where the store may only be read, nothing is kept from a gc."""

    def __init__(self, store: Path):
        self._store = store
        self._folder = store / "in_use" / f"{this_process()}-{secrets.token_hex(4)}"
        self._claims: set[Claim] = set()

    def claim(self, stage: str, name: str) -> None:
        """Steps 1 and 2 of whoever uses something.

        Args:
            name: a digest or a key.

        Raises:
            Held: a gc condemns it and does not come to an end.
            OSError: it cannot be written, though the store is not only for reading: the disk is full.
        """
        if (stage, name) in self._claims or not self._store.is_dir():
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / f"{stage}.{name}").touch()
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise
            return
        self._claims.add((stage, name))
        end = time.monotonic() + WAIT_SECONDS
        while gc := _condemned_by(self._store, (stage, name)):
            if time.monotonic() > end:
                self._claims.discard((stage, name))
                raise Held(f"`simclr gc` is at {stage} {name[:8]} since {WAIT_SECONDS:g} seconds ({gc.stem}): end it")
            time.sleep(LOOK_SECONDS)

    def end(self) -> None:
        """Nothing is in use any more."""
        shutil.rmtree(self._folder, ignore_errors=True)


def claims(store: Path) -> dict[str, set[Claim]]:
    """All that processes which may be alive have in use, by the name of the process."""
    found: dict[str, set[Claim]] = {}
    for folder in (store / "in_use").glob("*"):
        process = process_of(folder.name)
        if process is not None and _counts(folder, CLAIM_SECONDS):
            with suppress(FileNotFoundError, NotADirectoryError):
                its_claims = {claim for path in folder.iterdir() if (claim := claim_of(path.name)) is not None}
                found.setdefault(process, set()).update(its_claims)
    return found


def forget_dead(store: Path) -> None:
    """Delete the claims of processes that are dead."""
    for folder in (store / "in_use").glob("*"):
        if process_of(folder.name) is not None and not _counts(folder, CLAIM_SECONDS):
            shutil.rmtree(folder, ignore_errors=True)


class Condemned:
    """What one gc condemns, for as long as `condemning` lasts."""

    def __init__(self, path: Path):
        self._path = path
        self._alive_at = time.time()

    def stay_alive(self) -> None:
        """Tell other machines that this gc is at work. To be called before each thing that is taken away.

        Raises:
            Held: it was silent for so long (the machine was suspended) that they do not wait for it any more.
        """
        if time.time() - self._alive_at > CONDEMNED_SECONDS / 2:
            raise Held("gc was suspended, and may not go on with what it knew before: give the same command again")
        self._path.touch()
        self._alive_at = time.time()


@contextmanager
def condemning(store: Path, condemned: Sequence[Claim]) -> Iterator[Condemned]:
    """Step 1 of gc, and in the end step 4."""
    path = store / "condemned" / f"{this_process()}-{secrets.token_hex(4)}.json"
    replace_file(path, canonical_json([*condemned]))
    try:
        yield Condemned(path)
    finally:
        path.unlink(missing_ok=True)


def left_condemned(store: Path) -> dict[Path, set[Claim]]:
    """What gcs that were killed had condemned, by the file that says so."""
    return {path: _read(path) for path in _condemned(store) if not _counts(path, CONDEMNED_SECONDS)}


def _condemned_by(store: Path, claim: Claim) -> Path | None:
    for path in _condemned(store):
        if _counts(path, CONDEMNED_SECONDS) and claim in _read(path):
            return path
    return None


def _condemned(store: Path) -> list[Path]:
    """What gcs wrote."""
    paths = (store / "condemned").glob("*.json")
    return [path for path in paths if process_of(path.name) is not None and path.is_file()]


def _read(path: Path) -> set[Claim]:
    try:
        return read_condemned(path)
    except (FileNotFoundError, DamagedArtifact):  # withdrawn; or a gc never wrote it, since it writes all at once
        return set()


def _counts(path: Path, seconds: float) -> bool:
    """Whether what a process wrote counts still: it may be alive, and was heard of within the time if that is all that
    can be known."""
    if not may_be_alive(path.name):
        return False
    if is_of_this_machine(path.name):
        return True
    try:
        return abs(time.time() - path.stat().st_mtime) < seconds  # the clocks of machines differ
    except FileNotFoundError:
        return False
