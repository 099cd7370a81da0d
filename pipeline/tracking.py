"""Experiment trackers, by Accelerate: tensorboard, wandb, mlflow, trackio. None unless a recipe asks for one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from pipeline.errors import UsageError


def accelerator_with(trackers: Sequence[str], folder: Path) -> Accelerator:
    """An Accelerator that logs to these trackers; files of theirs (TensorBoard) go below `folder`.

    Raises:
        UsageError: a tracker that is not installed.
    """
    available = {str(tracker) for tracker in get_available_trackers()}
    missing = [tracker for tracker in trackers if tracker not in available]
    if missing:
        installed = ", ".join(sorted(available)) or "none"
        raise UsageError(f"trackers: {missing[0]} is not installed here; installed: {installed}")
    return Accelerator(log_with=list(trackers) or None, project_dir=str(folder) if trackers else None)


def start(accelerator: Accelerator, project: str, settings: dict[str, Any]) -> None:
    """Open the trackers; nested settings are flattened to dotted names."""
    accelerator.init_trackers(project, config=_flat(settings, ""))


def _flat(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
