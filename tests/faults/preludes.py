"""What the forked process of a trial does before its command: notes what a test wants to know, or the trial's work."""

import json
import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

from faults.savers import load_with_accelerate, save_ours, save_with_accelerate
from pipeline import failpoints
from pipeline.training import Training

__all__ = ["load_with_accelerate", "log_points", "log_samples", "save_ours", "save_with_accelerate"]


def log_points(path: str) -> None:
    """A line in a file for each failpoint that is reached."""
    descriptor = _open(path)

    def look(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is failpoints.reach.__code__:
            os.write(descriptor, frame.f_locals["name"].encode() + b"\n")

    sys.setprofile(look)


def log_samples(path: str) -> None:
    """A line in a file for each step of training that is taken: [process, step, ids of the samples]."""
    descriptor = _open(path)
    accepts = Training.accepts

    def watched(self: Training, loss: Tensor, gradient_norm: Tensor, **captured: Tensor) -> bool:
        accepted = accepts(self, loss, gradient_norm, **captured)
        if accepted:
            line = json.dumps([os.getpid(), self.done, captured["sample_ids"].tolist()])
            os.write(descriptor, line.encode() + b"\n")
        return accepted

    Training.accepts = watched


def _open(path: str) -> int:
    return os.open(Path(path), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
