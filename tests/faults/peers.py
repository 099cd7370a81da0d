"""Gives files to other readers, each in a process of its own: `python -m faults.peers < CASES`, a line of JSON a case.

A case is {"reader", "path"}; what is printed for each is `refused` (an error was raised) or `taken`.
"""

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable

import torch
import webdataset

SECONDS = 20


def by_webdataset(path: str) -> None:
    """As its documentation reads shards."""
    for _ in webdataset.WebDataset(path, shardshuffle=False, empty_check=False).decode():  # type: ignore[attr-defined]
        pass


READERS: dict[str, Callable[[str], object]] = {
    "webdataset": by_webdataset,
    "torch.load": torch.load,
    "torch.load of before": lambda path: torch.load(path, weights_only=False),
}


def try_one(reader: str, path: str) -> str:
    """`refused`, `taken`, or `hung`."""
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        try:
            READERS[reader](path)
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return "hung" if code == -signal.SIGALRM else "taken" if code == 0 else "refused"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for line in sys.stdin:
        case = json.loads(line)
        print(try_one(case["reader"], case["path"]), flush=True)
