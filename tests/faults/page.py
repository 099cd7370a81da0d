"""docs/reliability.md, from the counts of `make test-faults`: `python -m faults.page TALLY PAGE`."""

import importlib.metadata
import platform
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from faults.tally import Count, read_counts

OURS = "simclr"
PEERS = ("accelerate", "webdataset", "torch.load")
LIBRARIES = ("torch", "accelerate", "webdataset", "safetensors", "filelock", "numpy")


@dataclass(frozen=True)
class Row:
    """A kind of fault or input, and what is promised of it.

    Attributes:
        least: trials of ours that the page is about, in all; where kinds are told apart, by how their notes begin.
        peers: others that have to have been tried as well.
    """

    fault: str
    promise: str
    least: int | Mapping[str, int] = 1
    peers: tuple[str, ...] = ()


ROWS = {
    "kill": Row(
        "SIGKILL in any stage",
        "the same command finishes; all files equal those of an uninterrupted run; at most one checkpoint interval of "
        "training is done again",
        {"at every failpoint": 300, "at a random time": 450},
    ),
    "kill-save": Row(
        "SIGKILL while a checkpoint is written, read back, or an older one deleted",
        "what was saved last loads, or what was being saved",
        {"at every failpoint": 46, "at a random time": 50},
        ("accelerate",),
    ),
    "kill-epoch": Row(
        "ten kills within one epoch", "each sample once, in the order of an uninterrupted run", {"epochs with 10": 3}
    ),
    "resume-edges": Row("resume at the first and last step, an epoch's edge, within warm-up", "equal bytes", 14),
    "world-size": Row(
        "1, 2, 4 and 1 processes, with 1, 2, 4 and 2 loader threads, from one resume to the next",
        "the same samples in each global batch; the loss as close as rounding allows; another global batch is another "
        "recipe",
        {"float32": 6, "float64": 6, "another global batch": 1},
    ),
    "checkpoint-damage": Row(
        "checkpoint truncated, with a bit flipped, or with a file missing",
        "found before use; an older one is taken and the steps lost are said; without one exit 5",
        {"truncated": 100, "bit flipped": 100, "missing": 100, "both": 100, "each bit": 1000, "whole runs": 14},
        ("accelerate",),
    ),
    "shard-damage": Row(
        "shard truncated or with a bit flipped",
        "the sample is named when it is read, or none that was returned is another; `verify` names the file",
        {"flipped": 660, "": 1100},
        ("webdataset",),
    ),
    "bad-images": Row(
        "images that are none, or are damaged, huge or unusual",
        "sharding ends; each bad one is listed with its reason; order of the others unchanged; memory bounded",
        {"listed": 12, "unusual": 9, "fuzzed JPEG": 1000, "fuzzed other": 400},
    ),
    "not-finite": Row(
        "NaN or infinity in loss or gradient",
        "all ranks agree; the step leaves no trace; the batch is kept; then back to a checkpoint, then a stop that "
        "names step, rank and cause; no checkpoint ever holds one",
        {"steps passed over": 100, "checkpoints and published": 100, "too many": 4, "a fault that passes": 4},
        ("accelerate",),
    ),
    "disk-full": Row(
        "the disk is full at any byte of a checkpoint",
        "the last checkpoint loads; nothing temporary stays; training goes on and tries again, then says what is free "
        "and needed",
        {"within a checkpoint": 100, "from some place": 25, "training goes on": 10, "training stops": 1},
        ("accelerate",),
    ),
    "processes": Row(
        "several processes at the same step, with and without locks that hold",
        "one build; nobody sees a part of it; the others take it or exit 75",
        {"with leases": 50, "leases made no-ops": 50, "results with other bytes": 20},
    ),
    "overtaken": Row("a process that was suspended past its lease", "it stops within a step; no mixed checkpoint", 18),
    "signals": Row(
        "SIGTERM and SIGINT, once or twice",
        "exit 143 or 130; a checkpoint after the step at hand; the same command ends with equal bytes",
        40,
    ),
    "rank-lost": Row(
        "one of several processes killed or stopped",
        "the others end within 30 s where it was killed, within the timeout and 15 s where it hung; no orphan; it "
        "resumes",
        {"killed": 10, "stopped": 10},
    ),
    "worker-killed": Row(
        "a process that packs or reads killed", "the cause is named; it resumes; no shared memory stays", 18
    ),
    "gc": Row(
        "`simclr gc` beside runs and readers, or killed",
        "every name that is left leads to whole files; no read fails",
        {"rounds beside runs": 200, "rounds beside a training": 20, "killed": 20, "stopped": 2},
    ),
    "hostile": Row(
        "files made to run code, to write elsewhere, or to exhaust memory",
        "refused within a second of processor time, libraries loaded; file and field are named; nothing runs, nothing "
        "is written outside the store",
        150,
        ("webdataset", "torch.load"),
    ),
    "names-as-text": Row(
        "class and file names with HTML and script", "a browser shows the report with them as text", 15
    ),
    "no-network": Row("no network", "the demo runs; nothing tries to be sent", {"the demo": 1}),
}
COSTS = {
    "cost-checkpoint": Row(
        "writing checkpoints at the default cadence, of the time of steps of 512 images (16 of which are measured)",
        "2% of training time",
        10,
    ),
    "cost-hash": Row(
        "sha256 of source files, of what a stage writes and of what it reads, of the stage's time", "2% of a stage", 3
    ),
    "cost-shard-checks": Row(
        "hashes of samples, of the index and of the summary when they are read, of processor time",
        "5% of loading 32-pixel JPEGs, 1% of photographs",
        6,
    ),
    "cost-guard": Row(
        "looking for numbers that are not finite, by itself beside a step without it", "0.5% of training time"
    ),
    "cost-versions": Row(
        "a run that has nothing to do, and `status`, with 1,000 versions in the store",
        "0.5 s of processor time each, the least of five",
        4,
    ),
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
        ValueError: a row is none of ours, or was not tried as often as the page is about, or not with its peers.
    """
    counts = read_counts(tally)
    known = ROWS | COSTS
    for count in counts:
        if count.row not in known:
            raise ValueError(f"{tally}: row {count.row} is none of page.ROWS and page.COSTS")
    for key, row in known.items():
        _require_tried(tally, key, row, counts)
    page.write_text("\n".join(_lines(counts)) + "\n")


def _require_tried(tally: Path, key: str, row: Row, counts: Sequence[Count]) -> None:
    """Raise ValueError where there were fewer trials of a row than all of them."""
    for kind, least in row.least.items() if isinstance(row.least, Mapping) else [("", row.least)]:
        ours = [one for one in counts if (one.row, one.subject) == (key, OURS) and one.note.startswith(kind)]
        tried = sum(one.tried for one in ours)
        if tried < least:
            of = f" {kind!r}" if kind else ""
            raise ValueError(f"{tally}: row {key}: {tried:,} trials{of} of at least {least:,}: run `make test-faults`")
    for peer in row.peers:
        if not any((one.row, one.subject) == (key, peer) and one.tried for one in counts):
            raise ValueError(f"{tally}: row {key}: no trials with {peer}: run `make test-faults`")


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
