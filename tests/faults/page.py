"""docs/reliability.md, from the counts of `make test-faults`: `python -m faults.page TALLY PAGE`."""

import importlib.metadata
import platform
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from faults.tally import Count, read_counts

OURS = "simclr"
PEERS = ("accelerate", "webdataset", "torch.load")
LIBRARIES = ("torch", "accelerate", "webdataset", "safetensors", "filelock", "numpy")


@dataclass(frozen=True)
class Row:
    """A kind of fault or input, and what is promised of it."""

    fault: str
    promise: str


ROWS = {
    "kill": Row(
        "SIGKILL in any stage",
        "the same command finishes; all files equal those of an uninterrupted run; at most one checkpoint interval of "
        "training is done again",
    ),
    "kill-save": Row(
        "SIGKILL while a checkpoint is written, read back, or an older one deleted",
        "what was saved last loads, or what was being saved",
    ),
    "kill-epoch": Row("ten kills within one epoch", "each sample once, in the order of an uninterrupted run"),
    "resume-edges": Row("resume at the first and last step, an epoch's edge, within warm-up", "equal bytes"),
    "world-size": Row(
        "other numbers of processes and of loader threads from one resume to the next",
        "the same samples in each global batch; the loss as close as rounding allows; another global batch is another "
        "recipe",
    ),
    "checkpoint-damage": Row(
        "checkpoint truncated, with a bit flipped, or with a file missing",
        "found before use; an older one is taken and the steps lost are said; without one exit 5",
    ),
    "shard-damage": Row(
        "shard truncated or with a bit flipped",
        "the sample is named when it is read, or none that was returned is another; `verify` names the file",
    ),
    "bad-images": Row(
        "images that are none, or are damaged, huge or unusual",
        "sharding ends; each bad one is listed with its reason; order of the others unchanged; memory bounded",
    ),
    "not-finite": Row(
        "NaN or infinity in loss or gradient",
        "all ranks agree; the step leaves no trace; the batch is kept; then back to a checkpoint, then a stop that "
        "names step, rank and cause; no checkpoint ever holds one",
    ),
    "disk-full": Row(
        "the disk is full at any byte of a checkpoint",
        "the last checkpoint loads; nothing temporary stays; training goes on and tries again, then says what is free "
        "and needed",
    ),
    "processes": Row(
        "several processes at the same step, with and without locks that hold",
        "one build; nobody sees a part of it; the others take it or exit 75",
    ),
    "overtaken": Row("a process that was suspended past its lease", "it stops within a step; no mixed checkpoint"),
    "signals": Row(
        "SIGTERM and SIGINT, once or twice",
        "exit 143 or 130; a checkpoint after the step at hand; the same command ends with equal bytes",
    ),
    "rank-lost": Row(
        "one of several processes killed or stopped",
        "the others end within 30 s, or the timeout; no orphan; it resumes",
    ),
    "worker-killed": Row(
        "a process that packs or reads killed", "the cause is named; it resumes; no shared memory stays"
    ),
    "gc": Row(
        "`simclr gc` beside runs and readers, or killed", "every name that is left leads to whole files; no read fails"
    ),
    "hostile": Row(
        "files made to run code, to write elsewhere, or to exhaust memory",
        "refused within a second; file and field are named; nothing runs, nothing is written outside the store",
    ),
    "names-as-text": Row("class and file names with HTML and script", "a browser shows the report with them as text"),
    "no-network": Row("no network", "the demo runs; nothing tries to be sent"),
}
COSTS = {
    "cost-checkpoint": Row("writing checkpoints at the default cadence", "2% of training time"),
    "cost-hash": Row("hashing what is read and written", "2% of a stage"),
    "cost-shard-checks": Row("hashes of samples when they are read", "5% of loading 32-pixel JPEGs, 1% of photographs"),
    "cost-guard": Row("looking for numbers that are not finite", "0.5% of training time"),
    "cost-versions": Row("a run that has nothing to do, and `status`, with 1,000 versions in the store", "0.5 s each"),
}
NOT_COVERED = (
    "Equal bytes on GPUs, or across devices, numbers of processes, threads or versions of libraries: what is promised "
    "there is equal samples in equal order, and numbers that are close.",
    "A machine that loses power: the order of writes, and the calls that ask the disk to keep them, are as they must "
    "be, but SIGKILL cannot show that a disk obeys.",
    "Damage by whoever may write to the store and knows its format: digests tell accidents and strangers' files apart "
    "from ours; they are no signatures.",
    "Network file systems: that locks need not hold there is tried by making locks do nothing, on a local disk.",
    "Training on several machines, and on GPUs: all trials ran on CPU.",
)


def write_page(tally: Path, page: Path) -> None:
    """Write the page.

    Raises:
        ValueError: a row was not tried, or is none of ours.
    """
    counts = read_counts(tally)
    known = ROWS | COSTS
    for count in counts:
        if count.row not in known:
            raise ValueError(f"{tally}: row {count.row} is none of page.ROWS and page.COSTS")
    for row in known:
        if not any(count.row == row and count.subject == OURS and count.tried for count in counts):
            raise ValueError(f"{tally}: row {row} was not tried")
    page.write_text("\n".join(_lines(counts)) + "\n")


def _lines(counts: Sequence[Count]) -> list[str]:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    return [
        "# Reliability",
        "",
        "What happens when machines fail and files lie, counted by tests that make it happen. "
        "`make test-faults` runs all trials (a part of them runs with `make test`) and writes this page.",
        "",
        "Faults are injected into the real command, in a process forked from one that has torch loaded: by a signal, "
        "or at named places of the code, of which `pipeline/failpoints.py` has the list. Trials at random places and "
        "times have a fixed seed. A trial holds if everything in its line's promise was found to be so.",
        "",
        f"With Python {platform.python_version()}, {versions}; on CPU.",
        "",
        "The same was done to what others use in these places: Accelerate's `save_state` and `load_state` with "
        "automatic naming and a limit of two, webdataset's reader, and `torch.load`. Where they promise less than is "
        "asked here, that is no fault of theirs.",
        "",
        "## Faults",
        "",
        "| fault | promised | held, of trials | Accelerate | webdataset, `torch.load` |",
        "| --- | --- | --- | --- | --- |",
        *(_line(row, ROWS[row], counts) for row in ROWS),
        "",
        "## Costs",
        "",
        "| what | at most | measured |",
        "| --- | --- | --- |",
        *(f"| {one.fault} | {one.promise} | {_cell(counts, row, OURS, is_cost=True)} |" for row, one in COSTS.items()),
        "",
        "## What is not covered",
        "",
        *(f"- {line}" for line in NOT_COVERED),
    ]


def _line(key: str, row: Row, counts: Sequence[Count]) -> str:
    accelerate = _cell(counts, key, "accelerate")
    others = [f"{one}: {cell}" for one in ("webdataset", "torch.load") if (cell := _cell(counts, key, one))]
    cells = [row.fault, row.promise, _cell(counts, key, OURS), accelerate, "; ".join(others)]
    return f"| {' | '.join(cells)} |"


def _cell(counts: Sequence[Count], row: str, subject: str, *, is_cost: bool = False) -> str:
    """What was counted of a row and a subject, kind by kind."""
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for count in counts:
        if (count.row, count.subject) == (row, subject):
            sums[count.note][0] += count.held
            sums[count.note][1] += count.tried
    parts = []
    for note, (held, tried) in sums.items():
        words = note.replace("|", "\\|")
        figures = f"{held:,} of {tried:,}"
        parts.append(words or figures if is_cost else f"{figures} {words}".strip())
    return "; ".join(parts)


if __name__ == "__main__":
    try:
        write_page(Path(sys.argv[1]), Path(sys.argv[2]))
    except (ValueError, OSError) as error:
        sys.exit(f"page: {error}")
