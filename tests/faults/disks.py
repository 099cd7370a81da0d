"""Disks that are small enough to be filled."""

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

PAGE = 4096
LOG_BYTES = 1 << 16
"""Room that a process has at least where files are limited, rather than the disk: what it says goes to a file too."""


class SmallDisk:
    """A file system of a few MiB in memory, which is really full when it is; a context manager.

    Where mounting is not allowed, files are limited in size instead, which fails a write halfway alike, though with
    another number (EFBIG), and one file after another.

    Attributes:
        folder: on it.
        is_mounted: whether it is a file system.
    """

    def __init__(self, folder: Path, size_bytes: int = 16 << 20, *, may_mount: bool = True):
        self.folder = folder / "disk"
        self.folder.mkdir()
        options = f"size={size_bytes},mode=700"
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        self.is_mounted = may_mount and subprocess.run(words, capture_output=True, check=False).returncode == 0
        self._limited: list[tuple[int, tuple[int, int]]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()
        if self.is_mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)

    @contextmanager
    def room(self, size_bytes: int, pid: int = 0) -> Iterator[None]:
        """Leave no more room than this inside: to all, by the page; or to each file of a process.

        Args:
            pid: of a process that writes there, 0 for this one.
        """
        self.take(size_bytes, pid)
        try:
            yield
        finally:
            self.give_back()

    def take(self, size_bytes: int = 0, pid: int = 0) -> None:
        """Leave no more room than this from now on."""
        if not self.is_mounted:
            limit = max(size_bytes, LOG_BYTES if pid else 0)
            before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            self._limited.append((pid, before))
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, before[1]))
            return
        with (self.folder / ".filler").open("wb") as file:
            filled = self.free_bytes() - size_bytes // PAGE * PAGE
            if filled > 0:
                os.posix_fallocate(file.fileno(), 0, filled)

    def give_back(self) -> None:
        """There is room again."""
        (self.folder / ".filler").unlink(missing_ok=True)
        while self._limited:
            pid, before = self._limited.pop()
            resource.prlimit(pid, resource.RLIMIT_FSIZE, before)

    def free_bytes(self) -> int:
        """What nothing lies on."""
        status = os.statvfs(self.folder)
        return status.f_bavail * status.f_frsize
