"""Places where tests let the process die: each has a name that is known, and each name a place."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import failpoints
from pipeline.failpoints import POINTS, arm, reach

TOP = Path(__file__).resolve().parent.parent
SOURCES = [path for package in ("pipeline", "stages") for path in (TOP / package).rglob("*.py")]


def test_every_place_is_named_and_every_name_is_a_place() -> None:
    found = {
        ast.literal_eval(node.args[0])
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("reach", "failpoints.reach")
    }
    assert found == {*POINTS}


@pytest.mark.parametrize(
    ("text", "told"),
    [("no.such:1", "no such place"), ("commit.done", "is NAME:ORDINAL"), ("commit.done:0", "is NAME:ORDINAL"),
     ("commit.done:x", "is NAME:ORDINAL"), ("commit.done:1:start", "is NAME:ORDINAL"), (":1", "no such place")],
)  # fmt: skip
def test_what_is_no_place_is_refused_in_one_line(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        arm(text)
    assert "\n" not in str(caught.value)
    assert text in str(caught.value)
    reach("commit.done")  # nothing was armed


def test_disarmed_nothing_happens() -> None:
    arm("commit.done:1")
    arm("")
    reach("commit.done")


@pytest.mark.parametrize(
    ("armed", "said"),
    [("commit.done:2", "commit.done commit.sync "), ("*:2", "commit.done "), ("commit.sync:1", "commit.done ")],
)
def test_the_process_is_killed_when_it_comes_there_so_often(armed: str, said: str) -> None:
    program = (
        "from pipeline.failpoints import reach\n"
        "for name in ('commit.done', 'commit.sync', 'commit.done', 'commit.sync'):\n"
        "    reach(name)\n"
        "    print(name, end=' ', flush=True)\n"
    )
    command = [sys.executable, "-c", program]
    ended = subprocess.run(
        command, env={failpoints.VARIABLE: armed, "PYTHONPATH": str(TOP)}, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout) == (-9, said), ended.stderr
