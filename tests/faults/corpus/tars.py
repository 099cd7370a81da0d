"""Hostile tars, by source wds."""

import tarfile
from collections.abc import Callable
from pathlib import Path

from faults import hostile_files as files
from faults.hostile_files import member, pax, png, tar

GOOD = member("good.png", png()) + member("good.cls", b"1")
TARS: dict[str, tuple[Callable[[Path], bytes], tuple[str, ...]]] = {
    "a name above the folder": (
        lambda _: tar(GOOD, member("../../evil.png", png())),
        ("'../../evil.png'", "leads out"),
    ),
    "a name above, further on": (
        lambda _: tar(GOOD, member("a/../../evil.png", png())),
        ("a/../../evil.png", "leads out"),
    ),
    "an absolute name": (lambda _: tar(GOOD, member("/tmp/evil.png", png())), ("'/tmp/evil.png'", "leads out")),
    "a name above in a pax header": (
        lambda _: tar(GOOD, pax({"path": "../evil.png"}), member("a.png", png())),
        ("'../evil.png'", "leads out"),
    ),
    "a link to a file outside": (
        lambda _: tar(GOOD, member("a.png", kind=tarfile.SYMTYPE, link="/etc/passwd")),
        ("'a.png'", "a link"),
    ),
    "a hard link to a file outside": (
        lambda _: tar(GOOD, member("a.png", kind=tarfile.LNKTYPE, link="../../etc/passwd")),
        ("'a.png'", "a link"),
    ),
    "a character device": (lambda _: tar(GOOD, member("a.png", kind=tarfile.CHRTYPE)), ("'a.png'", "a device")),
    "a block device": (lambda _: tar(GOOD, member("a.png", kind=tarfile.BLKTYPE)), ("'a.png'", "a device")),
    "a pipe": (lambda _: tar(GOOD, member("a.png", kind=tarfile.FIFOTYPE)), ("'a.png'", "a pipe")),
    "a kind that nobody knows": (lambda _: tar(GOOD, member("a.png", kind=b"Z")), ("'a.png'", "no plain file")),
    "a sparse file of GNU": (
        lambda _: tar(GOOD, member("a.png", kind=tarfile.GNUTYPE_SPARSE)),
        ("'a.png'", "a sparse file"),
    ),
    "a sparse file of a petabyte in pax": (
        lambda _: tar(GOOD, pax({"GNU.sparse.size": str(2**50), "GNU.sparse.numblocks": "0"}), member("a.png", png())),
        ("'a.png'", "a sparse file"),
    ),
    "sparse numbers that are none": (
        lambda _: tar(GOOD, pax({"GNU.sparse.map": "0,1024,x"}), member("a.png", png())),
        ("cannot be read as a tar", "'x'"),
    ),
    "a size in pax beyond the tar": (
        lambda _: tar(GOOD, pax({"size": str(2**62)}), member("a.png", png())),
        ("'a.png'", "the tar ends before"),
    ),
    "a size in pax below zero": (
        lambda _: tar(GOOD, pax({"size": "-1024"}), member("a.png", png())),
        ("'a.png'", "-1,024 bytes"),
    ),
    "a size below zero, which goes in a circle": (
        lambda _: tar(GOOD, member("a.png", size=-1024)),
        ("'a.png'", "-1,024 bytes"),
    ),
    "a size beyond the tar": (lambda _: tar(GOOD, member("a.png", size=2**62)), ("'a.png'", "the tar ends before")),
    "a pax header longer than memory": (
        lambda _: tar(GOOD, member("pax", kind=tarfile.XHDTYPE, size=2**62)),
        ("cannot be read as a tar", "MemoryError"),
    ),
    "a long name longer than memory": (
        lambda _: tar(GOOD, member("name", kind=tarfile.GNUTYPE_LONGNAME, size=2**62)),
        ("cannot be read as a tar", "MemoryError"),
    ),
    "a pax header of less than nothing": (
        lambda _: tar(GOOD, member("pax", kind=tarfile.XHDTYPE, size=-1024)),
        ("cannot be read as a tar", "non-negative"),
    ),
    "long names within one another": (
        lambda _: tar(GOOD, member("name", b"a.png\0", tarfile.GNUTYPE_LONGNAME) * 3000, member("a.png", png())),
        ("cannot be read as a tar", "recursion"),
    ),
    "a member twice": (lambda _: tar(GOOD, member("good.cls", b"2")), ("'good.cls'", "stands twice")),
    "a key in two places": (
        lambda _: tar(GOOD, member("other.png", png()), member("good.json", b"{}")),
        ("'good.json'", "stands twice"),
    ),
    "a member named .pyd": (
        lambda canary: tar(GOOD, member("good.pyd", files.pickled(canary))),
        ("'good.pyd'", "is a pickle"),
    ),
    "a member named .pickle": (
        lambda canary: tar(GOOD, member("good.pickle", files.pickled(canary))),
        ("'good.pickle'", "is a pickle"),
    ),
    "a member named .pkl": (
        lambda canary: tar(GOOD, member("good.pkl", files.pickled(canary))),
        ("'good.pkl'", "is a pickle"),
    ),
    "a member named .pth": (
        lambda canary: tar(GOOD, member("good.pth", files.torch_saved(canary))),
        ("'good.pth'", "is a pickle"),
    ),
    "a member named .PT": (
        lambda canary: tar(GOOD, member("good.PT", files.torch_saved_before(canary))),
        ("'good.PT'", "is a pickle"),
    ),
    "a second tar behind the end": (
        lambda canary: tar(GOOD) + tar(member("evil.pyd", files.pickled(canary))),
        ("is damaged, or several tars in one",),
    ),
    "a file of torch.save in its place": (files.torch_saved, ("cannot be read as a tar",)),
    "a pickle in its place": (files.pickled, ("cannot be read as a tar",)),
}
