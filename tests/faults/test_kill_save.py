"""SIGKILL while a checkpoint is written, read back or an older one pruned; and the same done to Accelerate's."""

import json
import random
import shutil
import signal
import statistics
import time
from pathlib import Path

import pytest

from faults.savers import SAVES, load_ours
from faults.tally import Tally
from faults.zygote import WAIT, Trial, Zygote

pytestmark = pytest.mark.xdist_group("kills")

SEED = 2
RANDOM_TIMES, RANDOM_TIMES_OF_PART, POINTS_OF_PART = 50, 1, 2
FIRST_KILLED = 2
"""By then there are two checkpoints, so that every save prunes."""

POINTS = (
    "checkpoint.folder", "checkpoint.tensors", "checkpoint.written", "seal.hash", "seal.manifest", "commit.sync",
    "commit.rename", "commit.renamed", "commit.done", "checkpoint.committed", "checkpoint.prune", "checkpoint.pruned",
)  # fmt: skip


def test_killed_at_a_failpoint_the_newest_checkpoint_loads(
    zygote: Zygote, tmp_path: Path, is_whole: bool, tally: Tally
) -> None:
    trials = [(name, ordinal) for name in POINTS for ordinal in (1, 2, 3, 5) if "prune" not in name or ordinal < 4]
    if not is_whole:
        trials = random.Random(SEED).sample(trials, POINTS_OF_PART)
    faults = []
    for name, ordinal in trials:
        folder = _fresh(tmp_path / "trial")
        code, said = zygote.run([], folder, failpoint=f"{name}:{ordinal}", prelude=("save_ours", str(folder)))
        assert code == -signal.SIGKILL, said
        faults += [f"{name}:{ordinal}: {fault}" for fault in _faults_of_ours(folder)]
    tally.add("kill-save", tried=len(trials), held=len(trials) - len(faults), note="at every failpoint")
    assert not faults, "\n".join(faults)


def test_killed_at_random_times_of_saving(zygote: Zygote, tmp_path: Path, is_whole: bool, tally: Tally) -> None:
    """The latest loads, and is one that was saved; Accelerate is only counted."""
    trials = RANDOM_TIMES if is_whole else RANDOM_TIMES_OF_PART
    faults = []
    seconds = _seconds_of_a_save(zygote, tmp_path / "trial", "save_ours")
    shares = random.Random(SEED)
    for _ in range(trials):
        share = shares.random()
        folder = _killed_while_saving(zygote, tmp_path / "trial", "save_ours", seconds * share, shares)
        faults += [f"at {share:.3f} of a save, seed {SEED}: {fault}" for fault in _faults_of_ours(folder)]
    tally.add("kill-save", tried=trials, held=trials - len(faults), note="at a random time")
    assert not faults, "\n".join(faults)

    seconds = _seconds_of_a_save(zygote, tmp_path / "trial", "save_with_accelerate")
    shares = random.Random(SEED)
    held = raised = mixed = older = 0
    for _ in range(trials):
        after = seconds * shares.random()
        folder = _killed_while_saving(zygote, tmp_path / "trial", "save_with_accelerate", after, shares)
        code, said = zygote.run([], folder, prelude=("load_with_accelerate", str(folder)))
        assert code == 0, said
        found = json.loads((folder / "loaded.json").read_bytes())
        latest = found.pop("latest")
        held += isinstance(latest, int)
        raised += isinstance(latest, str)
        mixed += latest is None
        older += any(isinstance(one, int) for one in found.values())
    note = (
        f"at a random time; of the others {raised} raise and {mixed} load parts of another state; "
        f"one that loads is there in {older} of {trials}"
    )
    tally.add("kill-save", subject="accelerate", tried=trials, held=held, note=note)


def _faults_of_ours(folder: Path) -> list[str]:
    """In words: what was saved, and does not come back."""
    lines = (folder / "saved.txt").read_text().split("\n")
    saved = max([int(line.split()[1]) for line in lines if line.startswith("saved")], default=0)
    loaded = load_ours(str(folder)) or 0
    if loaded in (saved, saved + 1):
        return []
    return [f"step {saved} was saved, and step {loaded} comes back"]


def _seconds_of_a_save(zygote: Zygote, folder: Path, prelude: str) -> float:
    """The median of the saves that prune, as seen from here."""
    trial = zygote.start([], _fresh(folder), prelude=(prelude, str(folder)))
    seen: list[float] = []
    while trial.is_running():
        if _saved(folder) > len(seen):
            seen.append(time.monotonic())
    assert trial.wait() == 0, trial.said
    return statistics.median(
        later - one for one, later in zip(seen[FIRST_KILLED:], seen[FIRST_KILLED + 1 :], strict=False)
    )


def _killed_while_saving(zygote: Zygote, folder: Path, prelude: str, after: float, shares: random.Random) -> Path:
    """Kill it so many seconds after one of its saves, while it is at the next."""
    begin = shares.randint(FIRST_KILLED, SAVES - 3)
    trial: Trial = zygote.start([], _fresh(folder), prelude=(prelude, str(folder)))
    while _saved(folder) < begin and trial.is_running():
        time.sleep(WAIT / 4)
    time.sleep(after)
    trial.send(signal.SIGKILL)
    assert trial.wait() == -signal.SIGKILL, trial.said
    return folder


def _saved(folder: Path) -> int:
    path = folder / "saved.txt"
    return path.read_text().count("saved") if path.exists() else 0


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
