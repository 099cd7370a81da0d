"""What a stage is given: its inputs, a folder to write to, a device."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline import tracking
from pipeline.errors import Interrupted, UsageError
from pipeline.progress import Progress, Reporter
from pipeline.ranks import Ranks
from pipeline.settings import StageSettings
from pipeline.workplace import Workplace


@dataclass(frozen=True)
class Input:
    """An artifact that a stage reads."""

    name: str
    stage: str
    key: str
    digest: str
    files: Path
    made_from: dict[str, Any] = field(default_factory=dict)
    """By setting: the digests of what it was made of, as in Record.inputs. A stage may refuse what does not belong
    together by it; what it writes may not depend on it, since its key does not."""


@dataclass(frozen=True)
class Ancestor:
    """An artifact somewhere upstream, with what made it."""

    step: str
    """The name of the step when the artifact was made."""
    stage: str
    version: int
    key: str
    digest: str
    seed: int | None
    settings: dict[str, Any]
    """Those that can change the result: what is shown of them is a function of the key."""
    changed_settings: dict[str, Any]
    """Those of them that are not at their default."""
    inputs: dict[str, Any]
    files: Path


class Run:
    """One execution of a stage: everything that the stage may know of the machinery.

    Attributes:
        recipe, step: names.
        seed: all randomness derives from it.
        out: empty folder; what is written here becomes the artifact.
        rank, ranks: this process's number among those that run the stage together, and how many they are. What ranks
            other than 0 write, count and say is thrown away.
        counts: data counts and headline figures for the record, see `count`.
        profile: say at the end of training where the time of a step went.
        settings, work, reporter, peers, signal, in_training: for the machinery around; a stage has no use for them.
    """

    def __init__(
        self,
        *,
        recipe: str,
        step: str,
        seed: int,
        settings: StageSettings,
        inputs: Mapping[str, list[Input]],
        ancestors: list[Ancestor],
        out: Path,
        work: Workplace,
        trackers: Path,
        reporter: Reporter,
        peers: Ranks | None = None,
        profile: bool = False,
    ):
        self.peers = peers or Ranks()
        self.rank, self.ranks = self.peers.rank, self.peers.size
        self.recipe, self.step, self.seed, self.out = recipe, step, seed, out
        self.settings, self.work, self.reporter = settings, work, reporter
        self._trackers = trackers
        self.counts: dict[str, float | str] = {}
        self.profile = profile
        self.signal: int | None = None
        self.in_training = False
        self._inputs, self._ancestors = inputs, ancestors

    # Inputs

    def input(self, field: str) -> Path:
        """The files of the one artifact that a setting names."""
        return self._inputs[field][0].files

    def inputs(self, field: str) -> list[Input]:
        """The artifacts that a setting names, in its order."""
        return list(self._inputs[field])

    def is_artifact(self, field: str) -> bool:
        """Whether the setting names an artifact, rather than being a literal or left out."""
        return field in self._inputs

    def ancestors(self) -> list[Ancestor]:
        """Everything that the inputs were made of, themselves included, sources first.

        What is written may depend on it only in stages whose settings say `reads_ancestors`: their key holds what is
        listed here. Others may refuse by it, as by `Input.made_from`.
        """
        return list(self._ancestors)

    # Words

    def say(self, message: str) -> None:
        """One line to the user, kept in the record."""
        self.reporter.say(message)

    def warn(self, message: str) -> None:
        """The same, as something to look at."""
        self.reporter.warn(message)

    def count(self, **values: float | str) -> None:
        """Data counts and headline figures, for `simclr show`."""
        self.counts.update(values)

    def clock(self, **values: float) -> None:
        """Times and rates, which are no function of the key: they lie beside the record (`simclr show --json`)."""
        self.work.clock(values)

    def scratch(self) -> Path:
        """A folder for files that are needed while the stage runs; nobody else writes there, and it is deleted."""
        folder = self.work.private / "scratch"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def progress(self, total: int, unit: str) -> Progress:
        """`with run.progress(n, "images") as progress: progress.advance(k)`"""
        return Progress(self.reporter, total, unit)

    # Device

    @cached_property
    def accelerator(self) -> Accelerator:
        """Accelerate's view of devices and trackers.

        It stays in full precision: its precision is one for the whole process, and the steps of a recipe differ; see
        `autocast`.
        """
        trackers = getattr(self.settings, "trackers", ())
        if self.ranks == 1:
            return tracking.accelerator_with(trackers, self._trackers)
        with self.peers.announced():
            return tracking.accelerator_with(trackers, self._trackers, cpu=self.device.type == "cpu")

    @cached_property
    def device(self) -> torch.device:
        """Where to compute: the setting `device`, or what Accelerate finds."""
        wanted = getattr(self.settings, "device", "auto")
        if self.ranks > 1:
            return self.peers.device(self.step, wanted)
        if wanted == "auto":
            return self.accelerator.device
        present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if not present[wanted]:
            raise UsageError(f"{self.step}.device: there is no {wanted} device here; cpu or auto will do")
        return torch.device(wanted)

    def autocast(self, precision: str) -> torch.autocast:
        """The context for an encoder's arithmetic in `fp32` or `bf16`."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=precision == "bf16")

    # Several ranks

    def distribute(self, module: nn.Module) -> nn.Module:
        """The module to call in training: its weights start as those of rank 0, gradients are means over all ranks.

        What is optimised and saved stays `module`. Alone, and where it has no weights to train, it is returned itself.
        """
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if self.ranks == 1 or not trained:
            return module
        network = self.accelerator.prepare_model(_Distributed(module))
        # DistributedDataParallel takes the order of its first backward pass for all others. This one is the same at
        # every start: after a resume, sums over three ranks and more round as they would have without.
        network().backward()
        for parameter in trained:
            parameter.grad = None
        return network

    def gather(self, rows: Tensor) -> Tensor:
        """[n, ...] of each rank -> all of them in order of rank, on every rank; n may differ. Without gradient."""
        return self.peers.gather(rows)

    def check_divides(self, setting: str, batch_size: int, *, largest: int | None = None, unit: int = 1) -> None:
        """Refuse a global batch that cannot be shared out evenly.

        Args:
            largest: batch that there can be, where a larger one than this is cut down to it.
            unit: rows that stay together.

        Raises:
            UsageError: names the setting and the nearest sizes that can.
        """
        share = self.ranks * unit
        left_over = batch_size % share
        if left_over:
            smaller, larger = batch_size - left_over, batch_size - left_over + share
            can = [size for size in (smaller, larger) if 0 < size <= (largest or larger)]
            near = f"{' or '.join(map(str, can))} can" if can else "take fewer processes"
            there = " (no more are there)" if batch_size == largest else ""
            raise UsageError(
                f"{self.step}.{setting}: {batch_size}{there} cannot be shared evenly by {self.ranks} processes; {near}"
            )

    # Signals

    def receive(self, number: int, _frame: FrameType | None = None) -> None:
        """Handler of SIGINT and SIGTERM: a training loop ends after its step, all else (and a second signal) now."""
        if self.signal is not None or not self.in_training:
            raise Interrupted(number)
        self.signal = number
        if self.rank > 0:
            return
        # Straight to the descriptor: the handler may have come in the middle of another line.
        with suppress(OSError):  # nobody reads it, or the disk is full
            os.write(2, f"signal {number}: ends after this step, with a checkpoint\n".encode())


class _Distributed(nn.Module):
    """A module that, called with nothing, gives 0 as a function of all weights that are trained."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> Any:
        if inputs:
            return self.module(*inputs)
        return torch.stack(
            [(parameter * 0).sum() for parameter in self.module.parameters() if parameter.requires_grad]
        ).sum()
