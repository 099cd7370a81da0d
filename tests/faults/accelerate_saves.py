"""Accelerate's `save_state` and `load_state` under the faults that our checkpoints are tried with.

A process of its own: it reads damaged pickles, and what its libraries warn of is no fault of ours.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from faults.damage import DAMAGES
from faults.disks import SmallDisk
from stages.models import build_encoder


def run(folder: Path, damages: int, disks: int, seed: int) -> dict[str, dict[str, int]]:
    """In a process of its own: by kind of fault how many were tried, and what loading the latest came to.

    Args:
        damages: trials of each kind of damage.
        disks: trials of a full disk.
    """
    words = [sys.executable, "-m", "faults.accelerate_saves", str(folder), *map(str, (damages, disks, seed))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    told = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert told.returncode == 0, told.stderr
    return json.loads(told.stdout.splitlines()[-1])


def _damage(folder: Path, trials: int, seed: int) -> dict[str, dict[str, int]]:
    """Harm a file of the newest checkpoint, and load the latest."""
    training = _Training(folder / "whole")
    training.step()
    training.save()
    training.step()
    training.save()
    expected = training.values()
    seen = {}
    for kind, harm in DAMAGES.items():
        draw = random.Random(f"{seed} {kind}")
        seen[kind] = {"tried": trials, "error": 0, "same": 0, "other": 0}
        for _ in range(trials):
            shutil.copytree(folder / "whole", folder / "damaged")
            harm(draw.choice(sorted((folder / "damaged" / "checkpoints" / "checkpoint_1").iterdir())), draw)
            seen[kind][_outcome(training, folder / "damaged", [expected])] += 1
            shutil.rmtree(folder / "damaged")
    return seen


def _disk(folder: Path, trials: int) -> dict[str, dict[str, int]]:
    """Let the disk end within the writing of a checkpoint, and load the latest once there is space again.

    All are kept: with a limit it deletes an old one first, and has its room.
    """
    seen = {"tried": 0, "error": 0, "same": 0, "other": 0}
    with SmallDisk(folder) as small:
        for number in range(trials):
            training = _Training(small.folder / "run")
            expected = []
            for _ in range(2):
                training.step()
                training.save()
                expected.append(training.values())
            size = sum(path.stat().st_size for path in training.folder.rglob("checkpoint_1/*"))
            training.step()
            with small.room(size * number // trials):
                try:
                    training.save()
                except Exception:
                    seen["tried"] += 1
                    small.give_back()
                    seen[_outcome(training, training.folder, expected)] += 1
            shutil.rmtree(training.folder)
    return {"disk full": seen}


class _Training:
    """A small encoder and its optimiser under an Accelerator."""

    def __init__(self, folder: Path):
        self.folder = folder
        project = ProjectConfiguration(str(folder), automatic_checkpoint_naming=True)
        self.accelerator = Accelerator(cpu=True, project_config=project)
        torch.manual_seed(0)
        encoder = build_encoder("resnet10", 8, 64, False, 16)
        optimiser = torch.optim.SGD(encoder.parameters(), lr=0.1, momentum=0.9)
        self.encoder, self.optimiser = self.accelerator.prepare(encoder, optimiser)

    def step(self) -> None:
        loss = self.encoder(torch.rand(2, 3, 16, 16)).square().mean()
        self.optimiser.zero_grad()
        self.accelerator.backward(loss)
        self.optimiser.step()

    def save(self) -> None:
        self.accelerator.save_state()

    def values(self) -> list[Any]:
        """All that a checkpoint holds."""
        state = self.optimiser.state_dict()
        momentum = [state["state"][key]["momentum_buffer"] for key in sorted(state["state"])]
        tensors = [*self.encoder.state_dict().values(), *momentum, torch.get_rng_state()]
        return [*(one.clone() for one in tensors), state["param_groups"], random.getstate()]

    def spoil(self) -> None:
        """Other values than any that were saved, so that what is not loaded shows."""
        self.step()
        torch.manual_seed(99)
        random.seed(99)


def _outcome(training: _Training, folder: Path, expected: list[list[Any]]) -> str:
    """What loading the latest below a folder comes to: `error`, or values of a checkpoint (`same`), or `other` ones."""
    training.spoil()
    training.accelerator.project_configuration.project_dir = str(folder)
    try:
        training.accelerator.load_state()
    except Exception:
        return "error"
    found = training.values()
    return "same" if any(_equal(found, one) for one in expected) else "other"


def _equal(one: list[Any], other: list[Any]) -> bool:
    return all(
        torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
        for left, right in zip(one, other, strict=True)
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    damages, disks, seed = map(int, sys.argv[2:])
    print(json.dumps(_damage(Path(sys.argv[1]), damages, seed) | _disk(Path(sys.argv[1]), disks)))
