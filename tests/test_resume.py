"""A run that is killed goes on where it was, and ends with the bytes of a run that nobody interrupted."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RECIPE = """
name: killed
steps:
  shards: {stage: shard, source: "sklearn:digits"}
  views: {stage: augment, shards: shards, preset: text, image_size: 8, contact_sheet_images: 1}
  simclr:
    stage: pretrain
    shards: shards
    views: views
    architecture: {backbone: resnet10, width: 4}
    optimiser: {name: sgd, learning_rate: 0.1}
    projector: {layers: 2, hidden: 8, dimension: 8}
    epochs: 1
    batch_size: 64
    record_every_steps: 3
    health_every_epochs: 1
    log_every_seconds: 0
    checkpoint_every_steps: 4
"""
INTERVAL = 4
STEPS = 22


def start(folder: Path, store: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipeline.cli", "run", str(folder / "killed.yaml"), "--store", str(folder / store)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)


def stop_at(process: subprocess.Popen[str], step: int, number: signal.Signals) -> int:
    """Send a signal once the training says that it has done `step` steps; returns how far it said it had come."""
    assert process.stderr is not None
    reached, sent = 0, False
    with process.stderr:
        for line in process.stderr:
            found = re.search(r"simclr ([\d,]+)/\d+ steps", line)
            reached = int(found[1]) if found else reached
            if reached == step and not sent:
                process.send_signal(number)
                sent = True
    process.wait()
    return reached


def result(folder: Path, store: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "pipeline.cli", "show", "simclr", "--json", "--store", str(folder / store)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    (folder / "killed.yaml").write_text(RECIPE)
    process = start(folder, "whole")
    process.communicate()
    assert process.returncode == 0
    return folder


@pytest.mark.xdist_group("resume")
def test_killed_several_times_the_result_is_the_same(uninterrupted: Path) -> None:
    reached = []
    for step in (6, 11, 21):
        process = start(uninterrupted, "killed")
        reached.append(stop_at(process, step, signal.SIGKILL))
        assert process.returncode == -signal.SIGKILL
    process = start(uninterrupted, "killed")
    process.communicate()
    assert process.returncode == 0

    expected, found = result(uninterrupted, "whole"), result(uninterrupted, "killed")
    for name in ("encoder.safetensors", "projector.safetensors", "metrics.jsonl", "model.json"):
        assert (Path(found["files"]) / name).read_bytes() == (Path(expected["files"]) / name).read_bytes(), name
    assert found["digest"] == expected["digest"]

    assert [attempt["ended"] for attempt in found["attempts"]] == ["killed", "killed", "killed", "finished"]
    first_steps = [attempt["first_step"] for attempt in found["attempts"]]
    assert first_steps[0] == 0
    assert all(first > 0 for first in first_steps[1:]), "it resumed"
    done_again = [before - first for before, first in zip(reached, first_steps[1:], strict=True)]
    # A step more, because the training may have been past the line that it had printed.
    assert all(-1 <= steps <= INTERVAL for steps in done_again), f"{done_again} steps were done again"


@pytest.mark.xdist_group("resume")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_polite_signal_loses_no_step(uninterrupted: Path, number: signal.Signals, code: int) -> None:
    store = number.name
    process = start(uninterrupted, store)
    reached = stop_at(process, 9, number)
    assert process.returncode == code
    process = start(uninterrupted, store)
    process.communicate()
    found = result(uninterrupted, store)
    assert found["digest"] == result(uninterrupted, "whole")["digest"]
    assert found["attempts"][1]["first_step"] >= reached
