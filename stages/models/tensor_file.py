"""Tensors in a file, as safetensors: nothing in it is run, and its header says each thing once."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

LARGEST_HEADER = 8 * 2**20
"""In bytes; that of a model with ten thousand tensors has one."""
LENGTH_BYTES = 8
FIELDS = {"dtype", "shape", "data_offsets"}
METADATA = "__metadata__"


class DamagedTensors(ValueError):
    """A file is no safetensors, or says what no program that writes it would say."""

    exit_code = 4


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, by name.

    The library checks that tensors lie in the file, side by side, none over another. A name that stands twice it takes
    silently, as other readers may take another way; such a header is refused here, as is one of many megabytes.

    Raises:
        DamagedTensors: says what is wrong with it.
    """
    try:
        _check_header(path)
        return load_file(path)
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise DamagedTensors(str(error)) from error


def _check_header(path: Path) -> None:
    """Raise ValueError for a header that is too long, no JSON, or has a name twice or a field that means nothing."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if length > LARGEST_HEADER:
            raise ValueError(f"its header has {length:,} bytes by its first numbers: it is no safetensors")
        header = json.loads(file.read(length), object_pairs_hook=_once)
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    for name, entry in header.items():
        if name != METADATA and (not isinstance(entry, dict) or entry.keys() != FIELDS):
            raise ValueError(f"its header says other things of {name!r} than {', '.join(sorted(FIELDS))}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice in its header")
    return found
