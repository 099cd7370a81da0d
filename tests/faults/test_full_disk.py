"""The disk is full, at any byte of a checkpoint and any step of the write protocol: nothing that was there is lost.

Twice over: on a file system that is really full (ENOSPC, by the page), and where files may not grow (EFBIG, by the
byte).
"""

import json
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from stores import DAY, files_of, is_there, make, prepared, run_gc
from stores import name as give_name
from test_checkpoint import assert_equal

from faults.disks import PAGE, SmallDisk
from faults.places import DIGITS
from faults.processes_seen import wait_until_stopped
from faults.states import trained
from faults.tally import Tally
from faults.zygote import Zygote
from pipeline import checkpoint, failpoints, open_store, runner
from pipeline.errors import Interrupted, NoSpace
from pipeline.finite import FiniteGuard
from pipeline.progress import Reporter
from pipeline.ranks import Ranks
from pipeline.recipe import load_recipe
from pipeline.resources import is_full_disk
from pipeline.run import Input, Run
from pipeline.workplace import Workplace
from stages.pretrain import pretrain
from stages.settings import STAGES
from stages.settings.pretrain import Pretrain
from stages.views import Views

SEED = 6
LONG_AGO = 4
TENSORS = "state.safetensors"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with SmallDisk(tmp_path) as small:
        yield small


def temporary(folder: Path) -> list[Path]:
    """What is left of anything that was not finished."""
    return [
        path
        for path in folder.rglob("*")
        if path.name.startswith((checkpoint.PRIVATE, "out.tmp-")) or path.name.endswith(".tmp")
    ]


# A checkpoint


def assert_all_as_before(folder: Path, expected: Any, harm: str) -> None:
    assert temporary(folder) == [], harm
    found = checkpoint.load_latest(folder, folder / "quarantine", LONG_AGO)
    assert found is not None, harm
    assert (found.step, found.damaged) == (LONG_AGO, []), harm
    assert_equal(expected, found.state)


def test_a_save_that_finds_no_room_leaves_the_one_before(disk: SmallDisk, is_whole: bool, tally: Tally) -> None:
    folder, state, expected = disk.folder / "checkpoints", trained(8), trained(LONG_AGO)
    place = checkpoint.save(folder, LONG_AGO, expected)
    # A limit of files meets the largest only.
    files = [path for path in place.rglob("*") if path.is_file()] if disk.is_mounted else [place / "files" / TENSORS]
    pages = sum(-(-path.stat().st_size // PAGE) for path in files)
    draw = random.Random(SEED)
    # The last pages are of the values and the manifest.
    rooms = sorted({*range(pages - 9, pages), *draw.sample(range(pages - 9), 41)}) if is_whole else [0, 40, pages - 1]
    for room in rooms:
        with disk.room(room * PAGE), pytest.raises(Exception, match=r".") as failed:
            pytest.fail(f"room for {room} of {pages} pages: {checkpoint.save(folder, 8, state)}")
        assert is_full_disk(failed.value), failed.value
        assert_all_as_before(folder, expected, f"seed {SEED}: room for {room} of {pages} pages")
    checkpoint.save(folder, 8, state)
    found = checkpoint.load_latest(folder, folder / "quarantine")
    assert found is not None
    assert_equal(state, found.state)
    what = "pages of a full file system" if disk.is_mounted else "bytes of a file"
    tally.add("disk-full", tried=len(rooms), held=len(rooms), note=f"within a checkpoint, by {what}")


def test_a_save_whose_files_may_not_grow_leaves_the_one_before(tmp_path: Path, is_whole: bool, tally: Tally) -> None:
    folder, state, expected = tmp_path / "checkpoints", trained(8), trained(LONG_AGO)
    state["loop"]["metrics"] *= 60  # more than the tensors, so that the limit meets the values as well
    place = checkpoint.save(folder, LONG_AGO, expected)
    sizes = [(place / "files" / TENSORS).stat().st_size, len(state["loop"]["metrics"])]
    assert sizes[0] < sizes[1]
    draw = random.Random(SEED)
    limits = sorted(draw.sample(range(sizes[1]), 50)) if is_whole else [0, sizes[0] // 3, sizes[0] + 1001]
    with SmallDisk(tmp_path, may_mount=False) as limited:
        for limit in limits:
            with limited.room(limit), pytest.raises(Exception, match=r".") as failed:
                pytest.fail(f"files of {limit} bytes at most: {checkpoint.save(folder, 8, state)}")
            assert is_full_disk(failed.value), failed.value
            assert_all_as_before(folder, expected, f"seed {SEED}: files of {limit} bytes at most")
    tally.add("disk-full", tried=len(limits), held=len(limits), note="within a checkpoint, by bytes of a file")


# Training

STEPS, EVERY = 14, 2
SETTINGS = {
    "shards": "shards",
    "views": "views",
    "architecture": {"backbone": "resnet10", "width": 4},
    "optimiser": {"name": "sgd", "learning_rate": 0.1},
    "projector": {"layers": 2, "hidden": 8, "dimension": 8},
    "epochs": 1,
    "max_steps": STEPS,
    "batch_size": 16,
    "record_every_steps": 1,
    "log_every_seconds": 0.0,
    "checkpoint_every_steps": EVERY,
}


@pytest.fixture(scope="module")
def inputs(digits: Path) -> dict[str, Path]:
    """The files of shards and views, in a store."""
    store = open_store(digits)
    versions = {step: store.resolve(f"digits/{step}") for step in ("shards", "views")}
    return {step: store.files(version.stage, version.digest) for step, version in versions.items()}


def learn(folder: Path, inputs: dict[str, Path], at: dict[int, Callable[[Run], None]]) -> dict[str, bytes]:
    """Pretrain below a folder, from its last checkpoint on; returns the files by name.

    Args:
        at: what happens before a step, counted from 1 in this attempt.
    """
    work = Workplace(folder)
    work.begin(fresh=False)
    settings = Pretrain.model_validate_json(json.dumps(SETTINGS))
    run = Run(
        recipe="test", step="simclr", seed=0, settings=settings,
        inputs={name: [Input(name, "", "0" * 64, "0" * 64, files)] for name, files in inputs.items()}, ancestors=[],
        out=work.out / "files", work=work, trackers=folder, reporter=Reporter("simclr"),
    )  # fmt: skip
    visit: Callable[..., Any] = Views.__call__
    calls = 0

    def watched(self: Views, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        at.get(calls, lambda _: None)(run)
        return visit(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Views, "__call__", watched)
        try:
            pretrain(run, settings)
            return {path.name: path.read_bytes() for path in run.out.iterdir()}
        finally:
            work.leave()


@pytest.fixture(scope="module")
def learned(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What training comes to on a disk with room."""
    return learn(tmp_path_factory.mktemp("learned"), inputs, {})


def test_training_goes_on_without_room_and_saves_once_there_is_some(
    disk: SmallDisk,
    inputs: dict[str, Path],
    learned: dict[str, bytes],
    is_whole: bool,
    tally: Tally,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From the third step to the sixth there is none, two times of two: metrics, log and checkpoints find no room."""
    draw = random.Random(SEED)
    rooms = [0, 3 * PAGE, *(draw.randrange(50 * PAGE) for _ in range(8))] if is_whole else [0]
    for number, room in enumerate(rooms):
        folder = disk.folder / str(number)
        take, give = (lambda _, room=room: disk.take(room)), lambda _: disk.give_back()
        found = learn(folder, inputs, {4: take, 8: give, 9: take, 13: give})
        assert found == learned, f"room for {room} bytes"
        told = capsys.readouterr().err
        # After steps 4 and 6, and 10 and 12.
        assert len(re.findall(r"no checkpoint after step \d+, .* full: .* are free, .* needed", told)) == 4
        assert "training goes on, and tries again after 2 steps" in told
        assert temporary(folder) == []
        shutil.rmtree(folder)
    tally.add("disk-full", tried=len(rooms), held=len(rooms), note="training goes on, and saves once there is room")


def test_training_stops_where_there_is_no_room_for_long(
    disk: SmallDisk, inputs: dict[str, Path], learned: dict[str, bytes], tally: Tally
) -> None:
    with pytest.raises(NoSpace, match=r"after step 8, since the disk is full: .* are free, .* are needed .*3 times"):
        learn(disk.folder / "work", inputs, {3: lambda _: disk.take(0)})
    assert temporary(disk.folder) == []
    assert [path.name for path in (disk.folder / "work" / "checkpoints").iterdir()] == ["step-000000002"]
    disk.give_back()
    assert learn(disk.folder / "work", inputs, {}) == learned
    tally.add("disk-full", tried=1, held=1, note="training stops at the third time, with free and needed bytes")


def test_a_signal_where_there_is_no_room(
    disk: SmallDisk, inputs: dict[str, Path], learned: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be saved is said to be done again, and the end is that of a signal."""

    def stop(run: Run) -> None:
        disk.take(0)
        run.receive(15)

    with pytest.raises(Interrupted):
        learn(disk.folder / "work", inputs, {5: stop})
    assert "no checkpoint after step 5" in (told := capsys.readouterr().err)
    assert "the same command goes on from the one before" in told
    disk.give_back()
    assert learn(disk.folder / "work", inputs, {}) == learned
    assert "resumes after step 4" in capsys.readouterr().err


def test_a_batch_that_cannot_be_kept_is_passed_over_all_the_same(disk: SmallDisk) -> None:
    guard = FiniteGuard([torch.nn.BatchNorm1d(2)], disk.folder / "not-finite", Ranks())
    nothing = torch.tensor(torch.nan)
    with disk.room(0):
        assert not guard.accepts(3, nothing, nothing, {"images": torch.zeros(2, 3, 64, 64)})
    assert guard.passed_over == 1


# The command itself

RECIPE = f"""
name: full
steps:{DIGITS}
  simclr:
    stage: pretrain
    shards: shards
    views: views
    architecture: {{backbone: resnet10, width: 4}}
    optimiser: {{name: sgd, learning_rate: 0.1}}
    projector: {{layers: 2, hidden: 8, dimension: 8}}
    epochs: 1
    max_steps: 5
    batch_size: 16
    checkpoint_every_steps: 1
  features: {{stage: embed, shards: shards, encoder: simclr}}
"""
RUN = ["run", "full.yaml", "--store", "disk/store"]
PLACES = [
    *((name, step) for name in ("attempt.begun", "attempt.made") for step in ("shards", "simclr", "features")),
    *((name, step) for name in ("publish.sealed", "publish.placed", "record.written") for step in ("shards", "simclr")),
    ("shard.sample", "shards"),
    ("shard.packed", "shards"),
    ("seal.hash", "features"),
    ("seal.manifest", "shards"),
    ("commit.sync", "shards"),
    ("commit.rename", "simclr"),
    ("commit.done", "simclr"),
    ("record.current", "features"),
    ("version.created", "shards"),
    ("work.clear", "simclr"),
    ("checkpoint.folder", "simclr"),
    ("checkpoint.tensors", "simclr"),
    ("checkpoint.written", "simclr"),
    ("checkpoint.committed", "simclr"),
    ("checkpoint.pruned", "simclr"),
    ("file.write", "views"),
]
"""Where the disk is full from, and in which step."""


@pytest.fixture(scope="module")
def stages_done(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By step: a store in which all before it is done; and by `` the one in which all is."""
    folders = {}
    last = tmp_path_factory.mktemp("nothing")
    (last / "full.yaml").write_text(RECIPE)
    (last / "disk" / "store").mkdir(parents=True)
    for step in ("shards", "views", "simclr", "features"):
        folders[step] = last
        last = shutil.copytree(last, tmp_path_factory.mktemp(step) / "folder")
        code, said = zygote.run([*RUN, step], last)
        assert code == 0, said
    return folders | {"": last}


def digests(store: Path, *steps: str) -> dict[str, str]:
    """Of these steps (all, if none), each of which is whole."""
    opened = open_store(store)
    found = {}
    for step in steps or ("shards", "views", "simclr", "features"):
        version = opened.latest("full", step)
        assert version is not None
        assert opened.verify_version(version) == []
        found[step] = version.digest
    return found


def test_a_run_that_finds_no_room_anywhere_ends_with_7_and_goes_on_later(
    zygote: Zygote, stages_done: dict[str, Path], disk: SmallDisk, tmp_path: Path, is_whole: bool, tally: Tally
) -> None:
    expected = digests(stages_done[""] / "disk" / "store")
    places = PLACES if is_whole else [("publish.sealed", "shards"), ("checkpoint.folder", "simclr")]
    (tmp_path / "full.yaml").write_text(RECIPE)
    stopped = 0
    for name, step in places:
        assert name in failpoints.POINTS
        store = shutil.copytree(stages_done[step] / "disk" / "store", disk.folder / "store", copy_function=shutil.copy)
        trial = zygote.start([*RUN, step], tmp_path, failpoint=f"{name}:1:stop")
        wait_until_stopped(trial)
        disk.take(0, trial.pid)
        trial.send(signal.SIGCONT)
        code = trial.wait()
        stopped += code == 7
        assert code in (0, 7), f"{name} in {step}: {code}: {trial.said}"  # 0: what was left to write found room
        assert "Traceback" not in trial.said, f"{name} in {step}: {trial.said}"
        assert temporary(store) == [], f"{name} in {step}"
        disk.give_back()
        code, said = zygote.run([*RUN, step], tmp_path)
        assert code == 0, f"{name} in {step}: {said}"
        assert digests(store, step) == {step: expected[step]}, f"{name} in {step}"
        shutil.rmtree(store)
    assert stopped >= len(places) // (2 if disk.is_mounted else 4)
    tally.add("disk-full", tried=len(places), held=len(places), note=f"from some place of a run on, {stopped} exit 7")


def test_a_log_on_the_full_disk_ends_no_training(
    zygote: Zygote, stages_done: dict[str, Path], disk: SmallDisk, tmp_path: Path
) -> None:
    """A run that writes its words to the same disk goes on to the third checkpoint without room, and ends so."""
    (tmp_path / "full.yaml").write_text(RECIPE)
    store = shutil.copytree(stages_done["simclr"] / "disk" / "store", disk.folder / "store")
    log, often = disk.folder / "log.txt", ["--set", "simclr.log_every_seconds=0"]
    trial = zygote.start([*RUN, *often], tmp_path, failpoint="checkpoint.folder:2:stop", output=log)
    wait_until_stopped(trial)
    disk.take(0, trial.pid)
    trial.send(signal.SIGCONT)
    assert trial.wait() == 7, trial.said
    assert [path.name for path in store.glob("work/pretrain/*/checkpoints/*")] == ["step-000000001"]
    disk.give_back()
    assert zygote.run(RUN, tmp_path)[0] == 0
    assert digests(store) == digests(stages_done[""] / "disk" / "store")


def test_a_step_that_the_disk_is_too_small_for_is_not_begun(
    zygote: Zygote, stages_done: dict[str, Path], tmp_path: Path, tally: Tally
) -> None:
    """An encoder of some TiB, of which three checkpoints lie beside its weights."""
    folder = shutil.copytree(stages_done["simclr"], tmp_path / "folder")
    wide = ["--set", "simclr.architecture.width=20000", "--set", "simclr.architecture.backbone=resnet152"]
    code, said = zygote.run([*RUN, *wide], folder)
    assert code == 7, said
    assert re.search(r"simclr: about .* are free, .* TiB are needed .*: free some space .* nothing was begun", said)
    assert "`simclr gc`" in said
    assert not [*(folder / "disk" / "store" / "work").glob("*/*")]
    tally.add("disk-full", tried=1, held=1, note="too little before a step starts: nothing begun")


@pytest.mark.parametrize("may_mount", [True, False], ids=["full", "said to be full"])
def test_a_small_disk_is_refused_before_a_step_starts(
    zygote: Zygote, stages_done: dict[str, Path], tmp_path: Path, may_mount: bool
) -> None:
    """Where none can be mounted, the system's word of what is free is replaced."""
    (tmp_path / "full.yaml").write_text(RECIPE)
    with SmallDisk(tmp_path, may_mount=may_mount) as disk:
        store = disk.folder / "store"
        shutil.copytree(stages_done["shards"] / "disk" / "store", store, dirs_exist_ok=True)
        if disk.is_mounted:
            disk.take(4 * PAGE)
        code, said = zygote.run(RUN, tmp_path, prelude=() if disk.is_mounted else ("with_free_bytes", 3 * PAGE))
        assert code == 7, said
        assert re.search(r"shards: about \d+\.0 KiB are free, 4\.5 MiB are needed .*nothing was begun", said), said
        assert not [*store.glob("work/*/*")]
        disk.give_back()
        code, said = zygote.run([*RUN, "shards"], tmp_path)
        assert code == 0, said


def test_needs_are_sane(stages_done: dict[str, Path]) -> None:
    """For a small recipe: what was made fits in what was told before, and that is no more than a tenth of a GiB."""
    recipe = load_recipe(stages_done[""] / "full.yaml", STAGES)
    store = open_store(stages_done[""] / "disk" / "store")
    before = open_store(stages_done["shards"] / "disk" / "store")
    needs = runner.estimate(before, runner.plan(runner.Planner(before, recipe, print)))
    for step, need in needs.items():
        version = store.latest("full", step)
        assert version is not None
        made = store.record(version.stage, version.key, version.digest).size_bytes
        assert made <= need.disk_bytes <= 100 * 2**20, step


def test_training_needs_room_for_its_checkpoints(inputs: dict[str, Path], tmp_path: Path) -> None:
    """Three of them lie there for a moment, of which two stay."""
    seen = []

    def look(_: Run) -> None:
        seen.append(sum(path.stat().st_size for path in tmp_path.rglob("state.safetensors")))

    learn(tmp_path / "work", inputs, {STEPS: look})
    told = Pretrain.model_validate_json(json.dumps(SETTINGS)).estimate({}).disk_bytes
    assert 0.5 <= told / (1.5 * seen[0]) <= 2


# gc


def test_gc_empties_the_trash_of_a_full_disk_before_it_writes(disk: SmallDisk, tally: Tally) -> None:
    store = prepared(disk.folder)
    kept, other = make(store, "kept"), make(store, "other")
    give_name(store, kept)
    expired = store.path / "trash" / "2020-01-01T00-00-00Z-0"
    expired.mkdir(parents=True)
    (expired / "large").write_bytes(bytes(16 * PAGE))
    with disk.room(0), suppress(NoSpace) if not disk.is_mounted else nullcontext():
        run_gc(store)
    assert not expired.exists()
    assert is_there(store, kept)
    assert store.build("train", other.digest).exists() != disk.is_mounted, "there was room for the rest then"
    tally.add("disk-full", tried=1, held=1, note="gc: what expired goes first, with nothing written")


@pytest.mark.parametrize("grace", [0.0, 7 * DAY])
def test_gc_that_finds_no_room_says_what_may_be_deleted_by_hand(disk: SmallDisk, grace: float) -> None:
    store = prepared(disk.folder)
    give_name(store, make(store, "kept"))
    make(store, "other")
    before = files_of(store)
    with disk.room(0), pytest.raises(NoSpace, match=r"too full to move .*trash: what is there may be deleted by hand"):
        run_gc(store, grace=grace)
    assert files_of(store) == before
    assert len(run_gc(store, grace=grace).moved) == 1
