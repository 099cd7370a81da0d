"""A state of a few megabytes that is saved again and again, by us and by Accelerate, in a process that a test kills."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch import Tensor, nn

from pipeline import checkpoint

SAVES = 10
WIDTH, LAYERS = 384, 4


def make_parts() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A module, and an optimiser that has made a step: 7 MB together."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, WIDTH)).sum().backward()
    optimiser.step()
    return model, optimiser


@torch.no_grad()
def set_parts(model: nn.Module, optimiser: torch.optim.Optimizer, step: int) -> None:
    """Let all numbers be those of a step: each of them is the step's own."""
    for parameter in model.parameters():
        parameter.fill_(step)
        for value in optimiser.state[parameter].values():
            value.fill_(step)
    torch.manual_seed(abs(step))


def step_of(model: nn.Module, optimiser: torch.optim.Optimizer, random: Tensor) -> int | None:
    """The step that all numbers are of, or None if they are of several, or of none."""
    numbers = [
        *model.parameters(),
        *(one for state in optimiser.state_dict()["state"].values() for one in state.values()),
    ]
    step = int(numbers[0].flatten()[0])
    own = torch.random.get_rng_state()
    torch.manual_seed(abs(step))
    expected = torch.random.get_rng_state()
    torch.random.set_rng_state(own)
    is_whole = all(bool((one == step).all()) for one in numbers) and torch.equal(random, expected)
    return step if is_whole else None


def save_ours(folder: str) -> None:
    """Save one step after another; a line in saved.txt for each that was saved."""
    model, optimiser = make_parts()
    for step in range(1, SAVES + 1):
        set_parts(model, optimiser, step)
        _tell(folder, f"begins {step}")
        state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "random": torch.get_rng_state()}
        checkpoint.save(Path(folder) / "checkpoints", step, state)
        _tell(folder, f"saved {step}")
    sys.exit(0)


def load_ours(folder: str) -> int | None:
    """The step whose state the newest usable checkpoint holds; None without one."""
    found = checkpoint.load_latest(Path(folder) / "checkpoints", Path(folder) / "quarantine")
    if found is None:
        return None
    model, optimiser = make_parts()
    model.load_state_dict(found.state["model"])
    optimiser.load_state_dict(found.state["optimiser"])
    step = step_of(model, optimiser, found.state["random"])
    return step if step == found.step else None


def save_with_accelerate(folder: str) -> None:
    """The same by `save_state`, which names and prunes as it is told to."""
    accelerator, model, optimiser = _accelerated(folder)
    for step in range(1, SAVES + 1):
        set_parts(model, optimiser.optimizer, step)
        _tell(folder, f"begins {step}")
        accelerator.save_state()
        _tell(folder, f"saved {step}")
    sys.exit(0)


def load_with_accelerate(folder: str) -> None:
    """Load what `load_state` takes for the latest, and what lies beside it.

    loaded.json says which step `latest` was and, by name, which step each folder holds: None for a mixture, or words
    for an error.
    """
    found = {"latest": _load_with_accelerate(folder, None)}
    for one in sorted((Path(folder) / "checkpoints").iterdir()):
        found[one.name] = _load_with_accelerate(folder, str(one))
    (Path(folder) / "loaded.json").write_text(json.dumps(found))
    sys.exit(0)


def _load_with_accelerate(folder: str, place: str | None) -> int | str | None:
    accelerator, model, optimiser = _accelerated(folder)
    set_parts(model, optimiser.optimizer, -1)
    try:
        accelerator.load_state(place)
    except Exception as error:  # whatever it may be: it is counted
        return f"{type(error).__name__}: {error}"
    return step_of(model, optimiser.optimizer, torch.random.get_rng_state())


def _accelerated(folder: str) -> tuple[Accelerator, nn.Module, Any]:
    configuration = ProjectConfiguration(
        project_dir=folder, automatic_checkpoint_naming=True, total_limit=checkpoint.KEPT
    )
    accelerator = Accelerator(cpu=True, project_config=configuration)
    model, optimiser = accelerator.prepare(*make_parts())
    return accelerator, model, optimiser


def _tell(folder: str, line: str) -> None:
    descriptor = os.open(Path(folder) / "saved.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)
