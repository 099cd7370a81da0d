"""`simclr run --processes N` and torchrun: a report, equal order and bytes, a rank that dies, a signal, a resume."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

RECIPE = """
name: shared
steps:
  shards: {stage: shard, source: "sklearn:digits"}
  views: {stage: augment, shards: shards, preset: text, image_size: 8, contact_sheet_images: 1}
  simclr:
    stage: pretrain
    shards: shards
    views: views
    architecture: {backbone: resnet10, width: 4}
    optimiser: {name: lars, learning_rate: 1.0}
    projector: {layers: 2, hidden: 8, dimension: 8}
    gradient_clip: 1.0
    epochs: 1
    batch_size: 64
    record_every_steps: 3
    log_every_seconds: 0
    checkpoint_every_steps: 4
  features: {stage: embed, shards: shards, encoder: simclr}
  probe:
    stage: probe
    features: features
    penalties: {count: 3}
    label_fractions: [0.1]
    subsets: [1]
    bootstrap_samples: 100
  report: {stage: report, of: [probe]}
"""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
OURS = [sys.executable, "-m", "pipeline.cli"]
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "-m",
    "pipeline.cli",
]

pytestmark = pytest.mark.xdist_group("several")


class Place:
    """A recipe and its stores."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "shared.yaml").write_text(RECIPE)

    def command(self, store: str, *options: str, program: list[str] = OURS) -> list[str]:
        return [*program, "run", str(self.folder / "shared.yaml"), *options, "--store", str(self.folder / store)]

    def run(self, store: str, *options: str, program: list[str] = OURS) -> subprocess.CompletedProcess[str]:
        command = self.command(store, *options, program=program)
        return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=300)

    def start(self, store: str, *options: str) -> subprocess.Popen[str]:
        command = self.command(store, *options)
        return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=ENVIRONMENT)

    def untrained(self, store: str) -> str:
        """A new store that has all but the training of the whole one."""
        shutil.copytree(self.folder / "whole", self.folder / store)
        for gone in ("runs/pretrain", "builds/pretrain", "names/shared/simclr"):
            shutil.rmtree(self.folder / store / gone)
        return store

    def show(self, store: str, step: str) -> dict[str, Any]:
        command = [*OURS, "show", step, "--json", "--store", str(self.folder / store)]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("several"))


@pytest.fixture(scope="module")
def whole(place: Place) -> subprocess.CompletedProcess[str]:
    """The whole recipe by two processes, from nothing."""
    return place.run("whole", "--processes", "2")


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """The processes that a launcher started, in order of rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return sorted(int(child) for child in children)


def act_at(process: subprocess.Popen[str], step: int, act: Any) -> list[str]:
    """Do something once the training has done `step` steps; what it said from then on, when it has ended."""
    assert process.stderr is not None
    after: list[str] | None = None
    said = []
    with process.stderr:
        for line in process.stderr:
            said.append(line)
            found = re.search(r"simclr ([\d,]+)/\d+ steps", line)
            if after is not None and found is None:
                after.append(line.rstrip())
            if after is None and found and int(found[1]) == step:
                act()
                after = []
    process.wait()
    assert after is not None, f"it never came to step {step}: {''.join(said)}"
    return after


def test_two_processes_bring_a_recipe_to_its_report(place: Place, whole: subprocess.CompletedProcess[str]) -> None:
    assert whole.returncode == 0, whole.stderr
    assert "Warning" not in whole.stderr
    assert whole.stdout.splitlines()[-1].endswith("report.html")
    assert whole.stderr.count("simclr run (first run)") == 1, "one rank speaks"
    for step, ranks in (("shards", 1), ("simclr", 2), ("features", 2), ("probe", 1)):
        assert [one["ranks"] for one in place.show("whole", step)["attempts"]] == [ranks], step
    again = place.run("whole")
    assert again.returncode == 0, "what two processes made is up to date for one"
    assert all(line.endswith("up to date") for line in again.stderr.splitlines())


def test_torchrun_gives_the_same_bytes(place: Place, whole: subprocess.CompletedProcess[str]) -> None:
    result = place.run("torchrun", "simclr", program=TORCHRUN)
    assert result.returncode == 0, result.stderr
    assert whole.returncode == 0
    for step in ("shards", "simclr"):
        assert place.show("torchrun", step)["digest"] == place.show("whole", step)["digest"]
    assert place.show("torchrun", "simclr")["attempts"][0]["ranks"] == 2


def test_killed_and_interrupted_it_goes_on_to_the_same_end(
    place: Place, whole: subprocess.CompletedProcess[str]
) -> None:
    assert whole.returncode == 0
    store = place.untrained("killed")
    process = place.start(store, "simclr", "--processes", "2")
    killed_at: list[float] = []

    def kill() -> None:
        os.kill(ranks_of(process)[1], signal.SIGKILL)
        killed_at.append(time.monotonic())

    said = act_at(process, 6, kill)
    assert process.returncode == 9
    assert time.monotonic() - killed_at[0] < 30
    assert said == [
        "simclr: rank 1 was ended by SIGKILL (the system does so when memory is exhausted); all ranks were ended, "
        "the same command resumes"
    ]
    process = place.start(store, "simclr", "--processes", "2")
    said = act_at(process, 13, lambda: process.send_signal(signal.SIGINT))
    assert process.returncode == 130
    assert said == [
        "signal 2: ends after this step, with a checkpoint",
        "simclr: interrupted; the same command resumes",
    ]
    shutil.copytree(place.folder / store, place.folder / "fewer")
    assert place.run(store, "simclr", "--processes", "2").returncode == 0
    found, wanted = place.show(store, "simclr"), place.show("whole", "simclr")
    assert found["digest"] == wanted["digest"]
    attempts = [(one["ended"], one["ranks"], one["first_step"]) for one in found["attempts"]]
    assert attempts[0] in (("killed", 2, 0), ("failed", 2, 0))
    assert attempts[1][:2] == ("interrupted", 2)
    assert attempts[2][:2] == ("finished", 2)
    assert 4 <= attempts[1][2] < 13 <= attempts[2][2]

    assert place.run("fewer", "simclr").returncode == 0, "one process goes on where two were"
    of_one = place.show("fewer", "simclr")
    assert [one["ranks"] for one in of_one["attempts"]] == [2, 2, 1]
    assert of_one["attempts"][2]["first_step"] == attempts[2][2]
    loss = pytest.approx(wanted["counts"]["loss"], rel=1e-3)
    assert of_one["counts"]["loss"] == loss, "the same batches, in the same order"
