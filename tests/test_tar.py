import io
import string
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset.writer import TarWriter

from stages.images.tar import BLOCK, member, padded, tar_size

names = st.text(string.ascii_letters + string.digits + "-_", min_size=1, max_size=45)
# The writer passes over contents whose name starts with an underscore.
fields = st.dictionaries(names.filter(lambda name: name[0] != "_"), st.binary(max_size=3000), min_size=1, max_size=4)


@given(st.dictionaries(names, fields, max_size=5))
def test_bytes_are_those_of_webdatasets_writer(samples: dict[str, dict[str, bytes]]):
    theirs = io.BytesIO()
    ours = b""
    with TarWriter(theirs, encoder=False, compress=False, mtime=0) as writer:
        for key, contents in samples.items():
            writer.write({"__key__": key} | contents)
            ours += b"".join(member(f"{key}.{name}", contents[name]) for name in sorted(contents))
    assert theirs.getvalue() == ours.ljust(tar_size(len(ours)), b"\0")


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 8**6, 10_000_000])
def test_headers_of_all_sizes_are_those_of_tarfile(size: int):
    content = bytes(size)
    info = tarfile.TarInfo("000000007.png")
    info.size, info.mode, info.uname, info.gname = size, 0o444, "bigdata", "bigdata"
    whole = member("000000007.png", content)
    assert whole[:BLOCK] == info.tobuf(tarfile.USTAR_FORMAT)
    assert len(whole) == BLOCK + padded(size)


@given(st.lists(st.integers(0, 30_000), max_size=4))
def test_sizes_are_those_of_tarfile(sizes: list[int]):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, size in enumerate(sizes):
            info = tarfile.TarInfo(str(number))
            info.size = size
            tar.addfile(info, io.BytesIO(bytes(size)))
    end = sum(BLOCK + padded(size) for size in sizes)
    assert tar_size(end) == len(file.getvalue())


def test_names_that_a_header_does_not_hold_are_refused():
    assert member("n" * 100, b"")[:100] == b"n" * 100
    with pytest.raises(AssertionError, match="too long"):
        member("n" * 101, b"")
