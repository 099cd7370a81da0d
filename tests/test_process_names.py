"""Names of processes: which of them may be there still."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from stores import NAME_ITSELF

from pipeline import processes
from pipeline.processes import is_of_this_machine, may_be_alive, process_in_words, process_of, this_process


def test_a_process_that_has_ended_and_was_not_waited_for_is_dead() -> None:
    with subprocess.Popen([sys.executable, "-c", NAME_ITSELF], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        name_of_child = child.stdout.read().strip()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not may_be_alive(name_of_child)
    assert not may_be_alive(name_of_child)
    assert may_be_alive(this_process())


def test_longer_names_are_those_of_the_process() -> None:
    name = this_process()
    for more in ("", "-0123", "-4", "-0123.json", "-step-000000004"):
        assert process_of(name + more) == name
        assert is_of_this_machine(name + more)
        assert may_be_alive(name + more)
    host, words = socket.gethostname(), process_in_words(name)
    assert words == f"{''.join(one if one.isalnum() else '_' for one in host)} process {os.getpid()}"


@pytest.mark.parametrize(
    "name", ["", "x", ".DS_Store", "a-b-c", "a-1", "-1-2", "a-1-2x", f"a-{'9' * 5000}-1", "a-1-2\n"]
)
def test_what_names_no_process_may_be_anything(name: str) -> None:
    assert process_of(name) is None
    assert not is_of_this_machine(name)
    assert may_be_alive(name)


@pytest.mark.parametrize("part", ["_boot", "_namespace"])
def test_another_boot_or_namespace_of_the_same_host_is_another_machine(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers may have the name of their host, and their numbers mean other processes."""
    child = subprocess.run([sys.executable, "-c", NAME_ITSELF], capture_output=True, text=True, check=True)
    assert not may_be_alive(child.stdout.strip())
    monkeypatch.setattr(processes, part, lambda: "another")
    processes._machine.cache_clear()
    try:
        assert not is_of_this_machine(child.stdout.strip())
        assert may_be_alive(child.stdout.strip())
        assert is_of_this_machine(this_process())
    finally:
        processes._machine.cache_clear()


def test_a_process_of_a_container_is_not_known_here() -> None:
    """It has a namespace of its own, where this machine allows that; elsewhere it is one more process."""
    words = ["unshare", "--pid", "--fork", "--mount-proc"]
    allowed = (
        shutil.which("unshare") is not None and subprocess.run([*words, "true"], capture_output=True).returncode == 0
    )
    command = [*(words if allowed else []), sys.executable, "-c", NAME_ITSELF]
    name = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert is_of_this_machine(name) != allowed
    assert may_be_alive(name) == allowed
    assert process_of(name) == name
    assert Path("/proc/self/ns/pid").exists() or not allowed
