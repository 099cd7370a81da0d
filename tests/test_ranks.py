"""Ranks among themselves: they wait for hours if need be, compute together, and end together with one cause."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pipeline.errors import UsageError
from pipeline.launcher import Place
from pipeline.ranks import Ranks

TOP = Path(__file__).resolve().parent.parent
LAUNCH = (
    "import sys; from pipeline.launcher import launch; "
    "sys.exit(launch([sys.executable, *sys.argv[2:]], int(sys.argv[1])))"
)


def run(what: str, *more: str, ranks: int = 2, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LAUNCH, str(ranks), str(TOP / "tests" / "one_rank.py"), what, *more]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TOP)} | environment
    return subprocess.run(command, capture_output=True, text=True, env=variables, check=False, timeout=120)


def test_ranks_wait_without_work_and_compute_together() -> None:
    result = run("waits", ranks=3)
    assert (result.returncode, result.stderr) == (0, "")
    seconds = [float(line) for line in result.stdout.split()]
    assert len(seconds) == 2
    assert max(seconds) < 0.5, "three seconds of waiting burn no core"


@pytest.mark.parametrize(
    ("what", "line"),
    [("bad_data", "shard 7 cannot be used"), ("all_bad", "no labels"), ("dies_alone", "a step of rank 0")],
)
def test_a_clear_error_is_told_once_with_its_exit_code(what: str, line: str) -> None:
    result = run(what)
    assert (result.returncode, result.stderr) == (6, f"simclr: {line}\n")


def test_a_fault_shows_one_traceback() -> None:
    result = run("broken")
    assert result.returncode == 9
    assert result.stderr.count("Traceback") == 1
    assert "ValueError: of rank 1" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("simclr: rank 1 failed, its traceback stands above")


def test_a_rank_that_hangs_ends_all() -> None:
    started = time.monotonic()
    result = run("hangs", SIMCLR_RANK_TIMEOUT="3")
    assert result.returncode == 9
    assert time.monotonic() - started < 60
    assert result.stderr.startswith("simclr: rank 0 lost another: ")
    assert len(result.stderr.splitlines()) == 1


def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path: Path) -> None:
    result = run("stops", str(tmp_path))
    assert result.returncode == 143
    assert result.stdout.split() == ["6", "6"]
    assert result.stderr == "simclr: interrupted; the same command resumes\n"
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000000004", "step-000000006"]


def test_alone_there_is_nobody_to_wait_for() -> None:
    ranks, rows, done = Ranks(), torch.rand(3, 2), []
    assert ranks.gather(rows) is rows
    assert ranks.largest(4) == 4
    ranks.alone(lambda: done.append(1))
    assert done == [1]


def test_a_device_for_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(Place(rank=3, ranks=4, local_rank=1, local_ranks=2, launcher="torchrun"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert ranks.device("step", "auto") == torch.device("cpu")
    for wanted in ("cuda", "mps"):
        with pytest.raises(
            UsageError, match=rf"step\.device: 4 processes have no {wanted} device each here; cpu will do"
        ):
            ranks.device("step", wanted)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        UsageError, match=r"step\.device: 2 processes and 1 GPU here: start 1, or set the device to cpu"
    ):
        ranks.device("step", "auto")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert ranks.device("step", "auto") == torch.device("cuda", 1)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert ranks.device("step", "auto") == torch.device("cpu")


def test_accelerate_finds_the_place_and_not_its_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    before = dict(os.environ)
    with Ranks(Place(1, 4, 1, 2)).announced():
        assert "ACCELERATE_MIXED_PRECISION" not in os.environ
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        assert [os.environ[name] for name in names] == ["1", "4", "1", "2"]
    assert dict(os.environ) == before
