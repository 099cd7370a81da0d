"""One of several ranks that do what a test names: `python one_rank.py WHAT`, started by test_ranks.py."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import distributed

from pipeline import cli, launcher
from pipeline.errors import BadData
from pipeline.progress import Reporter
from pipeline.ranks import Ranks, joined
from pipeline.run import Run
from pipeline.settings import StageSettings
from pipeline.training import Training
from pipeline.workplace import Workplace

CPU = torch.device("cpu")


def waits(ranks: Ranks) -> None:
    """Rank 0 is busy by itself; prints the seconds of a processor that another spends meanwhile, and their groups."""
    if ranks.rank == 0:
        assert not distributed.is_initialized()
        time.sleep(2)
        ranks.tell({"step": "next"})
        ranks.alone(lambda: time.sleep(1))
    else:
        before = time.process_time()
        assert ranks.listen() == {"step": "next"}
        ranks.alone(lambda: None)
        os.write(1, f"{time.process_time() - before:.2f}\n".encode())  # at once: two ranks write
    with ranks.group(CPU):
        assert ranks.largest(ranks.rank) == ranks.size - 1
        rows = ranks.gather(torch.full((2 * ranks.rank, 3), float(ranks.rank)))
        assert rows[:, 0].tolist() == [1.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    assert not distributed.is_initialized()
    with ranks.group(CPU):
        assert ranks.gather(torch.ones(1, 1)).shape == (3, 1)


def bad_data(ranks: Ranks) -> None:
    """Only one rank sees that something is wrong."""
    with ranks.group(CPU):
        if ranks.rank == 1:
            raise BadData("shard 7 cannot be used")
        ranks.largest(0)


def all_bad(ranks: Ranks) -> None:
    """All see it."""
    with ranks.group(CPU):
        ranks.largest(0)
        raise BadData("no labels")


def broken(ranks: Ranks) -> None:
    """A fault of ours on one rank."""
    with ranks.group(CPU):
        if ranks.rank == 1:
            raise ValueError("of rank 1")
        ranks.largest(0)


def hangs(ranks: Ranks) -> None:
    """One rank never comes to where the others wait."""
    with ranks.group(CPU):
        ranks.largest(0)
        if ranks.rank == 1:
            time.sleep(100)
        ranks.largest(0)


def dies_alone(ranks: Ranks) -> None:
    """Rank 0 fails in a step of its own, while the others wait for the next."""
    if ranks.rank == 0:
        raise BadData("a step of rank 0")
    ranks.listen()


class Steps(StageSettings):
    """Of a loop of no work."""

    stage_version = 1
    record_every_steps: int = 2
    checkpoint_every_steps: int = 4
    log_every_seconds: float = 100.0


def stops(ranks: Ranks) -> None:
    """A signal comes to one rank, in the sixth step; prints how many steps each has done."""
    folder = Path(sys.argv[2])
    work = folder / str(ranks.rank)
    work.mkdir()
    layer = torch.nn.Linear(1, 1)
    with ranks.group(CPU):
        run = Run(
            recipe="test", step="step", seed=0, settings=Steps(), inputs={}, ancestors=[], out=work,
            work=Workplace(work, folder / "checkpoints"), trackers=work, reporter=Reporter("step", quiet=True),
            peers=ranks,
        )  # fmt: skip
        signal.signal(signal.SIGTERM, run.receive)
        training = Training(run, {"layer": layer}, steps=20, steps_per_epoch=20, images_per_step=1)
        try:
            with training:
                for step, _ in training.steps(lambda step: step):
                    if step == 5 and ranks.rank == 1:
                        os.kill(os.getpid(), signal.SIGTERM)
                    training.record(loss=1.0)
        finally:
            os.write(1, f"{training.done}\n".encode())


def main(what: str) -> int:
    with joined(launcher.read_place(None)) as ranks:
        globals()[what](ranks)
    return 0


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent))
    sys.exit(cli.guarded(lambda: main(sys.argv[1])))
