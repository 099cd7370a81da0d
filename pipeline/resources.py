"""What it looks like when memory or the disk runs out, whichever library met it.

By names and words: the libraries raise a dozen types, and this is read by commands that load none of them.
"""

import errno
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import NoSpace

FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""No space left, a quota, or the largest size of a file."""
FULL_DISK_WORDS = re.compile(rf"No space left on device|\(os error (?:{'|'.join(map(str, sorted(FULL_DISK)))})\)")
FREE_SPACE = "free some space (`simclr gc` tells what can go)"
NO_MEMORY_WORDS = re.compile(
    r"can't allocate memory|not enough memory|out of memory|cannot allocate memory|ALLOC_FAILED|bad_alloc", re.I
)
NO_MEMORY_TYPES = {"OutOfMemoryError", "BrokenProcessPool"}
"""Of torch; and of a pool of which a process was killed, which is what the system does when memory runs out."""


def is_full_disk(error: BaseException) -> bool:
    """Whether a write failed for want of space. Libraries in other languages wrap the number in words of their own."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL_DISK
    return FULL_DISK_WORDS.search(str(error)) is not None


@contextmanager
def suppress_full_disk() -> Iterator[None]:
    """For what is not needed: a line that tells how things go."""
    try:
        yield
    except Exception as error:  # libraries have types of their own for it
        if not is_full_disk(error):
            raise


def free_bytes(folder: Path) -> int:
    """Of the file system that a folder lies in, or will lie in once it is made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def free_in_words(folder: Path, needed: int) -> str:
    """`1.5 GiB are free, 2.0 GiB are needed (folder)`."""
    return f"{size_in_words(free_bytes(folder))} are free, {size_in_words(needed)} are needed ({folder})"


def size_in_words(size_bytes: float) -> str:
    """`1.5 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the processor or of a device."""
    if isinstance(error, MemoryError) or type(error).__name__ in NO_MEMORY_TYPES:
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and NO_MEMORY_WORDS.search(str(error)) is not None


def exhausted(error: BaseException, where: str = "", lower: Sequence[str] = ()) -> NoSpace | None:
    """The one line for the user where memory or disk ran out; None for any other error.

    Args:
        where: the step or command at work, for the message, if that is known.
        lower: the settings or options that need less memory when they are lowered.
    """
    if isinstance(getattr(error, "exit_code", None), int):
        return None  # it has its words already
    begin = f"{where}: " if where else ""
    if is_full_disk(error):
        place = f" at {error.filename}" if isinstance(error, OSError) and error.filename else ""
        reason = (error.strerror if isinstance(error, OSError) else None) or "no space left"
        return NoSpace(
            f"{begin}the disk is full{place} ({reason}): {FREE_SPACE} and give the same command again; what was "
            "finished is kept"
        )
    if is_out_of_memory(error):
        mend = f"lower {' or '.join(lower)}" if lower else "end other programs, or take a machine with more"
        what = "memory is exhausted"
        if type(error).__name__ == "BrokenProcessPool":
            what = "one of its processes was killed, as the system does where memory is exhausted"
        return NoSpace(f"{begin}{what}: {mend}, and give the command again; what was finished is kept")
    return None
