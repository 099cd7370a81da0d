"""Where the time of a training step goes, by its parts: what `simclr run --profile` shows."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

WARM_UP_STEPS = 3
"""Left out: caches fill, libraries choose their kernels."""


class Stopwatch:
    """Seconds by part of a step, added up over steps.

    Args:
        synchronise: waits until the device has done what was asked of it, so that a part's time is its own. It is why
            this is not always on.
    """

    def __init__(self, synchronise: Callable[[], None]):
        self._synchronise = synchronise
        self._seconds: dict[str, float] = {}
        self._steps_begun = 0
        self._started = 0.0
        self._whole = 0.0

    def begin_step(self) -> None:
        """A step begins; where one was before, it has ended."""
        now = self._now()
        if self._steps_begun > WARM_UP_STEPS:
            self._whole += now - self._started
        elif self._steps_begun == WARM_UP_STEPS:
            self._seconds = {}
        self._steps_begun += 1
        self._started = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs inside counts as `name`."""
        before = self._now()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - before

    def in_words(self) -> str:
        """Milliseconds and share of a step by part, the longest first; what no part has is `the rest`."""
        steps = self._steps_begun - WARM_UP_STEPS - 1
        if steps < 1:
            return f"no profile: it takes more than {WARM_UP_STEPS + 1} steps"
        parts = dict(sorted(self._seconds.items(), key=lambda one: -one[1]))
        parts["the rest"] = max(0.0, self._whole - sum(parts.values()))
        shares = ", ".join(
            f"{name} {1000 * seconds / steps:.1f} ms ({seconds / self._whole:.1%})" for name, seconds in parts.items()
        )
        return f"a step took {1000 * self._whole / steps:.1f} ms, mean of {steps:,}: {shares}"

    def _now(self) -> float:
        self._synchronise()
        return time.perf_counter()
