"""What every comparison shares: arguments, alternating runs and their medians, peak memory, the table, the JSON line.

A benchmark is a module with a `main()` that measures rows and gives them to `report`. A row is one case (a size, a
setting) with the same work done by ours and by each peer; a contender is a function of no arguments that does the work
once. Runs alternate, because these machines are noisy: what disturbs one contender disturbs its neighbour as well.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pipeline.host import keep_freed_memory, sleep_soon

Work = Callable[[], object]
"""One run of a contender, inputs at hand; what it returns is thrown away."""

TOP = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "kornia", "lightly", "pytorch-metric-learning", "webdataset", "scikit-learn")


@dataclass(frozen=True)
class Row:
    """One case of a comparison.

    Attributes:
        case: what is done, in a few words.
        values: median of each contender, in the benchmark's unit (or in `unit`), `ours` among them.
        settings: of peers that have several ways: the one that was fastest here.
        unit: where it is another than the benchmark's.
    """

    case: str
    values: dict[str, float]
    settings: dict[str, str] = field(default_factory=dict)
    unit: str | None = None


@dataclass
class Comparison:
    """A benchmark's outcome: what `report` prints.

    Attributes:
        name: of the module.
        unit: of the rows' values: `s` (less is better), `views/s`, ...
        headline: case of the row that `ours` and `peers` of the JSON line are taken from.
        ratio: how many times faster, or smaller, ours is, by key.
        limit: of what the hardware allows in the headline's case, in the same unit, where it was measured.
        runs: of each contender in the headline's case, warm-up aside.
        device: `cpu` or an accelerator.
    """

    name: str
    unit: str
    headline: str
    rows: list[Row] = field(default_factory=list)
    ratio: dict[str, float] = field(default_factory=dict)
    limit: float | None = None
    runs: int = 0
    device: str = "cpu"
    notes: list[str] = field(default_factory=list)


def arguments(doc: str | None, *, on_host: bool = False, **options: Any) -> argparse.Namespace:
    """--quick, --data, --device unless all of it runs on the host, and switches (`name="help"`) of its own."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer runs")
    parser.add_argument(
        "--data", type=existing_folder, metavar="DIR", help="folder of images; without it they are found or made"
    )
    if not on_host:
        parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    for name, text in options.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    return parser.parse_args()


def existing_folder(path: str) -> Path:
    """What --data is read by: a misspelt one is an error, and not replaced by made images."""
    folder = Path(path)
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: no such folder")
    return folder


def alternate(
    contenders: Mapping[str, Work], runs: int, *, warm_up: int = 1, device: str = "cpu", most_seconds: float = 600
) -> dict[str, float]:
    """Median seconds of each contender over alternating runs; their spread is told on stderr.

    Args:
        runs: of each.
        warm_up: rounds before that are not counted.
        most_seconds: no new round starts after that many; at least one is counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    started = time.perf_counter()
    for number in range(warm_up + runs):
        if number > warm_up and time.perf_counter() - started > most_seconds:
            break
        for name, work in contenders.items():
            took = seconds_of(work, device)
            if number >= warm_up:
                seconds[name].append(took)
    told = (f"{name} {min(taken):.3g} to {max(taken):.3g}" for name, taken in seconds.items())
    print(f"seconds of {len(next(iter(seconds.values())))} runs: {', '.join(told)}", file=sys.stderr)
    return {name: median(taken) for name, taken in seconds.items()}


def fastest(settings: Mapping[str, Work], device: str = "cpu") -> tuple[str, Work]:
    """A peer's best setting: each is warmed up and run once.

    Returns:
        Its name, and the work.
    """
    taken = {}
    for name, work in settings.items():
        work()
        taken[name] = seconds_of(work, device)
    best = min(taken, key=lambda name: taken[name])
    return best, settings[best]


def seconds_of(work: Work, device: str = "cpu") -> float:
    """Of one run, the device's queue emptied before and after."""
    _synchronise(device)
    before = time.perf_counter()
    work()
    _synchronise(device)
    return time.perf_counter() - before


def peak_bytes(work: Callable[..., object], *given: Any) -> int:
    """What `work(*given)`, a function at a module's top, adds to the resident memory of a fresh process at its peak.

    The function is called twice: the first call, on `warm_up=True`, is to do little and to load what it needs; the
    second is measured. Linux only, where the peak can be reset.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_in_child, (work, given))


def _peak_in_child(work: Callable[..., object], given: tuple[Any, ...]) -> int:
    work(*given, warm_up=True)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak
    work(*given, warm_up=False)
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def in_own_process(work: Callable[..., Any], *given: Any, like_simclr: bool = False) -> Any:
    """What `work(*given)`, a function at a module's top, returns in a fresh interpreter.

    Args:
        like_simclr: the process waits for threads and keeps freed memory as ours do (pipeline/host.py).
    """
    before = dict(os.environ)
    if like_simclr:
        sleep_soon()  # the environment is handed on, and read when torch is loaded
    try:
        with ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=keep_freed_memory if like_simclr else None
        ) as pool:
            return pool.submit(work, *given).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def simclr(*words: object) -> str:
    """Run a command of ours, as `simclr` would; its stdout. What it tells on stderr is seen."""
    command = [sys.executable, "-m", "pipeline.cli", *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=TOP).stdout


def report(comparison: Comparison) -> None:
    """The table to stderr; one line of JSON, the last, to stdout."""
    names = list(dict.fromkeys(name for row in comparison.rows for name in row.values))
    lines = [["", *names]]
    for row in comparison.rows:
        unit = row.unit or comparison.unit
        lines.append(
            [f"{row.case} [{unit}]", *(f"{row.values[name]:,.4g}" if name in row.values else "" for name in names)]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(names) + 1)]
    for line in lines:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        print("  ".join(cells), file=sys.stderr)
    for row in comparison.rows:
        for name, setting in row.settings.items():
            print(f"{row.case}: {name} at its best: {setting}", file=sys.stderr)
    for note in comparison.notes:
        print(note, file=sys.stderr)
    for key, value in comparison.ratio.items():
        print(f"ratio {key}: {value:.3g}", file=sys.stderr)
    headline = next(row for row in comparison.rows if row.case == comparison.headline)
    print(
        json.dumps({
            "name": comparison.name,
            "unit": headline.unit or comparison.unit,
            "ours": headline.values["ours"],
            "peers": {name: value for name, value in headline.values.items() if name != "ours"},
            "ratio": {key: round(value, 4) for key, value in comparison.ratio.items()},
            "limit": comparison.limit,
            "runs": comparison.runs,
            "device": _device(comparison.device),
            "versions": _versions(),
            "commit": commit(),
            "rows": [
                {"case": row.case, "unit": row.unit or comparison.unit, "values": row.values, "settings": row.settings}
                for row in comparison.rows
            ],
            "notes": comparison.notes,
        })
    )  # fmt: skip


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Growth: the slope of log(value) over log(size), least squares."""
    logs = torch.log(torch.tensor([sizes, values], dtype=torch.float64))
    centred = logs - logs.mean(dim=1, keepdim=True)
    return float((centred[0] * centred[1]).sum() / centred[0].square().sum())


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _device(name: str) -> str:
    if name.startswith("cuda"):
        return torch.cuda.get_device_name(name)
    return f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Of the sources that run; None where there is no git."""
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=TOP, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return told.stdout.strip()
