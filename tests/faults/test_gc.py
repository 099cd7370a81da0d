"""Gc beside runs and readers, killed and stopped: whatever has a name is whole, and nobody fails to read."""

import json
import random
import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stores import age

from faults.processes_seen import wait_until_stopped
from faults.tally import Tally
from faults.zygote import Trial, Zygote
from pipeline import open_store
from pipeline.errors import UsageError
from pipeline.store import Store

RECIPE = """
name: small
steps:
  shards: {stage: shard, source: "folder:images"}
  views: {stage: augment, shards: shards, contact_sheet_images: 1, image_size: 8}
  simclr: {stage: pretrain, shards: shards, views: views, architecture: {backbone: resnet10, width: 4}, epochs: 5,
           projector: {hidden: 8, dimension: 4}, batch_size: 4, device: cpu, checkpoint_every_steps: 1}
"""
SEED = 20
SWEEP = ["gc", "--keep", "1", "--grace", "0", "--apply"]
POINTS = ["gc.begin", "gc.unnamed", "gc.move", "gc.moved", "gc.delete"]


def of_size(size: int) -> list[str]:
    """A run that makes views of a size, if they are not there."""
    return ["run", "small.yaml", "views", "--set", f"views.image_size={size}"]


@pytest.fixture(scope="module")
def world(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and a store with four versions of a step, and something in the trash."""
    folder = tmp_path_factory.mktemp("gc")
    numbers = np.random.default_rng(SEED)
    for place in range(8):
        path = folder / "images" / "ab"[place % 2] / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbers.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    (folder / "small.yaml").write_text(RECIPE)
    for command in (of_size(9), of_size(10), SWEEP, *map(of_size, (11, 12, 13))):
        code, said = zygote.run(command, folder)
        assert code == 0, said
    return folder


@pytest.fixture
def copied(world: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world, tmp_path / "world"))


def broken_names(store: Store) -> list[str]:
    """Names that point at nothing, or at what is not whole, with all that it was made from; none, we promise."""
    broken = []
    for path in store.path.glob("names/*/*/[!.]*"):
        version = store.read_if_there(path)
        assert version is not None
        try:
            records = store.ancestors(store.record(version.stage, version.key, version.digest))
            broken += [f"{path}: {problem}" for one in records for problem in store.verify(one.stage, one.digest)]
        except Exception as error:
            broken.append(f"{path}: {error}")
    return broken


def in_words(store: Store) -> list[str]:
    """All names, records and artifacts."""
    files = (path.relative_to(store.path) for path in store.path.rglob("*") if path.is_file())
    return sorted(str(path) for path in files if path.parts[0] in ("names", "runs", "builds", "whole"))


def read_while(trials: Sequence[Trial], store: Store, numbers: random.Random) -> int:
    """Read what has a name, by `latest` and by number, until the trials have ended; how often that was done."""
    reads = 0
    while any(trial.is_running() for trial in trials):
        with store.using() as used:
            known = [version.reference for version in used.versions("small", "views")]
            for reference in ("small/views", numbers.choice(known)):
                with suppress(UsageError):  # that version has lost its name: nothing else may be the matter
                    version = used.resolve(reference)
                    for one in used.ancestors(used.record(version.stage, version.key, version.digest)):
                        assert used.verify(one.stage, one.digest) == [], reference
                    reads += 1
        time.sleep(0.02)  # the trials have few processors to share
    return reads


def test_gc_beside_runs_and_readers(zygote: Zygote, copied: Path, is_whole: bool, tally: Tally) -> None:
    rounds = 200 if is_whole else 4
    store, numbers = open_store(copied / "artifacts"), random.Random(SEED)
    reads, held = 0, 0
    for number in range(rounds):
        label = f"small/views@v{max(version.number for version in store.versions('small', 'views'))}"
        commands = [
            of_size(20 + number),  # a new version
            of_size(numbers.choice([19, 18, 17]) + number),  # lately made: up to date, if it is there still
            numbers.choice([["show", label], ["verify"], ["ls"], ["log", label], ["status", "small.yaml"]]),
            SWEEP,
            SWEEP[: numbers.choice([2, 6])],  # two at once; or one that only says
        ]
        commands[-1] = commands[-1] if len(commands[-1]) > 2 else ["gc"]
        numbers.shuffle(commands)
        trials = []
        for command in commands:
            trials.append(zygote.start(command, copied))
            time.sleep(numbers.uniform(0, 0.1))
        reads += read_while(trials, store, numbers)
        for trial, command in zip(trials, commands, strict=True):
            code = trial.wait()
            stale = command[0] == "status" and code == 3
            lost_its_name = label in command and code == 2 and "no such version" in trial.said
            assert code == 0 or stale or lost_its_name, f"seed {SEED}, round {number}: {command}: {trial.said}"
        assert broken_names(store) == [], f"seed {SEED}, round {number}"
        held += 1
    tally.add("gc", tried=rounds, held=held, note=f"rounds beside runs and readers, {reads} reads meanwhile")
    assert reads > rounds
    assert list((store.path / "in_use").iterdir()) == []
    assert list((store.path / "condemned").iterdir()) == []
    assert zygote.run(SWEEP, copied)[0] == 0
    assert len(store.versions("small", "views")) <= 2, "the newest, and the one that `latest` points at"
    builds = {path.name for path in store.path.glob("builds/augment/*/*")}
    assert builds == {version.digest for version in store.versions("small", "views")}


@pytest.mark.parametrize("point", POINTS)
def test_gc_killed_anywhere_leaves_what_has_a_name_whole_and_finishes_the_next_time(
    zygote: Zygote, copied: Path, tmp_path: Path, is_whole: bool, tally: Tally, point: str
) -> None:
    template = Path(shutil.copytree(copied, tmp_path / "template"))
    assert zygote.run(SWEEP, copied)[0] == 0
    expected = in_words(open_store(copied / "artifacts"))
    tried = 0
    for ordinal in range(1, 100):
        shutil.rmtree(copied)
        shutil.copytree(template, copied)
        store = open_store(copied / "artifacts")
        code, said = zygote.run(SWEEP, copied, failpoint=f"{point}:{ordinal}")
        if code == 0:
            break
        assert code == -signal.SIGKILL, said
        tried += 1
        assert broken_names(store) == [], ordinal
        # What it took the name from is as young as what waits for one, and goes all the same.
        assert zygote.run(SWEEP, copied)[0] == 0
        assert in_words(store) == expected, ordinal
        assert list((store.path / "condemned").iterdir()) == []
        if not is_whole and ordinal == 2:
            break
    assert tried
    tally.add("gc", tried=tried, held=tried, note=f"killed at {point}")


@pytest.mark.parametrize("end", [signal.SIGCONT, signal.SIGKILL])
def test_a_run_waits_for_a_gc_that_was_stopped(zygote: Zygote, copied: Path, tally: Tally, end: signal.Signals) -> None:
    """It needs what gc has condemned: makes it again if it went, and goes on with it where gc was killed before."""
    sweep = zygote.start(SWEEP, copied, failpoint="gc.move:1:stop")
    store = open_store(copied / "artifacts")
    wait_until_stopped(sweep)
    assert any((store.path / "condemned").glob("*.json"))
    other = zygote.start(of_size(11), copied)
    assert zygote.run(["verify"], copied)[0] == 0, "others need not wait"
    time.sleep(1.0)
    assert other.is_running()
    sweep.send(end)
    assert other.wait() == 0, other.said
    assert sweep.wait() == (0 if end == signal.SIGCONT else -signal.SIGKILL)
    assert broken_names(store) == []
    tally.add("gc", tried=1, held=1, note="stopped, with a run that waits")


def attempts_of(zygote: Zygote, folder: Path) -> list[tuple[str, int]]:
    """How each attempt at the training ended, and the step that it began with."""
    told = json.loads(zygote.run(["show", "small/simclr", "--json"], folder)[1])
    return [(one["ended"], one["first_step"]) for one in told["attempts"]]


def test_a_run_that_was_killed_long_ago_goes_on_after_a_gc(zygote: Zygote, copied: Path, tally: Tally) -> None:
    store, command = copied / "artifacts", ["run", "small.yaml", "simclr"]
    code, said = zygote.run(command, copied, failpoint="checkpoint.committed:2")
    assert code == -signal.SIGKILL, said
    age(store, 40)
    code, said = zygote.run(SWEEP, copied)
    assert code == 0, said
    assert "kept: unfinished, with 2 checkpoints: --unfinished takes it" in said
    code, said = zygote.run(command, copied)
    assert code == 0, said
    assert attempts_of(zygote, copied) == [("killed", 0), ("finished", 2)]
    tally.add("gc", tried=1, held=1, note="killed 40 days ago: goes on after it")


def test_what_is_unfinished_begins_anew_once_it_was_given_up(zygote: Zygote, copied: Path) -> None:
    store, command = copied / "artifacts", ["run", "small.yaml", "simclr"]
    assert zygote.run(command, copied, failpoint="checkpoint.committed:2")[0] == -signal.SIGKILL
    age(store, 40)
    assert zygote.run([*SWEEP, "--unfinished"], copied)[0] == 0
    assert not [*store.glob("work/*/*")]
    code, said = zygote.run(command, copied)
    assert code == 0, said
    assert attempts_of(zygote, copied) == [("finished", 0)]
