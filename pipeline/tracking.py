"""Experiment trackers, by Accelerate: tensorboard, wandb, mlflow, trackio. None unless a recipe asks for one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs

from pipeline.errors import UsageError


def accelerator_with(trackers: Sequence[str], folder: Path, *, cpu: bool = False) -> Accelerator:
    """An Accelerator that logs to these trackers; files of theirs (TensorBoard) go below `folder`.

    Args:
        cpu: keep to the CPU, whatever else there is.

    Raises:
        UsageError: a tracker that is not installed.
    """
    available = {str(tracker) for tracker in get_available_trackers()}
    missing = [tracker for tracker in trackers if tracker not in available]
    if missing:
        installed = ", ".join(sorted(available)) or "none"
        raise UsageError(f"trackers: {missing[0]} is not installed here; installed: {installed}")
    # What it knows of devices and processes is one for the whole process; steps of a recipe differ in both.
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        cpu=cpu,
        mixed_precision="no",
        log_with=list(trackers) or None,
        project_dir=str(folder) if trackers else None,
        # Statistics of batch norm are of the global batch, so there is nothing to broadcast.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def start(accelerator: Accelerator, project: str, settings: dict[str, Any]) -> None:
    """Open the trackers; nested settings are flattened to dotted names."""
    accelerator.init_trackers(project, config=_flat(settings, ""))


def finish(accelerator: Accelerator) -> None:
    """Close the trackers. Accelerate's own `end_training` would end the process group too, which is not its."""
    for tracker in accelerator.trackers:
        tracker.finish()


def _flat(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
