"""Files that try to run something, to be read where nobody may read, or to be taken for something else."""

import io
import json
import os
import pickle
import struct
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

BLOCK = tarfile.BLOCKSIZE


class Payload:
    """What makes a file beside, when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch '{self.canary}'",)


def pickled(canary: Path) -> bytes:
    return pickle.dumps(Payload(canary))


def torch_saved(canary: Path) -> bytes:
    """As torch.save writes it: a zip with a pickle inside."""
    file = io.BytesIO()
    torch.save({"weight": Payload(canary)}, file)
    return file.getvalue()


def torch_saved_before(canary: Path) -> bytes:
    """As torch.save wrote it before 1.6: pickles one after another."""
    file = io.BytesIO()
    torch.save({"weight": Payload(canary)}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def npy_of_objects(canary: Path) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Payload(canary)], dtype=object), allow_pickle=True)
    return file.getvalue()


def npz_of_objects(canary: Path) -> bytes:
    file = io.BytesIO()
    np.savez(file, images=np.array([Payload(canary)], dtype=object))
    return file.getvalue()


def png(shade: int = 0, size: int = 8) -> bytes:
    pixels = np.random.default_rng(shade).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


# safetensors


def safetensors(header: Mapping[str, Any] | bytes, data: bytes, length: int | None = None) -> bytes:
    """A file with this header, whose length may be told otherwise."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, **more: Any) -> dict[str, Any]:
    """Of a header: float32 numbers that lie there."""
    return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end], **more}


def doubled(content: bytes) -> bytes:
    """The same safetensors, with the first name of its header standing there twice."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    name = next(one for one in header if one != "__metadata__")
    first = f"{{{json.dumps(name)}:{json.dumps(header[name])},".encode()
    return safetensors(first + json.dumps(header)[1:].encode(), content[8 + length :])


def with_field(content: bytes) -> bytes:
    """The same safetensors, with a field that means nothing."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    next(value for name, value in header.items() if name != "__metadata__")["import"] = "os.system"
    return safetensors(header, content[8 + length :])


# Tars


def member(
    name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "", size: int | None = None
) -> bytes:
    """A member of a tar, whose size may be told otherwise (also below 0, in the base 256 of GNU)."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(content)
    info.devmajor, info.devminor = 1, 3
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    if size is not None:
        header[124:136] = (b"\x80" if size >= 0 else b"\xff") + (size & (2**88 - 1)).to_bytes(11, "big")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content + bytes(-len(content) % BLOCK)


def pax(values: Mapping[str, str]) -> bytes:
    """A header of POSIX.1-2001, which says more of the member after it."""
    records = b""
    for name, value in values.items():
        body = f" {name}={value}\n".encode()
        length = len(body)
        while length != len(str(length)) + len(body):
            length = len(str(length)) + len(body)
        records += str(length).encode() + body
    return member("pax", records, tarfile.XHDTYPE)


def tar(*members: bytes) -> bytes:
    return b"".join(members) + bytes(2 * BLOCK)


# Parquet


def parquet_of_paths(path: Path, images: list[str]) -> None:
    pq.write_table(pa.table({"path": images, "label": ["a"] * len(images)}), path)


def parquet_with_pickled_type(path: Path, canary: Path) -> None:
    """A column of an extension type as pyarrow once wrote those of Python: their class pickled (CVE-2023-47248)."""
    metadata = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Payload(canary), protocol=0).decode("latin1"),
    }
    field = pa.field("image", pa.int32(), metadata=metadata)
    pq.write_table(pa.table([pa.array([1], pa.int32())], schema=pa.schema([field])), path)
