"""A process that packs images is killed, or a thread that reads them fails: the cause is named, nothing is left."""

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from faults.places import DIGITS, Place
from faults.processes_seen import command_of, descendants, is_alive, shared_memory_of, wait_until
from faults.tally import Tally
from faults.zygote import Trial, Zygote
from stages.images import packing_processes
from stages.images.loader import BatchLoader
from stages.images.packing import Chunk
from stages.images.shards import Shards

SEED = 20_261
IMAGES, SIDE = 24, 400
"""Noise, which takes long to compress: there is time to kill somebody."""
RECIPE = """
name: packed
steps: {shards: {stage: shard, source: "folder:images", workers: 3, near_duplicates: false}}
"""


def many_processes(dies_with_lock: bool = False) -> None:
    """Called in the child: so few images are packed by several processes, and by the others alone."""
    patch = pytest.MonkeyPatch()
    patch.setattr(packing_processes, "PROCESSES_FROM", 0)
    patch.setattr(packing_processes._Work, "take_back", lambda _: False)
    if dies_with_lock:
        patch.setattr(packing_processes, "_pack_in_worker", die_with_the_lock)


def die_with_the_lock(part: Chunk, candidates: list[tuple[Any, ...]]) -> None:
    """In the place of packing: killed while the count of images is written."""
    assert packing_processes._shared is not None
    packing_processes._shared.progress.get_lock().acquire()
    os.kill(os.getpid(), signal.SIGKILL)


class Packing:
    """A folder of images, and stores that they are packed into."""

    def __init__(self, zygote: Zygote, folder: Path):
        self.zygote, self.folder = zygote, folder
        (folder / "packed.yaml").write_text(RECIPE)
        (folder / "images" / "noise").mkdir(parents=True)
        draws = np.random.default_rng(0)
        first = folder / "images" / "noise" / "00.png"
        Image.fromarray(draws.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(first, compress_level=0)
        for number in range(1, IMAGES):
            os.link(first, first.with_name(f"{number:02d}.png"))
        self.before = shared_memory_of(os.getuid())

    def start(self, store: str, **options: Any) -> Trial:
        temporary = self.folder / f"{store}-temporary"
        temporary.mkdir(exist_ok=True)
        return self.zygote.start(
            ["run", "packed.yaml", "--store", store], self.folder, environment={"TMPDIR": str(temporary)}, **options
        )

    def workers(self, trial: Trial) -> list[int]:
        return [pid for pid in descendants(trial.pid) if "spawn_main" in command_of(pid)]

    def parts(self, store: str) -> list[Path]:
        """What the workers write."""
        return [*(self.folder / store).glob("work/*/*/*/out/files/*.tar.*")]

    def packed(self, store: str) -> dict[str, bytes]:
        (files,) = (self.folder / store / "builds" / "shard").glob("*/*/files")
        return {path.name: path.read_bytes() for path in files.iterdir()}

    def assert_nothing_is_left(self, store: str, processes: list[int], where: str) -> None:
        wait_until(lambda: not any(is_alive(pid) for pid in processes), 10, f"{processes} live on; {where}")
        wait_until(lambda: shared_memory_of(os.getuid()) <= self.before, 10, f"shared memory is left; {where}")
        assert [*(self.folder / f"{store}-temporary").iterdir()] == [], where


@pytest.fixture(scope="module")
def packing(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Packing:
    return Packing(zygote, tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def whole(packing: Packing) -> dict[str, bytes]:
    """What is packed when nobody is killed."""
    trial = packing.start("whole")
    assert trial.wait() == 0, trial.said
    return packing.packed("whole")


@dataclass(frozen=True)
class Kill:
    """Who is killed, by `signal`; what the child is told of it before, and how the command ends."""

    who: str
    before: dict[str, Any]
    code: int


WORKER = Kill("a process that packs images", {}, 7)
COUNTING = Kill("a process that packs, and holds a lock", {"dies_with_lock": True}, 7)
COMMAND = Kill("the command itself, beside processes that pack", {}, -signal.SIGKILL)


def killed(packing: Packing, kill: Kill, store: str, draws: random.Random) -> tuple[Trial, list[int]]:
    """A command in which somebody was killed, after its end, and all the processes that it had."""
    trial = packing.start(store, prelude=("faults.test_worker_killed:many_processes", kill.before))
    is_counting = kill is COUNTING  # it kills itself
    wait_until(
        lambda: bool(packing.workers(trial) if is_counting else packing.parts(store)) or not trial.is_running(),
        60,
        str(trial.output),
    )
    time.sleep(0 if is_counting else draws.uniform(0, 0.2))
    processes = descendants(trial.pid)
    if kill is WORKER:
        os.kill(draws.choice(packing.workers(trial)), signal.SIGKILL)
    if kill is COMMAND:
        assert packing.workers(trial)
        trial.send(signal.SIGKILL)
    trial.wait(60)
    return trial, processes


def test_processes_that_pack_are_killed(
    packing: Packing, whole: dict[str, bytes], is_whole: bool, tally: Tally
) -> None:
    draws = random.Random(SEED)
    for kill, number in [(WORKER, 10), (COUNTING, 2), (COMMAND, 4)] if is_whole else [(WORKER, 1)]:
        for count in range(number):
            store = f"{kill.who.replace(' ', '-')}-{count}"
            trial, processes = killed(packing, kill, store, draws)
            where = f"seed {SEED}, trial {count} of {kill.who}:\n{trial.said}"
            assert trial.code == kill.code, where
            if kill is not COMMAND:
                (told,) = [line for line in trial.said.splitlines() if line.startswith("simclr: ")]
                assert told.startswith("simclr: shards: one of its processes was killed, as the system does"), where
                assert "lower shards.workers" in told, where
                assert not [*(packing.folder / store).glob("work/*/*/out.tmp-*")], where
            assert "Traceback" not in trial.said, where
            packing.assert_nothing_is_left(store, processes, where)
            again = packing.start(store)
            assert again.wait(60) == 0, again.said
            assert packing.packed(store) == whole, where
        tally.add("worker-killed", tried=number, held=number, note=kill.who)


TRAINING = f"""
name: read
steps:{DIGITS}
  simclr:
    stage: pretrain
    shards: shards
    views: views
    architecture: {{backbone: resnet10, width: 4}}
    projector: {{layers: 2, hidden: 8, dimension: 8}}
    epochs: 1
    max_steps: 6
    batch_size: 32
    workers: 2
    checkpoint_every_steps: 2
"""


def fail_to_read(step: int, where: str) -> None:
    """Called in the child: memory runs out while the batch of a step is read ahead, in either kind of thread."""
    owner, name = {"reader": (BatchLoader, "_read"), "decoder": (Shards, "batch")}[where]
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def failing(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > step:
            raise MemoryError("of a test")
        return original(*arguments, **named)

    setattr(owner, name, failing)


def test_a_thread_that_reads_fails(zygote: Zygote, is_whole: bool, tmp_path: Path, tally: Tally, digits: Path) -> None:
    place = Place(zygote, tmp_path, TRAINING, digits)
    kinds = ["reader", "decoder"] if is_whole else ["decoder"]
    assert zygote.run(place.command(place.new("whole")), tmp_path)[0] == 0
    for store in kinds:
        command = place.command(place.new(store))
        before = ("faults.test_worker_killed:fail_to_read", {"step": 3, "where": store})
        code, said = zygote.run(command, tmp_path, prelude=before)
        assert code == 7, said
        told = [line for line in said.splitlines() if line.startswith("simclr: ")]
        assert len(told) == 1
        assert told[0].startswith("simclr: simclr: memory is exhausted: lower simclr.")
        assert "Traceback" not in said
        assert zygote.run(command, tmp_path)[0] == 0
        assert place.files(store) == place.files("whole")
    tally.add("worker-killed", tried=len(kinds), held=len(kinds), note="a thread that reads images fails")
