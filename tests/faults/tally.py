"""How many trials of each kind there were, and how many held: what docs/reliability.md is made of."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Count:
    """Trials of one kind, by one subject.

    Attributes:
        row: which kind of fault or input, a key of `page.ROWS`.
        subject: `simclr`, or whom it is compared with: `accelerate`, `webdataset`, `torch.load`.
        tried: trials.
        held: of those, how many went as promised.
        note: what else was measured, in a few words.
    """

    row: str
    subject: str
    tried: int
    held: int
    note: str = ""


class Tally:
    """Collects counts in a file of JSON lines, if there is one; several processes may append."""

    def __init__(self, path: Path | None):
        self._path = path

    def add(self, row: str, *, tried: int, held: int, subject: str = "simclr", note: str = "") -> None:
        """Keep a count. What our own promises are about is asserted as well, by the test that counts."""
        if self._path is None:
            return
        line = json.dumps(asdict(Count(row, subject, tried, held, note))) + "\n"
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


def read_counts(path: Path) -> list[Count]:
    """Counts in the order in which they were added."""
    return [Count(**json.loads(line)) for line in path.read_text().splitlines()]
