"""The files in a tar from elsewhere: where their bytes lie. Whatever is more than a plain list of files is refused."""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stages.sources.candidates import SourceError

PICKLES = frozenset({"pyd", "pickle", "pkl", "pth", "pt"})
"""Endings of members that webdataset and others read by unpickling them, which runs what is in them."""

KINDS = {
    tarfile.SYMTYPE: "a link",
    tarfile.LNKTYPE: "a link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file in a tar: where its bytes lie."""

    path: str
    offset: int
    size_bytes: int

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.size_bytes)
        if len(content) != self.size_bytes:
            raise OSError(f"the tar ends within it ({os.path.basename(self.path)})")
        return content


def list_members(path: Path) -> Iterator[tuple[str, TarMember]]:
    """Name and place of every file in a tar, in its order; folders are passed over. Nothing is unpacked.

    tarfile takes a header that it cannot read for the end; so where it stops is held against the file.

    Raises:
        SourceError: it is no tar, cut off or damaged; or a member is no plain file (a link, a device, a pipe, sparse),
            lies outside the tar by its name (`../`, `/`) or by its size, or is a pickle by its ending.
    """
    size_bytes = path.stat().st_size if path.is_file() else 0
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # or they stay in memory, all of them  # pyrefly: ignore
                if member.isdir():
                    continue
                _check(path, member, size_bytes)
                yield member.name, TarMember(os.path.abspath(path), member.offset_data, member.size)
            end = tar.offset
        _check_end(path, end)
    except SourceError:
        raise
    except (OSError, tarfile.TarError, ValueError, RecursionError, MemoryError) as error:
        # The last three: of headers whose numbers are none, that follow one another without a file, or that claim
        # to be longer than memory.
        reason = str(error) or type(error).__name__
        hint = " (a compressed tar has to be unpacked first)" if _is_compressed(path) else ""
        raise SourceError(f"{path} cannot be read as a tar: {reason}{hint or ': fetch it again'}") from error


def _check(path: Path, member: tarfile.TarInfo, size_bytes: int) -> None:
    """Raise SourceError for a member that is no plain file inside the tar."""
    place = f"{path}: member {member.name!r}"
    if "\0" in member.name or member.name.startswith("/") or ".." in member.name.split("/"):
        raise SourceError(f"{place} has a name that leads out of the tar: make the tar again, with relative names")
    if not member.isreg() or member.issparse():
        kind = KINDS.get(member.type, "no plain file") if not member.issparse() else "a sparse file"
        raise SourceError(f"{place} is {kind}: make the tar again, with plain files alone (tar --dereference)")
    if not 0 <= member.size <= size_bytes - member.offset_data:
        raise SourceError(
            f"{path} is cut off or damaged: member {member.name!r} has {member.size:,} bytes by its header, and the "
            "tar ends before: fetch it again"
        )
    ending = member.name.rpartition(".")[2].lower()
    if ending in PICKLES:
        raise SourceError(
            f"{place} is a pickle by its ending (.{ending}), which runs what is in it when others read it: make the "
            "tar again without such members"
        )


def _check_end(path: Path, end: int) -> None:
    """Raise where something other than zeros lies behind the last member, or nothing at all."""
    with path.open("rb") as file:
        file.seek(end)
        rest = file.read(tarfile.BLOCKSIZE)
        if len(rest) < tarfile.BLOCKSIZE:
            raise SourceError(f"{path} is cut off after {path.stat().st_size:,} bytes: fetch it again")
        while rest:
            if rest.count(0) != len(rest):
                raise SourceError(f"{path} is damaged, or several tars in one, from byte {end:,} on: fetch it again")
            rest = file.read(2**20)


def _is_compressed(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
    except OSError:
        return False
