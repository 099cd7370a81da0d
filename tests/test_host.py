"""What the command line changes of the process that it runs in."""

import os
import platform
import subprocess
import sys

TOUCH = """
import resource, sys
import torch
from pipeline.host import keep_freed_memory
if sys.argv[1] == "keeps":
    keep_freed_memory()
for _ in range(30):  # 64 MiB: more than glibc keeps by itself; the heap's holes settle after some
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
GIVE_BACK = """
import torch
from pipeline.host import give_freed_memory_back, keep_freed_memory
def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))
keep_freed_memory()
torch.ones(2**10)
before = resident()
large = torch.ones(2**26)
behind = [bytes(200_000)]  # a block above, which is not freed
del large
kept = resident()
give_freed_memory_back()
print(kept - before, resident() - before)
"""
THE_COMMAND = """
import os, sys
from pipeline import cli
assert "torch" not in sys.modules, "the way that threads wait is read when torch is loaded"
sys.argv = ["simclr", "schema", "--out", os.devnull]
try:
    cli.main()
except SystemExit as end:
    assert not end.code, end
assert os.environ["GOMP_SPINCOUNT"] == "3000"
"""
FAULTS = 5 * 2**26 // 4096
"""Of first touches, where each of the buffers is new memory."""


def faults(how: str) -> int:
    environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "0"}  # huge pages would hide what is counted
    return int(python(TOUCH, how, environment=environment))


def python(program: str, *words: str, environment: dict[str, str] | None = None) -> str:
    """What a program of its own prints."""
    command = [sys.executable, "-c", program, *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


def test_a_buffer_that_was_freed_is_used_again_and_not_asked_for_anew() -> None:
    kept = faults("keeps")
    if platform.libc_ver()[0] == "glibc":  # elsewhere nothing is changed, and nothing may fail
        assert kept < FAULTS / 20
        assert faults("plain") > FAULTS / 2


def test_between_steps_it_is_given_back_once() -> None:
    if platform.libc_ver()[0] == "glibc":
        kept, left = map(int, python(GIVE_BACK).split())
        assert kept > 2**28
        assert left < 2**26


PEAK = """
from pipeline.host import forget_peak_memory, peak_memory
large = bytes(2**28)
del large
forget_peak_memory()
before = peak_memory()
half = bytearray(2**27)
half[::4096] = bytes([1]) * len(half[::4096])
print(before, peak_memory())
"""


def test_the_peak_of_memory_is_that_since_it_was_forgotten() -> None:
    if sys.platform == "linux":  # elsewhere it is None, and nothing may fail
        before, after = map(int, python(PEAK).split())
        assert before < 2**28
        assert 2**27 <= after - before < 2**27 + 2**24


def test_the_command_waits_and_keeps_memory_so() -> None:
    plain = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    touch = TOUCH.partition("for _ in range(30)")
    counted = THE_COMMAND + "import resource, torch\n" + "".join(touch[1:])
    printed = python(counted, environment={**plain, "THP_MEM_ALLOC_ENABLE": "0"})
    if platform.libc_ver()[0] == "glibc":
        assert int(printed.splitlines()[-1]) < FAULTS / 20
