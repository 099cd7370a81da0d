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
for _ in range(2):  # 64 MiB: more than glibc keeps by itself
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
FAULTS = 5 * 2**26 // 4096
"""Of first touches, where each of the buffers is new memory."""


def faults(how: str) -> int:
    environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "0"}  # huge pages would hide what is counted
    command = [sys.executable, "-c", TOUCH, how]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


def test_a_buffer_that_was_freed_is_used_again_and_not_asked_for_anew() -> None:
    kept = faults("keeps")
    if platform.libc_ver()[0] == "glibc":  # elsewhere nothing is changed, and nothing may fail
        assert kept < FAULTS / 20
        assert faults("plain") > FAULTS / 2
