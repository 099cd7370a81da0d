"""Named places where a test lets the process die, to show that nothing is lost by it.

Armed by $SIMCLR_FAILPOINT=NAME:ORDINAL: the ORDINAL-th time that the place is reached, the process kills itself with
SIGKILL, as when it runs out of memory: no handler runs, no buffer is flushed. NAME:ORDINAL:stop stops it with SIGSTOP
instead, as a suspended machine, and it goes on with SIGCONT. `*` for a NAME counts every place.

Unarmed, a place costs one comparison.
"""

import os
import signal
from dataclasses import dataclass

VARIABLE = "SIMCLR_FAILPOINT"

POINTS = {
    "attempt.begun": "the lease is held, what was left there before is cleared away, nothing is made",
    "attempt.made": "the stage has written its files",
    "checkpoint.folder": "the private folder of a checkpoint is there, and empty",
    "checkpoint.tensors": "its tensors are written",
    "checkpoint.written": "its other values are written as well, and no manifest",
    "checkpoint.committed": "it is in its place, and has not been read back",
    "checkpoint.prune": "an older one is about to be deleted",
    "checkpoint.pruned": "it is deleted",
    "commit.sync": "a folder has its manifest, and nothing of it need have reached the disk",
    "commit.rename": "all of it is on the disk, under its private name",
    "commit.renamed": "it is in its place, and that need not have reached the disk",
    "commit.done": "it is in its place on the disk",
    "file.write": "a file is about to be written under a private name",
    "file.written": "it is on the disk, under its private name",
    "file.placed": "it has its name",
    "gc.begin": "what can go is known, and nothing has been moved",
    "gc.unnamed": "names are deleted",
    "gc.move": "something is about to be moved to the trash",
    "gc.moved": "it is there",
    "gc.delete": "something in the trash is about to be deleted",
    "publish.sealed": "the files of a step have their manifest, and are in a private folder still",
    "publish.placed": "they are in their place, and no record tells of them",
    "record.written": "a record tells of an artifact, and its key does not point there",
    "record.current": "its key points there",
    "seal.hash": "the files of a folder are written, and about to be hashed",
    "seal.manifest": "its manifest is about to be written",
    "shard.sample": "an image is about to be packed",
    "shard.packed": "all images are packed, and there is no index",
    "shard.indexed": "there is an index, and no summary",
    "version.created": "a version names a run, and `latest` does not",
    "version.latest": "`latest` names it as well",
    "work.clear": "the step is finished, and what it worked with is about to be deleted",
    "work.cleared": "that is deleted",
}
"""What has happened where each is reached."""


@dataclass
class _Armed:
    name: str
    left: int
    signal: signal.Signals


_armed: _Armed | None = None


def arm(text: str) -> None:
    """Arm a place: NAME:ORDINAL or NAME:ORDINAL:stop; an empty text disarms.

    Raises:
        ValueError: there is no such place, or the text is none of these.
    """
    global _armed
    if not text:
        _armed = None
        return
    name, _, rest = text.partition(":")
    ordinal, *action = rest.split(":")
    if name != "*" and name not in POINTS:
        raise ValueError(f"{VARIABLE}={text}: no such place; there are {', '.join(POINTS)}")
    if action not in ([], ["stop"]) or not ordinal.isdecimal() or int(ordinal) < 1:
        raise ValueError(f"{VARIABLE}={text}: is NAME:ORDINAL, or NAME:ORDINAL:stop")
    _armed = _Armed(name, int(ordinal), signal.SIGSTOP if action else signal.SIGKILL)


def reach(name: str) -> None:
    """This is the place of that name."""
    if _armed is not None and _armed.name in (name, "*"):
        _armed.left -= 1
        if _armed.left == 0:
            os.kill(os.getpid(), _armed.signal)


arm(os.environ.get(VARIABLE, ""))
