"""Plain tar files (POSIX ustar), byte for byte as webdataset's TarWriter writes them with a fixed time.

TarWriter goes through `tarfile`, which spends four times as long on a small image's headers as on decoding it. Here a
header is a template in which name, size and checksum are filled in.
"""

import tarfile

BLOCK = 512
RECORD = 20 * BLOCK

OWNER, MODE = "bigdata", 0o444
"""What TarWriter writes of every member (webdataset 1.0, writer.py)."""

# Where a header has what differs from member to member (POSIX.1-1988, ustar): name, size and checksum.
NAME_BYTES = 100
SIZE_AT, SIZE_DIGITS = 124, 11
CHECKSUM_AT, CHECKSUM_BYTES = 148, 8


def _template() -> bytes:
    """The header of a member without name and content."""
    member = tarfile.TarInfo()
    member.mode, member.uname, member.gname = MODE, OWNER, OWNER
    return member.tobuf(tarfile.USTAR_FORMAT)


_TEMPLATE = _template()
_BEFORE_SIZE = _TEMPLATE[NAME_BYTES:SIZE_AT]
_AFTER_SIZE = _TEMPLATE[SIZE_AT + SIZE_DIGITS : CHECKSUM_AT]
_AFTER_CHECKSUM = _TEMPLATE[CHECKSUM_AT + CHECKSUM_BYTES :]
# A checksum counts itself as spaces.
_SUM = sum(_BEFORE_SIZE) + sum(_AFTER_SIZE) + sum(_AFTER_CHECKSUM) + CHECKSUM_BYTES * ord(" ")


def member(name: str, content: bytes) -> bytes:
    """A member of a tar: its header, its content, and the zeros up to a whole block.

    Args:
        name: ASCII, up to 100 characters.
        content: less than 8 GiB.
    """
    encoded, digits = name.encode("ascii"), b"%011o" % len(content)
    assert len(encoded) <= NAME_BYTES, f"the name {name} is too long for a tar"
    assert len(digits) == SIZE_DIGITS, f"{name} is too large for a tar"
    checksum = b"%06o\0 " % (_SUM + sum(encoded) + sum(digits))
    header = (encoded.ljust(NAME_BYTES, b"\0"), _BEFORE_SIZE, digits, _AFTER_SIZE, checksum, _AFTER_CHECKSUM)
    return b"".join((*header, content, bytes(-len(content) % BLOCK)))


def padded(size: int) -> int:
    """Bytes that a member's content of `size` bytes takes in a tar."""
    return size + -size % BLOCK


def tar_size(end: int) -> int:
    """Bytes of a tar whose members end at `end`: two empty blocks follow, and what fills the record."""
    end += 2 * BLOCK
    return end + -end % RECORD
