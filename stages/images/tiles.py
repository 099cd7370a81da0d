"""Very large images as tiles."""

from dataclasses import dataclass

Corner = tuple[int, int]
"""Top and left of a tile in its image, in pixels."""


@dataclass(frozen=True)
class Tile:
    """How an image larger than a tile is cut: squares of `size` pixels, one every `stride` pixels."""

    size: int
    stride: int


def tile_corners(height: int, width: int, tile: Tile) -> list[Corner]:
    """Upper left corners of the tiles of an image, row by row: every pixel lies in one, no tile reaches outside.

    Where the image is shorter than a tile, so are its tiles.
    """
    return [(top, left) for top in _starts(height, tile) for left in _starts(width, tile)]


def _starts(length: int, tile: Tile) -> list[int]:
    """0, stride, ... while there is more behind, and a last one that ends where the image ends."""
    last = max(0, length - tile.size)
    return [*range(0, last, tile.stride), last]
