"""How this process uses the host's processors and memory, where libraries' defaults are slow for training."""

import ctypes
import os
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""mallopt(3)."""
LARGEST_INT = 2**31 - 1


def sleep_soon() -> None:
    """Threads of a kernel that wait for one another spin for some microseconds, and sleep then.

    Asleep at once, steps of many small kernels (views of 16 pixels, Muon) took 1.6 times as long; spinning for
    milliseconds, which is the default, a busy host takes up to three times as long. Read once, when torch is loaded.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def keep_freed_memory() -> None:
    """Have malloc use freed buffers again, of whatever size, rather than give them back to the system.

    glibc gives buffers above 32 MiB back at once, and the top of its heap as well. Asked for anew, the first touch of
    each 4 KiB is a fault that costs about as much as the arithmetic on them: a thin ResNet's training step takes 1.4
    to 1.5 times as long so (`python -m benchmarks.pretrain`). So a process keeps its largest need, until
    `give_freed_memory_back`. Nothing happens where there is no glibc.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, LARGEST_INT)


def give_freed_memory_back() -> None:
    """Once, all that is free now: between steps of a recipe, of which the next has other needs."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def forget_peak_memory() -> None:
    """From here on `peak_memory` counts. Nothing happens where the system does not say (it is Linux that does)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak becomes what is resident now
    except OSError:
        return


def peak_memory() -> int | None:
    """The most bytes that this process had resident, libraries included; None where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def _glibc() -> ctypes.CDLL | None:
    try:
        name = os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, ValueError, OSError):  # of Windows; of other libraries
        return None
    return ctypes.CDLL(None) if name and name.startswith("glibc") else None
