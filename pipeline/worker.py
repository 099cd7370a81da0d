"""Runs one step: takes the lease, gives the stage its Run, publishes what it wrote. The only importer of stage code."""

import importlib
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from pipeline import provenance
from pipeline.environment import code, environment
from pipeline.errors import Held, Interrupted, UsageError
from pipeline.failpoints import reach
from pipeline.host import forget_peak_memory, give_freed_memory_back, peak_memory
from pipeline.manifest import FILES, replace_file
from pipeline.progress import Reporter
from pipeline.ranks import Ranks, joined
from pipeline.recipe import Recipe, Step
from pipeline.records import Record
from pipeline.resources import exhausted
from pipeline.run import Ancestor, Input, Run
from pipeline.settings import changed_subset, hashed_subset, plain
from pipeline.store import Store
from pipeline.workplace import Workplace

__all__ = ["Job", "check_settings", "follow", "joined", "run_step"]


@dataclass(frozen=True)
class Job:
    """A step with everything resolved."""

    recipe: str
    step: Step
    seed: int | None
    """None where the seed does not change the result."""
    key: str
    inputs: dict[str, Any]
    """As in Record.inputs."""
    input_records: dict[str, list[tuple[str, Record]]]
    """By setting: (name, record) of each artifact."""
    fresh: bool = False
    """Discard checkpoints first."""
    force: bool = False
    """Make the result current, even if another was."""
    profile: bool = False
    """Say where the time of a training step went."""


def check_settings(steps: Iterable[Step]) -> None:
    """Let the stages of steps that may run check what they can before anything does: names that only libraries know.

    A stage that has something to check has a function `check_settings` beside its own.

    Raises:
        UsageError: names the step.
    """
    for step in steps:
        check = getattr(importlib.import_module(step.stage.module), "check_settings", None)
        if check is None:
            continue
        try:
            check(step.settings)
        except ValueError as error:
            if getattr(error, "exit_code", None) != UsageError.exit_code:
                raise
            raise UsageError(f"{step.name}: {error}") from error


def run_step(store: Store, job: Job, ranks: Ranks | None = None) -> Record:
    """Run a step in this process, and in those of `ranks` too if its stage uses them.

    Args:
        ranks: where there are several, of which this is rank 0.

    Returns:
        The record of what is current for its key afterwards.

    Raises:
        Held: another process is at the same step, or has taken it over.
        Interrupted: SIGINT or SIGTERM; the same command resumes.
    """
    work = Workplace(store.work(job.step.stage.name, job.key))
    with work.held():
        made_meanwhile = store.current(job.step.stage.name, job.key)
        if made_meanwhile is not None and not job.force:
            return made_meanwhile
        work.begin(fresh=job.fresh)
        reporter = Reporter(job.step.name)
        peers = ranks if ranks is not None and job.step.settings.uses_ranks else Ranks()
        run = _run(store, job, work.out / FILES, work, reporter, peers)
        try:
            if run.ranks > 1:
                peers.tell(_order(job))
            with _together(run):
                _attempt(work, run, job)
            reach("attempt.made")
            work.require_held()
            return _publish(store, job, work, run)
        except (Held, Interrupted):
            raise
        except Exception as error:
            # Who takes over, or comes first where leases hold nobody back, clears away what this one was writing to.
            work.require_held()
            made_meanwhile = store.current(job.step.stage.name, job.key)
            if made_meanwhile is None or job.force:
                raise
            reporter.warn(f"another process made this step meanwhile, and cleared up: its result is taken ({error})")
            work.clear()  # of what this one added since
            return made_meanwhile
        finally:
            work.leave()


def _publish(store: Store, job: Job, work: Workplace, run: Run) -> Record:
    """The files of a finished attempt become an artifact, with the record of what made it; what is current then."""
    stage, reporter = job.step.stage, run.reporter
    digest, size_bytes = store.publish(work.out, stage.name)
    attempts = work.attempts()
    record = Record(
        stage=stage.name,
        stage_version=stage.version,
        key=job.key,
        digest=digest,
        recipe=job.recipe,
        step=job.step.name,
        seed=job.seed,
        settings=plain(job.step.settings),
        hashed_settings=hashed_subset(job.step.settings),
        changed_settings=changed_subset(job.step.settings),
        inputs=job.inputs,
        input_runs=[[one.stage, one.key, one.digest] for group in job.input_records.values() for _, one in group],
        size_bytes=size_bytes,
        code=attempts[-1]["code"],
        environment=environment()
        | {"device": str(run.device) if "device" in vars(run) else None, "threads": attempts[-1]["threads"]},
        attempts=attempts,
        counts=run.counts,
        messages=reporter.messages,
        seconds=round(sum(attempt["seconds"] for attempt in attempts), 3),
        finished_at=time.time(),
    )
    current = store.write_record(record, repoint=job.force)
    if current.digest != digest:
        reporter.warn(
            f"another process made this step meanwhile, with other bytes ({current.digest[:8]}, here {digest[:8]}): "
            "its artifact stays current; --force makes the next one so"
        )
    elif work.timing.is_file():
        replace_file(store.timing(record.stage, record.key, record.digest), work.timing.read_bytes())
    work.clear()
    return current


def follow(store: Store, recipe: Recipe, ranks: Ranks) -> None:
    """As a rank other than 0, run the steps that rank 0 tells of, until it tells the end."""
    with _signals(_end_now):
        while (order := ranks.listen()) is not None:
            job = _job(store, recipe, order, ranks)
            with tempfile.TemporaryDirectory(prefix="simclr-") as folder:
                out = Path(folder) / FILES
                out.mkdir()
                checkpoints = store.work(job.step.stage.name, job.key) / "checkpoints"
                work = Workplace(Path(folder), checkpoints)
                run = _run(store, job, out, work, Reporter(job.step.name, quiet=True), ranks)
                with _together(run), _signals(run.receive):
                    _call(run, job)


def _order(job: Job) -> dict[str, Any]:
    """What the other ranks cannot know by themselves, as plain data."""
    records = {
        field: [[name, one.stage, one.key, one.digest] for name, one in group]
        for field, group in job.input_records.items()
    }
    return {"step": job.step.name, "key": job.key, "seed": job.seed, "inputs": job.inputs, "records": records}


def _job(store: Store, recipe: Recipe, order: dict[str, Any], ranks: Ranks) -> Job:
    """The job that an order of rank 0 means, held against what this rank's own command says of it."""
    step = recipe.steps.get(order["step"])
    key = None
    if step is not None:
        hashed = hashed_subset(step.settings)
        key = provenance.step_key(step.stage.name, step.stage.version, order["seed"], hashed, order["inputs"])
    if step is None or key is None or key != order["key"]:
        raise UsageError(
            f"rank {ranks.rank} has other settings of {order['step']} than rank 0: give all the same recipe and options"
        )
    records = {
        field: [(name, store.record(*place)) for name, *place in group] for field, group in order["records"].items()
    }
    return Job(recipe.name, step, order["seed"], key, order["inputs"], records)


@contextmanager
def _together(run: Run) -> Iterator[None]:
    """A process group, where several ranks run a step; it ends once all are done."""
    if run.ranks == 1:
        yield
        return
    with run.peers.group(run.device):
        yield
    run.peers.meet()


@contextmanager
def _signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """SIGINT and SIGTERM go to `handler`."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, one in before.items():
            signal.signal(number, one)


def _end_now(number: int, _frame: FrameType | None) -> None:
    raise Interrupted(number)


def _run(
    store: Store,
    job: Job,
    out: Path,
    work: Workplace,
    reporter: Reporter,
    peers: Ranks,
) -> Run:
    inputs = {
        field: [
            Input(name, one.stage, one.key, one.digest, store.files(one.stage, one.digest), one.inputs)
            for name, one in group
        ]
        for field, group in job.input_records.items()
    }
    seen: dict[str, Record] = {}
    for group in job.input_records.values():
        for _, one in group:
            seen |= {ancestor.key: ancestor for ancestor in store.ancestors(one)}
    ancestors = [
        Ancestor(
            one.step, one.stage, one.stage_version, one.key, one.digest, one.seed, one.hashed_settings,
            one.changed_settings, one.inputs,
            store.files(one.stage, one.digest),
        )
        for one in seen.values()
    ]  # fmt: skip
    return Run(
        recipe=job.recipe, step=job.step.name, seed=job.seed or 0, settings=job.step.settings, inputs=inputs,
        ancestors=ancestors, out=out, work=work, trackers=store.trackers(job.recipe, job.step.name, job.key),
        reporter=reporter, peers=peers, profile=job.profile,
    )  # fmt: skip


def _attempt(work: Workplace, run: Run, job: Job) -> None:
    """Call the stage's function, with signals caught, and log how the attempt began and ended."""
    work.log(
        "start",
        host=socket.gethostname(),
        process=os.getpid(),
        ranks=run.ranks,
        threads=torch.get_num_threads(),
        code=code(),  # of now: it may be another by the end
    )
    ended = "failed"
    try:
        with _signals(run.receive):
            _call(run, job)
        ended = "finished"
    except Interrupted:
        ended = "interrupted"
        raise
    finally:
        work.log("end", ended=ended, peak_memory_bytes=_peak_memory(run))


def _call(run: Run, job: Job) -> None:
    """Call the stage's function."""
    give_freed_memory_back()  # of the step before
    forget_peak_memory()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    stage = job.step.stage
    try:
        getattr(importlib.import_module(stage.module), stage.name)(run, job.step.settings)
    except Exception as error:
        no_space = exhausted(error, job.step.name, _settings_to_lower(job.step))
        if no_space is not None:
            raise no_space from error
        raise


def _peak_memory(run: Run) -> dict[str, int | None]:
    """Of this process (rank 0), in bytes: on the host all that was resident, on the device what tensors took."""
    is_cuda = "device" in vars(run) and run.device.type == "cuda"
    return {"host": peak_memory(), "device": torch.cuda.max_memory_allocated(run.device) if is_cuda else None}


def _settings_to_lower(step: Step) -> list[str]:
    """What the recipe says that needs less memory when it is lowered, by dotted keys: of the step, or of an input."""
    keys = []
    for key in type(step.settings).lower_for_memory:
        first, _, rest = key.partition(".")
        is_of_input = first in step.references()
        keys.append(f"{step.references()[first][0]}.{rest}" if is_of_input else f"{step.name}.{key}")
    return keys
