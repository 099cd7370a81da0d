"""Several processes, as launchers announce them and as our own starts, watches and ends them. No torch in here."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import cli, launcher
from pipeline.errors import UsageError

TOP = str(Path(launcher.__file__).parent.parent)
TORCHRUN = {
    "RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3", "GROUP_RANK": "0",
    "ROLE_NAME": "default", "MASTER_ADDR": "host", "MASTER_PORT": "29400", "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if launcher.LAUNCHER_VARIABLES.fullmatch(name) or name.startswith(("SLURM_", "ACCELERATE_")):
            monkeypatch.delenv(name)


def announce(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_alone_where_nobody_says_otherwise() -> None:
    assert launcher.read_place(None) == launcher.read_place(4) == launcher.ALONE


def test_the_place_that_torchrun_gives_is_taken_out_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, TORCHRUN)
    place = launcher.read_place(3)
    assert place == launcher.Place(1, 3, 1, 3, "host", 29400, "torchrun", keeps_store=True, attempt=2)
    assert not set(TORCHRUN) & set(os.environ)


@pytest.mark.parametrize("asked", [1, 2, 4])
def test_another_number_than_was_started_is_refused(asked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, TORCHRUN)
    with pytest.raises(UsageError, match=rf"--processes {asked}: torchrun started 3; leave --processes out"):
        launcher.read_place(asked)


def test_the_command_refuses_it_with_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    announce(monkeypatch, TORCHRUN)
    assert cli.guarded(lambda: cli.app(["run", "digits", "--processes", "2"], standalone_mode=False)) == 2
    assert capsys.readouterr().err == (
        "simclr: --processes 2: torchrun started 3; leave --processes out, or start as many\n"
    )


@pytest.mark.parametrize(
    ("nodes", "address"),
    [("node[07-12,20]", "node07"), ("a1,b[1-2]", "a1"), ("gpu-3", "gpu-3")],
)
def test_the_place_that_srun_gives(nodes: str, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {
        "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456", "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": nodes,
    }  # fmt: skip
    announce(monkeypatch, variables)
    assert launcher.read_place(None) == launcher.Place(5, 8, 1, 4, address, 23456, "srun")


def test_the_shell_of_a_batch_job_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"})
    assert launcher.read_place(None) == launcher.ALONE


def test_accelerate_launch_that_starts_one_of_several_is_caught(tmp_path: Path) -> None:
    """The real thing: `accelerate launch` on the CPU starts one process, without a word."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "pipeline.cli", "run", "digits"]
    result = subprocess.run([*command, "--store", str(tmp_path)], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "simclr: accelerate launch was asked for several processes and started one" in result.stderr
    assert "returned non-zero exit status 2" in result.stderr


def launch(code: str, processes: int = 3) -> int:
    body = f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{code}"
    return launcher.launch([sys.executable, "-c", body], processes)


def test_every_rank_knows_its_place(tmp_path: Path) -> None:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    code = f"open(f'{tmp_path}/{{rank}}', 'w').write(' '.join(os.environ[name] for name in {names}))"
    assert launch(code, 2) == 0
    first, second = ((tmp_path / str(rank)).read_text().split() for rank in range(2))
    assert first[:5] == ["0", "0", "2", "2", "127.0.0.1"]
    assert second == ["1", "1", *first[2:]]


@pytest.mark.parametrize(
    ("code", "expected", "told"),
    [
        ("if rank == 1: os.kill(os.getpid(), signal.SIGKILL)", 9, "rank 1 was ended by SIGKILL (the system does so"),
        ("if rank == 2: os.kill(os.getpid(), signal.SIGSEGV)", 9, "rank 2 was ended by SIGSEGV"),
        ("if rank == 1: raise ValueError('broken')", 9, "rank 1 failed, its traceback stands above"),
        ("if rank == 1: sys.exit(6)", 6, ""),
        # The loss of another rank is a consequence: whoever died is the cause.
        ("if rank == 0: sys.exit(9)\nif rank == 2: time.sleep(0.3); os.kill(os.getpid(), 9)", 9, "rank 2 was ended"),
        ("if rank == 0: sys.exit(9)\nif rank == 2: time.sleep(0.3); sys.exit(4)", 4, ""),
    ],
)
def test_a_rank_that_fails_ends_all(code: str, expected: int, told: str, capfd: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    assert launch(f"{code}\nelse: time.sleep(60)") == expected
    assert time.monotonic() - started < 30
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("simclr: ")]
    assert len(lines) == bool(told)
    assert all(line.startswith(f"simclr: {told}") for line in lines)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_every_rank_once(number: signal.Signals, code: int, tmp_path: Path) -> None:
    rank = f"""
got = []
signal.signal({int(number)}, lambda *_: got.append(1))
open(f'{tmp_path}/{{rank}}.ready', 'w').close()
while not got: time.sleep(0.01)
time.sleep(0.5)  # for one more to come
open(f'{tmp_path}/{{rank}}.got', 'w').write(str(len(got)))
sys.exit({code})
"""
    main = f"import sys; sys.path.insert(0, {TOP!r}); from pipeline.launcher import launch; "
    body = f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{rank}"
    process = subprocess.Popen([sys.executable, "-c", f"{main}sys.exit(launch([sys.executable, '-c', {body!r}], 2))"])
    wait_for([tmp_path / "0.ready", tmp_path / "1.ready"])
    process.send_signal(number)
    assert process.wait(timeout=30) == code
    assert [(tmp_path / f"{rank}.got").read_text() for rank in range(2)] == ["1", "1"]


def test_ranks_end_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    body = (
        f"import os, sys, time\nsys.path.insert(0, {TOP!r})\nfrom pipeline.launcher import read_place\n"
        f"place = read_place(None)\nopen(f'{tmp_path}/{{place.rank}}.part', 'w').write(str(os.getpid()))\n"
        f"os.rename(f'{tmp_path}/{{place.rank}}.part', f'{tmp_path}/{{place.rank}}')\ntime.sleep(60)"
    )
    main = f"import sys; sys.path.insert(0, {TOP!r}); from pipeline.launcher import launch; "
    process = subprocess.Popen([sys.executable, "-c", f"{main}launch([sys.executable, '-c', {body!r}], 2)"])
    files = [tmp_path / "0", tmp_path / "1"]
    wait_for(files)
    process.kill()
    process.wait()
    until = time.monotonic() + 30
    while any(alive(int(path.read_text())) for path in files):
        assert time.monotonic() < until, "a rank outlived its launcher"
        time.sleep(0.05)


def wait_for(files: list[Path]) -> None:
    until = time.monotonic() + 60
    while not all(path.exists() for path in files):
        assert time.monotonic() < until
        time.sleep(0.02)


def alive(process: int) -> bool:
    """Whether a process runs: neither gone nor waiting to be collected."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
