"""The command line as a user meets it: answers, exit codes, and that the quick commands stay quick."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import toy_stages

from pipeline import cli

RECIPE = """
name: toy
steps:
  numbers: {{stage: numbers, source: "folder:{source}"}}
  train: {{stage: train, numbers: numbers}}
  table: {{stage: table, of: [train]}}
"""


class Terminal:
    """Calls the command line in this process, on stages that take no time."""

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str]):
        self.folder, self.capture = folder, capture

    def __call__(self, *arguments: str) -> int:
        self.code = cli.guarded(lambda: cli.app([*arguments], standalone_mode=False))
        self.out, self.err = self.capture.readouterr()
        return self.code

    def json(self, *arguments: str):
        self(*arguments, "--json")
        return json.loads(self.out)


@pytest.fixture
def simclr(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Terminal:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.txt").write_text("0.1 0.2 0.3")
    (tmp_path / "toy.yaml").write_text(RECIPE.format(source=tmp_path / "source"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "STAGES", toy_stages.STAGES)
    return Terminal(tmp_path, capsys)


def test_run_ends_with_the_table_and_the_page(simclr: Terminal) -> None:
    assert simclr("run", "toy.yaml") == 0
    assert "digest" in simclr.out
    assert simclr.out.strip().splitlines()[-1].endswith("table.html")
    assert "numbers run (first run)" in simclr.err
    assert simclr("run", "toy.yaml") == 0
    assert simclr.err.splitlines() == ["numbers up to date", "train up to date", "table up to date"]
    assert "digest" in simclr.out


def test_status_tells_what_is_stale_and_why(simclr: Terminal) -> None:
    assert simclr("status", "toy.yaml") == 3
    simclr("run", "toy.yaml")
    assert simclr("status", "toy.yaml") == 0
    assert "looked at" in simclr.out
    assert simclr("status", "toy.yaml", "--why", "--set", "train.steps=9") == 3
    assert "steps 20 -> 9" in simclr.out
    states = {one["step"]: one["state"] for one in simclr.json("status", "toy.yaml", "--set", "train.steps=9")}
    assert states == {"numbers": "up to date", "train": "run", "table": "waits"}


def test_dry_run_runs_nothing(simclr: Terminal) -> None:
    assert simclr("run", "toy.yaml", "--dry-run") == 0
    assert "nothing was run" in simclr.out
    assert not (simclr.folder / "artifacts" / "builds").exists()
    plan = simclr.json("run", "toy.yaml", "--dry-run")
    assert all(one["disk_bytes"] > 0 and one["memory_bytes"] > 0 for one in plan)


def test_what_the_store_holds(simclr: Terminal) -> None:
    simclr("run", "toy.yaml")
    simclr("run", "toy.yaml", "--set", "train.steps=9")
    assert [one["reference"] for one in simclr.json("ls")] == [
        "toy/numbers@v1", "toy/table@v1", "toy/table@v2", "toy/train@v1", "toy/train@v2",
    ]  # fmt: skip
    shown = simclr.json("show", "train@v2")
    assert (shown["settings"]["steps"], shown["labels"]) == (9, ["latest"])
    assert [one["step"] for one in simclr.json("log", "table@v1")] == ["numbers", "train", "table"]
    assert simclr.json("diff", "table@v1", "table@v2")["train"][0] == "steps 20 -> 9"
    assert simclr("tag", "train@v1", "best") == 0
    assert simclr.json("show", "train@best")["settings"]["steps"] == 20
    for command in (["ls"], ["show", "train"], ["log", "table"], ["diff", "table@v1", "table@v2"], ["verify"]):
        assert simclr(*command) == 0, command
        assert simclr.out


def test_verify_names_a_changed_file(simclr: Terminal) -> None:
    simclr("run", "toy.yaml")
    files = Path(simclr.json("show", "numbers")["files"])
    (files / "numbers.json").write_text("[1]")
    assert simclr("verify") == 4
    assert "toy/numbers@v1: numbers.json has 3 bytes instead of" in simclr.out
    assert "2 of 3 artifacts are whole" in simclr.out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "toy.yaml", "--set", "train.step=3"], 2, "train.step: no such setting (did you mean steps?)"),
        (["run", "nothing.yaml"], 2, "nothing.yaml: no such recipe; shipped are"),
        (["run", "toy.yaml", "nothing"], 2, "nothing: no such step; toy has numbers, train, table"),
        (["run", "toy.yaml", "--set", "numbers.source=folder:gone"], 2, "folder:gone: no such folder"),
        (["run", "toy.yaml", "--set", "numbers.source=folder:."], 2, "no files here ending in .txt"),
        (["run"], 2, "Missing argument 'RECIPE'"),
        (["frobnicate"], 2, "No such command 'frobnicate'"),
        (["show", "nothing"], 2, "nothing: no artifact of that name"),
        (["run", "toy.yaml", "--set", "train.stop_at=3"], 143, "interrupted; the same command resumes"),
        (["run", "toy.yaml", "--set", "train.learning_rate=1e30"], 8, "loss became"),
    ],
)
def test_errors_are_one_message_and_an_exit_code(
    simclr: Terminal, arguments: list[str], code: int, message: str
) -> None:
    if "numbers.source=folder:." in arguments:
        (simclr.folder / "source" / "a.txt").unlink()
    assert simclr(*arguments) == code
    assert message in simclr.err
    assert "Traceback" not in simclr.err


def test_the_schema_is_of_every_stage(simclr: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = simclr.json("schema")
    assert set(schema["$defs"]) >= {"step_numbers", "step_train", "step_table"}
    assert schema["$defs"]["step_train"]["properties"]["steps"]["description"] == "of training"
    assert schema["$defs"]["step_train"]["required"] == ["stage", "numbers"]
    assert simclr("schema", "--out", "schema.json") == 0
    assert json.loads((simclr.folder / "schema.json").read_text()) == schema


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


QUICK = [["--help"], ["run", "--help"], ["status", "digits"], ["ls"], ["schema"]]


@pytest.mark.parametrize("arguments", QUICK, ids=" ".join)
def test_quick_commands_import_no_torch(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from pipeline import cli; "
        f"cli.guarded(lambda: cli.app({[*arguments, *(['--store', str(tmp_path)] if 'ls' in arguments else [])]!r}, "
        "standalone_mode=False)); "
        "sys.exit(','.join(sorted({'torch', 'numpy', 'pyarrow', 'matplotlib', 'accelerate'} & set(sys.modules))))"
    )
    assert python("-c", code).stderr.strip() == ""


@pytest.mark.alone
@pytest.mark.parametrize("arguments", QUICK[:3], ids=" ".join)
def test_quick_commands_answer_within_half_a_second(arguments: list[str]) -> None:
    """Of processor time, the least of five, so that the test means the same on a busy machine."""
    simclr = str(Path(sys.executable).with_name("simclr"))
    seconds = []
    for _ in range(5):
        child = subprocess.Popen(
            [simclr, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"SIMCLR_STORE": "none"},
        )
        _, _, usage = os.wait4(child.pid, 0)
        child.returncode = 0  # it has been waited for
        seconds.append(usage.ru_utime + usage.ru_stime)
    assert min(seconds) < 0.5, f"the quickest of five took {min(seconds):.2f} s"


def test_every_command_has_help_with_an_example_and_json() -> None:
    for command in ("run", "status", "ls", "show", "log", "diff", "tag", "verify", "gc", "embed", "export", "schema"):
        text = python("-m", "pipeline.cli", command, "--help").stdout
        assert "Example: simclr" in text, command
        assert "--json" in text, command


def test_a_full_disk_is_told_once_by_whom_and_with_a_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    def write() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "artifacts/x")

    assert cli.guarded(write) == 7
    told = capsys.readouterr().err
    assert told.startswith("simclr: the disk is full at artifacts/x (No space left on device): free some space")
    assert "`simclr gc`" in told
