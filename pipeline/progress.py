"""Lines and bars for the user, on stderr: bars on a terminal, plain lines elsewhere."""

import sys
import time
from typing import TYPE_CHECKING, Self

from pipeline.resources import suppress_full_disk
from pipeline.terminal import console, print_styled

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress


class Reporter:
    """Says what a step does, and keeps what it said for the record.

    Args:
        prefix: name of the step, at the head of every line.
        quiet: say nothing (another rank than the first), but keep it.
    """

    def __init__(self, prefix: str, *, quiet: bool = False):
        self.prefix = prefix
        self.messages: list[str] = []
        self.quiet = quiet

    def line(self, text: str) -> None:
        """One line that is not kept."""
        self._print(text)

    def say(self, text: str) -> None:
        """One line that is kept."""
        self.messages.append(text)
        self.line(text)

    def warn(self, text: str) -> None:
        """A line that asks for attention, and is kept as such."""
        self.messages.append(f"warning: {text}")
        self._print(("warning:", "yellow"), f" {text}")

    def _print(self, *parts: str | tuple[str, str]) -> None:
        if self.quiet:
            return
        with suppress_full_disk():  # stderr may be a file
            print_styled((self.prefix, "bold"), " ", *parts, stderr=True)


class Progress:
    """Progress of a countable piece of work.

    Args:
        total: units of work in all.
        unit: their name in the plural, `images`.
        done: units that an earlier attempt did.
        every_seconds: between two plain lines (a bar redraws itself).
    """

    def __init__(self, reporter: Reporter, total: int, unit: str, done: int = 0, every_seconds: float = 10.0):
        self._reporter = reporter
        self._total, self._unit, self._done, self._first = total, unit, done, done
        self._every_seconds = every_seconds
        self._bar = None
        if sys.stderr.isatty() and not reporter.quiet:
            self._bar = _bar()

    def __enter__(self) -> Self:
        self._started = self._said = time.monotonic()
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task(self._reporter.prefix, total=self._total, completed=self._done, note="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count units that are done; `note` (loss, images/s) stands beside the count."""
        self._done += count
        if self._bar:
            self._bar.update(self._task, completed=self._done, note=note)
            return
        now = time.monotonic()
        if now - self._said >= self._every_seconds:
            self._said = now
            rate = (self._done - self._first) / max(now - self._started, 1e-9)
            left = _duration((self._total - self._done) / rate) if rate else "?"
            middle = f"{note}, " if note else ""
            self._reporter.line(f"{self._done:,}/{self._total:,} {self._unit}, {middle}{left} left")


def _bar() -> "RichProgress":
    from rich import progress  # noqa: PLC0415 - many commands have no bars, and need not wait for them

    return progress.Progress(
        progress.TextColumn("[bold]{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[note]}"),
        progress.TimeRemainingColumn(),
        console=console(stderr=True),
        transient=True,
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
