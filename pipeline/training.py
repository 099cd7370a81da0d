"""What surrounds a training loop: resume, checkpoints, metrics, numbers that are not finite, the end on a signal."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from pipeline import checkpoint, finite, tracking
from pipeline.checkpoint import Checkpoint
from pipeline.errors import DamagedArtifact, Interrupted, NoSpace, NotFinite, NoUsableCheckpoint
from pipeline.finite import FiniteGuard
from pipeline.manifest import canonical_json
from pipeline.progress import Progress
from pipeline.resources import FREE_SPACE, free_in_words, is_full_disk, suppress_full_disk
from pipeline.run import Run
from pipeline.settings import plain
from pipeline.stopwatch import Stopwatch
from pipeline.workplace import append_line

Batch = TypeVar("Batch")

CHECKPOINT_EVERY_STEPS, CHECKPOINT_SHARE = 200, 0.01
"""Where the settings leave the cadence open: the steps between two checkpoints, or more of them where that would take a
larger share of the time. With a slower one now and then it stays below 2%."""
MOST_FAILED_SAVES = 3
"""One after another, for want of space; then training stops."""


class Stateful(Protocol):
    """A module or an optimiser."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state_dict: Any) -> Any: ...


class Training:
    """The surroundings of a training loop, as a context manager.

        with Training(run, state, steps=..., steps_per_epoch=..., images_per_step=...) as training:
            for step, batch in training.steps(load):
                loss = ...
                training.backward(loss)
                if not training.accepts(loss, gradient_norm, sample_ids=..., images=...):
                    continue
                ...  # the optimiser's step
                training.record(loss=loss)

    metrics.jsonl gets a line for every `record_every_steps` steps: the mean of what was recorded in between. What it
    holds is part of a checkpoint, so that a resumed run writes the same file as one that nobody interrupted.
    """

    def __init__(
        self, run: Run, state: Mapping[str, Stateful], *, steps: int, steps_per_epoch: int, images_per_step: int
    ):
        """Args:
        state: all modules and optimisers whose state a checkpoint holds.
        steps: of the whole loop.
        images_per_step: for the rate that is shown.
        """
        settings: Any = run.settings
        self._run, self._state = run, state
        self._total, self._steps_per_epoch, self._images_per_step = steps, steps_per_epoch, images_per_step
        self._record_every: int = settings.record_every_steps
        self._checkpoint_every: int = settings.checkpoint_every_steps or CHECKPOINT_EVERY_STEPS
        self._may_put_off = settings.checkpoint_every_steps is None
        self._saved_at = self._stall = 0.0
        self._log_every: float = settings.log_every_seconds
        self._metrics = run.work.private / "metrics.jsonl"
        self._lines = b""
        """What metrics.jsonl holds, also where a full disk cut the file short."""
        modules = (part for part in state.values() if isinstance(part, nn.Module))
        self._guard = FiniteGuard(modules, run.work.not_finite, run.peers)
        self._failed_saves = 0
        self._is_owed = False
        """Whether a checkpoint was due and has not been written yet."""
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
        self._metrics.parent.mkdir(parents=True, exist_ok=True)
        found = self._find()
        if found is not None:
            self._restore(found)
            self._run.reporter.line(f"resumes after step {self.done:,} of {self._total:,}")
        self._run.work.log("training", first_step=self.done)
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
            (self._run.out / "metrics.jsonl").write_bytes(self._lines)
            if self._guard.passed_over:
                self._run.count(steps_passed_over=self._guard.passed_over)

    def steps(self, load: Callable[[int], Batch]) -> Iterator[tuple[int, Batch]]:
        """Each step that is not done yet, with its batch.

        Args:
            load: gives the batch of a step; the time that it takes counts as waiting for data.

        Raises:
            Interrupted: a signal came; a checkpoint was written.
            NotFinite: steps cannot be taken, one after another, also after a return to the last checkpoint; or a value
                that was recorded, or what was trained, became NaN or infinite.
            NoSpace: the disk is full, and no checkpoint could be written for some time.
            Held: another process has taken over.
        """
        window_started, window_first = time.monotonic(), self.done
        while self.done < self._total:
            if self._stopwatch is not None:
                self._stopwatch.begin_step()
            before = time.monotonic()
            with self.part("waiting for data"):
                batch = load(self.done)
            self._waited += time.monotonic() - before
            self._guard.begin_step()
            yield self.done, batch
            self.done += 1
            if self._guard.in_a_row > finite.MOST_IN_A_ROW:
                self._return_to_checkpoint()
                window_started, window_first = time.monotonic(), self.done
                continue
            if self.done % self._record_every == 0 or self.done == self._total:
                now = time.monotonic()
                with self.part("metrics"):
                    self._flush(now - window_started, self.done - window_first)
                window_started, window_first = now, self.done
            self._progress.advance(1, self._note)
            if self._stopwatch is not None and self.done == self._total:
                self._stopwatch.begin_step()  # the last one ends
            # All ranks stop after the same step, and save after the same.
            stop, is_due = divmod(self._run.peers.largest(2 * (self._run.signal or 0) + self._is_due()), 2)
            self._run.work.require_held(now=False)
            if (stop or is_due) and self._goes_back():
                window_started, window_first = time.monotonic(), self.done
            elif stop or is_due:
                with self.part("checkpoint"):
                    self._run.peers.alone(self._save)
            if stop:
                raise Interrupted(stop)
        self._require_finite()  # what is written next was in no checkpoint

    def part(self, name: str) -> AbstractContextManager[None]:
        """`with training.part("views"): ...` names what the time inside is spent on, for `--profile`."""
        return nullcontext() if self._stopwatch is None else self._stopwatch.part(name)

    def backward(self, loss: Tensor) -> None:
        """`loss.backward()`, after which all ranks agree whether its numbers are finite."""
        self._guard.backward(loss)

    def accepts(self, loss: Tensor, gradient_norm: Tensor, **captured: Tensor) -> bool:
        """Whether the step can be taken: loss and gradient are finite on all ranks.

        If not, the optimiser must not step. The batch-norm statistics are as before, the batch is kept for whoever asks
        why, and the next batch follows; after three in a row the last checkpoint does.

        Args:
            gradient_norm: of the whole gradient, after `backward`.
            captured: the batch, by name: what is kept of it.

        Raises:
            NotFinite: that did not help twice; names step, rank and likely cause.
        """
        step = self.done + 1  # as in metrics.jsonl
        if self._guard.accepts(step, loss, gradient_norm, captured):
            return True
        ranks, cause = self._guard.cause(loss, captured)
        told = finite.in_words(step, cause, ranks, self._run.ranks)
        if self._guard.in_a_row <= finite.MOST_IN_A_ROW:
            kept = f", its batch is kept in {self._guard.folder}" if self._guard.is_kept else ""
            self._run.warn(f"{told}; the step is passed over{kept}")
            return False
        last = "no checkpoint was written yet"
        if self._guard.returns < finite.MOST_RETURNS and self._has_checkpoint():
            self._run.warn(f"{told}; {self._guard.in_a_row} in a row, so training goes back to the last checkpoint")
            return False
        if self._guard.returns:
            last = f"it went back to the last checkpoint {self._guard.returns} times"
        raise NotFinite(f"{told}; {self._guard.in_a_row} in a row, and {last}")

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
        loss = f"loss {means['loss']:.4f}, " if "loss" in means else ""  # none where all steps were passed over
        self._note = f"{loss}{rate:,.0f} images/s, {waiting:.0%} waiting for data"
        self._run.work.clock({"step": self.done, "images_per_second": rate, "waiting_share": waiting})

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        line = {"step": step, "epoch": step / self._steps_per_epoch} | dict(values)
        self._lines += canonical_json(line) + b"\n"
        with suppress_full_disk():
            append_line(self._metrics, line)

    def _is_due(self) -> bool:
        """Whether a checkpoint follows this step, as rank 0 sees it."""
        self._is_owed |= self.done % self._checkpoint_every == 0
        # Not while steps are passed over: what is wrong may lie in the weights, and the way back leads before it.
        if self._run.rank > 0 or not self._is_owed or self.done == self._total or self._guard.in_a_row:
            return False
        self._is_owed = False
        return not self._may_put_off or time.monotonic() - self._saved_at >= self._stall * (1 / CHECKPOINT_SHARE - 1)

    def _goes_back(self) -> bool:
        """Go back to the last checkpoint where a finite gradient led to weights that are not; all ranks have the same.

        Not where that cannot help: `save` refuses them then.
        """
        if self._guard.returns == finite.MOST_RETURNS or not self._has_checkpoint():
            return False
        try:
            self._require_finite()
        except NotFinite as error:
            self._run.warn(f"{error}; training goes back to the last checkpoint")
            self._return_to_checkpoint()
            return True
        return False

    def _require_finite(self) -> None:
        for name, part in self._state.items():
            if isinstance(part, nn.Module):
                checkpoint.require_finite(self.done, {f"{name}/{key}": one for key, one in part.state_dict().items()})

    def _save(self) -> None:
        began = time.monotonic()
        self._run.work.require_held()
        state = {name: part.state_dict() for name, part in self._state.items()}
        loop = {
            "metrics": self._lines.decode(),
            "sums": self._sums,
            "counts": self._counts,
            "passed_over": self._guard.counts,
            "random": [torch.get_rng_state(), *self._device_random()],
        }
        try:
            checkpoint.save(self._run.work.checkpoints, self.done, {"loop": loop, "state": state})
        except checkpoint.NotAsWritten as error:
            self._save_later(error, str(error))
            return
        except Exception as error:
            if not is_full_disk(error):
                raise
            needed = checkpoint.size_bytes({"loop": loop, "state": state})
            self._save_later(error, f"the disk is full: {free_in_words(self._run.work.checkpoints, needed)}")
            return
        self._failed_saves = 0
        self._run.work.log("checkpoint", step=self.done)
        self._saved_at = time.monotonic()
        self._stall = self._saved_at - began

    def _save_later(self, error: Exception, reason: str) -> None:
        """Training goes on without a checkpoint, and the next one is due as ever: space may be made meanwhile."""
        self._failed_saves += 1
        told = f"no checkpoint after step {self.done:,}, since {reason}"
        if self._failed_saves == MOST_FAILED_SAVES:
            told = f"{self._run.step}: {told}; it was tried {MOST_FAILED_SAVES} times"
            if isinstance(error, checkpoint.NotAsWritten):
                raise DamagedArtifact(
                    f"{told}: look at the disk; the same command goes on from the last checkpoint"
                ) from error
            raise NoSpace(
                f"{told}: {FREE_SPACE} and give the same command again, which goes on from the last checkpoint"
            ) from error
        then = f"training goes on, and tries again after {self._checkpoint_every:,} steps"
        if self._run.signal:
            then = "the same command goes on from the one before"
        self._run.warn(f"{told}; {then}")

    def _synchronise(self) -> None:
        if self._run.device.type == "cuda":
            torch.cuda.synchronize(self._run.device)
        elif self._run.device.type == "mps":
            torch.mps.synchronize()

    def _device_random(self) -> list[Tensor]:
        device = self._run.device
        return [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []

    def _has_checkpoint(self) -> bool:
        return any(self._run.work.checkpoints.glob("step-*"))

    def _return_to_checkpoint(self) -> None:
        found = self._find()
        assert found is not None, "it was looked for before"
        counted = self._guard.counts
        self._progress.advance(found.step - self.done)
        self._restore(found)
        self._guard.count_return(counted)
        self._is_owed = False

    def _find(self) -> Checkpoint | None:
        """The newest checkpoint that is whole. Rank 0 looks for it, and the others read the same."""
        run, found = self._run, None

        def look() -> None:
            nonlocal found
            found = checkpoint.load_latest(run.work.checkpoints, run.work.quarantine, run.work.last_checkpoint())

        run.peers.alone(look)
        if found is not None and found.damaged:
            for damage in found.damaged:
                run.warn(f"checkpoint set aside: {damage}")
            run.warn(f"{found.steps_lost:,} steps are lost with that, and are done again")
        # A checkpoint is of step 1 or a later one.
        step = run.peers.largest(found.step if found is not None else 0)
        return checkpoint.load(run.work.checkpoints, step) if run.rank > 0 and step else found

    def _restore(self, found: Checkpoint) -> None:
        """Everything as it was after the step of a checkpoint.

        Raises:
            NoUsableCheckpoint: it is of another loop: of other modules, or with values of other kinds.
        """
        try:
            for name, part in self._state.items():
                part.load_state_dict(found.state["state"][name])
            loop = found.state["loop"]
            self._lines = loop["metrics"].encode()
            self._sums, self._counts = loop["sums"], loop["counts"]
            self._guard.counts = loop["passed_over"]
            torch.set_rng_state(loop["random"][0])
            if self._run.device.type == "cuda" and len(loop["random"]) > 1:
                torch.cuda.set_rng_state(loop["random"][1], self._run.device)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            raise NoUsableCheckpoint(
                f"the checkpoint of step {found.step} in {self._run.work.checkpoints} does not fit this training: "
                f"state.json, state: {' '.join(str(error).split())}; --fresh starts again from step 0"
            ) from error
        with suppress_full_disk():
            self._metrics.write_bytes(self._lines)
        self.done = found.step
