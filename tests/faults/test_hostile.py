"""What must not get in: each hostile input is refused within a second, by file and field, and nothing of it runs."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import webdataset

from faults import hostile_files as files
from faults.corpus import CORPUS, TARS, Hostile
from faults.tally import Tally
from faults.world import World, copy_world, make_finished, make_world
from faults.zygote import Zygote

LONGEST = 1.0
"""Seconds of the processor that a refusal may take, from the fork on: what commands import is there by then."""
LONGEST_WAIT = 20.0
"""Seconds by the clock: where it waits for something that does not come, the processor does not show it."""
REFUSALS = {2, 4, 5, 6}
"""Exit codes of what the user brought: usage, a damaged artifact, no usable checkpoint, bad data."""
PART = 6
"""`make test` tries every sixth."""
OF_PICKLES = [
    (files.torch_saved, ".pt"),
    (files.torch_saved, ".bin"),
    (files.torch_saved_before, ".pth"),
    (files.pickled, ".pkl"),
    (files.npy_of_objects, ".npy"),
    (files.npz_of_objects, ".npz"),
]

pytestmark = pytest.mark.xdist_group("hostile")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "hostile" in metafunc.fixturenames:
        chosen = CORPUS if metafunc.config.getoption("--all-faults") else CORPUS[::PART]
        metafunc.parametrize("hostile", chosen, ids=lambda one: one.name)


@dataclass
class Seen:
    """Inputs that were tried, and the seconds of those that were refused."""

    tried: int = 0
    seconds: list[float] = field(default_factory=list)


@pytest.fixture(scope="module")
def seen(tally: Tally) -> Iterator[Seen]:
    found = Seen()
    yield found
    slowest = f"0 executed, 0 bytes outside, the slowest {max(found.seconds, default=0):.2f} s"
    tally.add("hostile", tried=found.tried, held=len(found.seconds), note=slowest)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> World:
    return make_finished(tmp_path_factory.mktemp("finished") / "world", zygote)


def test_a_hostile_input_is_refused(
    hostile: Hostile, request: pytest.FixtureRequest, tmp_path: Path, zygote: Zygote, seen: Seen
) -> None:
    top = tmp_path / "world"
    world = copy_world(request.getfixturevalue("finished"), top) if hostile.needs_store else make_world(top)
    command = hostile.bring(world)
    before = world.outside()
    seen.tried += 1
    trial = zygote.start(command, world.here, environment=world.environment(), output=tmp_path / "said")
    code = trial.wait(LONGEST_WAIT)
    assert not world.canary.exists(), f"it ran: {trial.said}"
    assert world.outside() == before, trial.said
    assert code in REFUSALS, trial.said
    assert "Traceback" not in trial.said
    assert all(word in trial.said for word in hostile.told), f"{hostile.told}\n{trial.said}"
    seconds = trial.processor_seconds
    assert seconds is not None
    assert seconds <= LONGEST, f"{seconds} s"
    seen.seconds.append(seconds)
    shutil.rmtree(top)


@pytest.mark.whole
def test_the_same_files_given_to_others(tmp_path: Path, tally: Tally) -> None:
    """For the table: nothing is asserted of them but that they were tried, and that the payloads do run by old ways."""
    canaries, cases = [], []

    def add(reader: str, kind: str, suffix: str, make: Callable[[Path], bytes] | None) -> None:
        folder = tmp_path / str(len(cases))
        folder.mkdir()
        canary, path = folder / "canary", folder / f"evil{suffix}"
        canaries.append(canary)
        if make is not None:
            path.write_bytes(make(canary))
        cases.append((kind, {"reader": reader, "path": str(path) if make else f"pipe:touch '{canary}'"}))

    for make, _ in TARS.values():
        add("webdataset", "webdataset", ".tar", make)
    add("webdataset", "webdataset", ".tar", None)
    for reader in ("torch.load", "torch.load of before"):
        for make, suffix in OF_PICKLES:
            add(reader, reader, suffix, make)

    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "faults.peers"], input="".join(f"{json.dumps(case)}\n" for _, case in cases),
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    outcomes = done.stdout.split()
    assert len(outcomes) == len(cases)
    for reader in ("webdataset", "torch.load", "torch.load of before"):
        mine = [
            (outcome, canary.exists())
            for (kind, _), outcome, canary in zip(cases, outcomes, canaries, strict=True)
            if kind == reader
        ]
        executed = sum(ran for _, ran in mine)
        held = sum(outcome == "refused" and not ran for outcome, ran in mine)
        by_default = {"webdataset": webdataset.__version__, "torch.load": f"torch {torch.__version__}, by default"}
        how = by_default.get(reader, f"torch {torch.__version__}, weights_only=False")
        note = f"{how}: {executed} executed, {sum(outcome == 'hung' for outcome, _ in mine)} hung"
        tally.add("hostile", subject=reader.partition(" ")[0], tried=len(mine), held=held, note=note)
        assert mine
        assert executed or reader == "torch.load"
