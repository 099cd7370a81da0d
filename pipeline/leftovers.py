"""What lies in work/ and is not needed any more: see pipeline/workplace.py for what it is."""

import time
from collections.abc import Collection
from pathlib import Path

from pipeline.processes import may_be_alive
from pipeline.store import Store
from pipeline.trash import Item, all_below, below, size_of, touched_at
from pipeline.uses import Claim

PRIVATE_FOLDERS = ("out.tmp-", ".private-")
"""How the names of folders begin that an attempt, or who writes a checkpoint, keeps to itself; the process follows."""
CHECKPOINT = "step-"
"""How the name of the folder of a checkpoint begins."""


def sort_out(
    store: Store, claimed: Collection[Claim], since: float, *, unfinished: bool
) -> tuple[list[Item], list[Item]]:
    """What goes, and what stays for its checkpoints alone.

    Args:
        claimed: what is in use.
        since: seconds since 1970; what was touched later may be gone on with.
        unfinished: what was not touched since then goes even where it has checkpoints.
    """
    going: list[Item] = []
    kept: list[Item] = []
    for folder in below(store.path / "work", 2):
        claim = (folder.parent.name, folder.name)
        if claim in claimed:
            continue
        what, claims = f"work of {claim[0]} {claim[1][:8]}", frozenset({claim})
        # A folder is touched by a gc as well, which takes something out of it.
        last = max(map(touched_at, filter(Path.is_file, all_below(folder))), default=touched_at(folder))
        age = f"untouched for {(time.time() - last) / 86400:.0f} days"
        checkpoints, is_idle = _checkpoints(folder), last <= since
        holds = f"unfinished, with {checkpoints} checkpoint{'s' if checkpoints > 1 else ''}"
        if is_idle and (unfinished or not checkpoints):
            why = f"{holds if checkpoints else 'unfinished'}, {age}"
            going.append(Item(what, why, size_of(folder), claims, paths=(folder,)))
            continue
        if is_idle:
            kept.append(Item(what, f"{holds}: --unfinished takes it", size_of(folder)))
        for path in [*below(folder, 1), *below(folder / "checkpoints", 1)]:
            begins = next((prefix for prefix in PRIVATE_FOLDERS if path.name.startswith(prefix)), None)
            is_dead = begins is not None and not may_be_alive(path.name.removeprefix(begins))
            if begins is not None and (is_dead or is_idle):
                why = f"left by a process that {'died' if is_dead else 'may have died'}"
                going.append(Item(what, why, size_of(path), claims, paths=(path,)))
    return going, kept


def _checkpoints(folder: Path) -> int:
    """How many there are, with those that were found damaged: their run asks whether it may begin anew."""
    places = [*below(folder / "checkpoints", 1), *below(folder / "quarantine", 1)]
    return sum(path.name.startswith(CHECKPOINT) for path in places)
