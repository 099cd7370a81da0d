"""What a stage is given: its inputs, a folder to write to, a device, and what surrounds every training loop."""

import errno
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, Self, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline import checkpoint, tracking
from pipeline.checkpoint import Checkpoint
from pipeline.errors import Interrupted, NotFinite, UsageError
from pipeline.manifest import canonical_json, sync
from pipeline.progress import Progress, Reporter
from pipeline.ranks import Ranks
from pipeline.settings import StageSettings, plain
from pipeline.stopwatch import Stopwatch

Batch = TypeVar("Batch")


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


class Stateful(Protocol):
    """A module or an optimiser."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state_dict: Any) -> Any: ...


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
        settings, work, checkpoints, reporter, peers, signal, in_training: for the machinery around; a stage has no use
            for them.
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
        work: Path,
        trackers: Path,
        reporter: Reporter,
        peers: Ranks | None = None,
        checkpoints: Path | None = None,
        profile: bool = False,
    ):
        self.peers = peers or Ranks()
        self.rank, self.ranks = self.peers.rank, self.peers.size
        self.checkpoints = checkpoints or work / "checkpoints"
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
        append_line(self.work / "timing.jsonl", values | {"at": time.time()})

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

    # Training

    def training(
        self, state: Mapping[str, Stateful], *, steps: int, steps_per_epoch: int, images_per_step: int
    ) -> "Training":
        """What surrounds a training loop: resume, checkpoints, metrics, the end on a signal.

        Args:
            state: all modules and optimisers whose state a checkpoint holds.
            steps: of the whole loop.
            images_per_step: for the rate that is shown.
        """
        return Training(self, state, steps, steps_per_epoch, images_per_step)

    # Signals

    def receive(self, number: int, _frame: FrameType | None = None) -> None:
        """Handler of SIGINT and SIGTERM: a training loop ends after its step, all else (and a second signal) now."""
        if self.signal is not None or not self.in_training:
            raise Interrupted(number)
        self.signal = number
        if self.rank > 0:
            return
        # Straight to the descriptor: the handler may have come in the middle of another line.
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


class Training:
    """The surroundings of a training loop, as a context manager; see `Run.training`.

    metrics.jsonl gets a line for every `record_every_steps` steps: the mean of what was recorded in between. It is
    part of the state, so that a resumed run writes the same file as one that nobody interrupted.
    """

    def __init__(self, run: Run, state: Mapping[str, Stateful], steps: int, steps_per_epoch: int, images_per_step: int):
        settings: Any = run.settings
        self._run, self._state = run, state
        self._total, self._steps_per_epoch, self._images_per_step = steps, steps_per_epoch, images_per_step
        self._record_every: int = settings.record_every_steps
        self._checkpoint_every: int = settings.checkpoint_every_steps
        self._log_every: float = settings.log_every_seconds
        self._metrics = run.work / "metrics.jsonl"
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._waited = 0.0
        self._note = ""
        self._stopwatch = Stopwatch(self._synchronise) if run.profile else None
        self.done = 0
        """Steps that are done."""
        self.latest: dict[str, float] = {}
        """The last line of means."""

    def __enter__(self) -> Self:
        self._resume()
        append_line(
            self._run.work / "attempts.jsonl", {"event": "training", "at": time.time(), "first_step": self.done}
        )
        tracking.start(self._run.accelerator, self._run.recipe, plain(self._run.settings))
        self._progress = Progress(self._run.reporter, self._total, "steps", self.done, self._log_every)
        self._progress.__enter__()
        self._run.in_training = True
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._run.in_training = False
        self._progress.__exit__()
        tracking.finish(self._run.accelerator)
        if self._stopwatch is not None:
            self._run.say(self._stopwatch.in_words())
        if kind is None:
            shutil.copyfile(self._metrics, self._run.out / "metrics.jsonl")

    def steps(self, load: Callable[[int], Batch]) -> Iterator[tuple[int, Batch]]:
        """Each step that is not done yet, with its batch.

        Args:
            load: gives the batch of a step; the time that it takes counts as waiting for data.

        Raises:
            Interrupted: a signal came; a checkpoint was written.
            NotFinite: a recorded value became NaN or infinite.
        """
        window_started, window_first = time.monotonic(), self.done
        while self.done < self._total:
            if self._stopwatch is not None:
                self._stopwatch.begin_step()
            before = time.monotonic()
            with self.part("waiting for data"):
                batch = load(self.done)
            self._waited += time.monotonic() - before
            yield self.done, batch
            self.done += 1
            if self.done % self._record_every == 0 or self.done == self._total:
                now = time.monotonic()
                with self.part("metrics"):
                    self._flush(now - window_started, self.done - window_first)
                window_started, window_first = now, self.done
            self._progress.advance(1, self._note)
            if self._stopwatch is not None and self.done == self._total:
                self._stopwatch.begin_step()  # the last one ends
            stop = self._run.peers.largest(self._run.signal or 0)  # all ranks stop after the same step
            if stop or (self.done < self._total and self.done % self._checkpoint_every == 0):
                with self.part("checkpoint"):
                    self._run.peers.alone(self._save)
            if stop:
                raise Interrupted(stop)

    def part(self, name: str) -> AbstractContextManager[None]:
        """`with training.part("views"): ...` names what the time inside is spent on, for `--profile`."""
        return nullcontext() if self._stopwatch is None else self._stopwatch.part(name)

    def record(self, **values: Tensor | float) -> None:
        """Scalars of this step. They stay on their device until a line is due, so that nothing waits for them."""
        for name, value in values.items():
            scalar = torch.as_tensor(value).detach()
            self._sums[name] = self._sums[name] + scalar if name in self._sums else scalar.clone()
            self._counts[name] = self._counts.get(name, 0) + 1

    @property
    def line_is_due(self) -> bool:
        """Whether a line of metrics.jsonl follows the step at hand: the time for measurements that cost something."""
        return (self.done + 1) % self._record_every == 0 or self.done + 1 == self._total

    def write_line(self, **values: float) -> None:
        """A line of its own in metrics.jsonl, for the step at hand."""
        self._write(self.done + 1, values)

    def _flush(self, seconds: float, steps: int) -> None:
        """Write the means of what was recorded, and the rates beside."""
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        for name, value in means.items():
            if not math.isfinite(value):
                raise NotFinite(
                    f"{name} became {value} within steps {self.done - steps + 1} to {self.done}: "
                    "a lower learning rate, gradient_clip, or precision fp32 usually mends it"
                )
        self._sums, self._counts = {}, {}
        self.latest = means
        self._write(self.done, means)
        self._run.accelerator.log(means, step=self.done)
        rate, waiting = steps * self._images_per_step / max(seconds, 1e-9), self._waited / max(seconds, 1e-9)
        self._waited = 0.0
        self._note = f"loss {means['loss']:.4f}, {rate:,.0f} images/s, {waiting:.0%} waiting for data"
        timing = {"step": self.done, "images_per_second": rate, "waiting_share": waiting, "at": time.time()}
        append_line(self._run.work / "timing.jsonl", timing)

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        append_line(self._metrics, {"step": step, "epoch": step / self._steps_per_epoch} | dict(values))

    def _save(self) -> None:
        sync(self._metrics)
        state = {name: part.state_dict() for name, part in self._state.items()}
        loop = {
            "metrics_bytes": self._metrics.stat().st_size,
            "sums": self._sums,
            "counts": self._counts,
            "random": [torch.get_rng_state(), *self._device_random()],
        }
        checkpoint.save(self._run.checkpoints, self.done, {"loop": loop, "state": state})
        event = {"event": "checkpoint", "at": time.time(), "step": self.done}
        append_line(self._run.work / "attempts.jsonl", event)

    def _synchronise(self) -> None:
        if self._run.device.type == "cuda":
            torch.cuda.synchronize(self._run.device)
        elif self._run.device.type == "mps":
            torch.mps.synchronize()

    def _device_random(self) -> list[Tensor]:
        device = self._run.device
        return [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []

    def _find(self) -> Checkpoint | None:
        """The newest checkpoint that is whole. Rank 0 looks for it, and the others read the same."""
        run, found = self._run, None

        def look() -> None:
            nonlocal found
            found = checkpoint.load_latest(run.checkpoints, run.work / "quarantine")

        run.peers.alone(look)
        # A checkpoint is of step 1 or a later one.
        step = run.peers.largest(found.step if found is not None else 0)
        return checkpoint.load(run.checkpoints, step) if run.rank > 0 and step else found

    def _resume(self) -> None:
        self._metrics.touch()
        found = self._find()
        if found is None:
            os.truncate(self._metrics, 0)
            return
        for damage in found.damaged:
            self._run.warn(f"checkpoint set aside: {damage}")
        for name, part in self._state.items():
            part.load_state_dict(found.state["state"][name])
        loop = found.state["loop"]
        os.truncate(self._metrics, loop["metrics_bytes"])
        self._sums, self._counts = loop["sums"], loop["counts"]
        torch.set_rng_state(loop["random"][0])
        if self._run.device.type == "cuda" and len(loop["random"]) > 1:
            torch.cuda.set_rng_state(loop["random"][1], self._run.device)
        self.done = found.step
        self._run.reporter.line(f"resumes after step {self.done:,} of {self._total:,}")


def append_line(path: Path, entry: Mapping[str, Any]) -> None:
    """Append one line of JSON, all of it or nothing: a disk that fills up leaves no half line behind."""
    line = canonical_json(entry) + b"\n"
    with path.open("ab", buffering=0) as file:
        whole = file.seek(0, os.SEEK_END)
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(whole)
            raise
