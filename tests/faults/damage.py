"""What happens to files on their way through disks and networks."""

import random
from collections.abc import Callable
from pathlib import Path


def cut(path: Path, draw: random.Random) -> str:
    """Cut a file off at a random place; says where."""
    size = draw.randrange(path.stat().st_size)
    with path.open("r+b") as file:
        file.truncate(size)
    return f"{path.name} cut to {size} bytes"


def flip(path: Path, draw: random.Random) -> str:
    """Flip one bit at a random place; says which."""
    return flip_bit(path, draw.randrange(8 * path.stat().st_size))


def flip_bit(path: Path, number: int) -> str:
    """Flip the bit of that number; says which."""
    content = bytearray(path.read_bytes())
    content[number // 8] ^= 1 << number % 8
    path.write_bytes(content)
    return f"{path.name} with bit {number % 8} of byte {number // 8} flipped"


def remove(path: Path, _draw: random.Random) -> str:
    """Delete a file; says which."""
    path.unlink()
    return f"{path.name} missing"


DAMAGES: dict[str, Callable[[Path, random.Random], str]] = {"truncated": cut, "bit flipped": flip, "missing": remove}
"""By the words of the table."""
