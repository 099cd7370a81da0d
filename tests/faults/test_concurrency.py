"""Several processes at the same step at once, with leases and where those hold nobody back; and a process that was
stopped for so long that another took over.
"""

import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from faults.processes_seen import wait_until_stopped
from faults.small import Small, contents, run_of
from faults.tally import Tally
from faults.zygote import Trial, Zygote
from pipeline.manifest import check
from pipeline.store import Store

PROCESSES = 8
ENDS = {0, 75}
"""Done, or held by another."""
RACED = ("simclr", "shards", "features")
LEASE_SECONDS = 1.5
STOPS = (
    "attempt.begun:1", "checkpoint.folder:2", "checkpoint.tensors:2", "checkpoint.written:2", "seal.manifest:2",
    "commit.sync:2", "commit.rename:2", "commit.renamed:2", "checkpoint.committed:2", "checkpoint.prune:1",
    "checkpoint.pruned:1", "attempt.made:1", "publish.sealed:1", "publish.placed:1", "record.written:1",
    "record.current:1", "work.clear:1", "work.cleared:1",
)  # fmt: skip
"""Where in a step of training a process is stopped."""
PUBLISHING = ("publish.", "record.", "work.")
"""How the places begin at which a step's result is finished, and its holder has looked whether it still is that."""

pytestmark = pytest.mark.xdist_group("concurrency")


def race(zygote: Zygote, small: Small, step: str, store: Path, prelude: Sequence[str | int]) -> tuple[list[Trial], int]:
    """All at once; whatever a reader finds meanwhile is whole. Returns them, ended, and how often the reader looked."""
    trials = [zygote.start(run_of(step, store), small.folder, prelude=prelude) for _ in range(PROCESSES)]
    looks = 0
    while any([trial.is_running() for trial in trials]):  # noqa: C419 - each is to be looked at
        assert_whole(store)
        looks += 1
    assert_whole(store)
    for trial in trials:
        assert trial.wait() in ENDS, trial.said
    assert any(trial.code == 0 for trial in trials)
    return trials, looks


def assert_whole(store: Path) -> None:
    """Each build that can be seen is as its manifest says, and each name leads to one."""
    opened = Store(store)
    for place in store.glob("builds/*/*/*"):
        assert check(place) == [], place
    for latest in store.glob("names/small/*/latest"):
        version = json.loads(latest.read_bytes())
        assert opened.files(version["stage"], version["digest"]).is_dir(), latest


@pytest.mark.parametrize("prelude", [(), ("without_leases",)], ids=["with leases", "without"])
def test_one_build_comes_of_all(
    zygote: Zygote, small: Small, tally: Tally, is_whole: bool, prelude: tuple[str, ...]
) -> None:
    rounds, done, looks = 50 if is_whole else 1, 0, 0
    for number in range(rounds):
        step = RACED[number % len(RACED)]
        store = small.store_before(step, f"race-{len(prelude)}-{number}")
        trials, looked = race(zygote, small, step, store, prelude)
        assert contents(store) == small.after[step]
        assert not [path for path in store.glob("work/**/*") if path.is_file()]
        done += sum(trial.code == 0 for trial in trials)
        looks += looked
    ids = "leases made no-ops" if prelude else "with leases"
    note = f"{ids}: {PROCESSES} processes, {done / rounds:.1f} of them ended with the result, the others with 75; "
    tally.add("processes", tried=rounds, held=rounds, note=note + f"a reader looked {looks:,} times")


def test_the_first_of_results_with_other_bytes_stays_and_the_others_say_so(
    zygote: Zygote, small: Small, tally: Tally, is_whole: bool
) -> None:
    rounds, said = 20 if is_whole else 1, 0
    for number in range(rounds):
        store = small.store_before("features", f"own-{number}")
        trials, _ = race(zygote, small, "features", store, ("with_own_bytes",))
        current = json.loads(next(store.glob("runs/embed/*/current.json")).read_bytes())["digest"]
        names = [json.loads(path.read_bytes())["digest"] for path in store.glob("names/small/features/*")]
        assert set(names) == {current}
        assert len(names) == 2  # v1 and latest
        told = [trial for trial in trials if "made this step meanwhile, with other bytes" in trial.said]
        assert all(f"({current[:8]}, here " in trial.said for trial in told)
        assert len(told) == len([*store.glob("builds/embed/*/*")]) - 1
        said += len(told)
    assert said
    note = f"results with other bytes, leases made no-ops: the first stays, {said} losers said so"
    tally.add("processes", tried=rounds, held=rounds, note=note)


@pytest.mark.parametrize("point", STOPS)
def test_one_that_was_overtaken_stops_and_spoils_nothing(
    zygote: Zygote, small: Small, tally: Tally, is_whole: bool, point: str, tmp_path: Path
) -> None:
    if not is_whole and point not in STOPS[4::8]:
        return
    step = "simclr"
    store = small.store_before(step, f"overtaken-{point.replace(':', '-')}")
    log = tmp_path / "steps.txt"
    first = zygote.start(
        run_of(step, store), small.folder, failpoint=f"{point}:stop", prelude=("overtaken", LEASE_SECONDS, str(log))
    )
    wait_until_stopped(first)
    before = steps_of(log)
    second = zygote.start(run_of(step, store), small.folder, prelude=("on_another_machine", LEASE_SECONDS))
    lease = next(store.glob("work/pretrain/*/lease"))
    while f"pid={second.pid}\n" not in lease_text(lease) and second.is_running():
        time.sleep(0.01)
    first.send(signal.SIGCONT)
    ends = first.wait(), second.wait()
    assert second.code == 0, second.said
    # Once it has begun to publish what is finished and whole, it may end well.
    assert first.code in (ENDS if point.startswith(PUBLISHING) else {75}), first.said
    if first.code == 75:
        assert "has taken over this step" in first.said
    assert steps_of(log) - before <= 1
    assert contents(store) == small.after[step]
    assert not [path for path in store.glob("work/**/*") if path.is_file()], ends
    tally.add("overtaken", tried=1, held=1)


def steps_of(log: Path) -> int:
    """Steps of training that were taken."""
    return len(log.read_text().splitlines()) if log.exists() else 0


def lease_text(lease: Path) -> str:
    try:
        return lease.read_text()
    except FileNotFoundError:
        return ""
