"""Settings of the stage `shard`."""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import model_validator

from pipeline.settings import LIBRARIES_BYTES, Estimate, Settings, setting
from stages.settings.source import IMAGE_SUFFIXES, SourceSettings

__all__ = ["IMAGE_SUFFIXES", "UNREAD_SUFFIXES", "Shard", "Tile"]

UNREAD_SUFFIXES = frozenset(
    {".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".j2k", ".svg", ".psd", ".exr", ".tga", ".pnm", ".pbm", ".dcm"}
    | {".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".pef"}
)
"""Endings of images that are not read: files that have one are not left out without a warning."""
DECODED_PER_STORED = 12
STORED_PART = 3
"""An image as it is written takes at most this part of its pixels, with few exceptions: JPEG takes a tenth."""
DIGITS = Estimate(1797, disk_bytes=2**20)


class Tile(Settings):
    """How an image larger than a tile is cut into several samples; its key is their group."""

    size: int = setting(..., "height and width of a tile, in pixels", ge=8)
    stride: int | None = setting(None, "pixels from one tile to the next; left out: the size, nothing overlaps", ge=1)

    @model_validator(mode="after")
    def _check(self) -> "Tile":
        if self.stride is not None and self.stride > self.size:
            raise ValueError(f"a stride of {self.stride} would leave out pixels between tiles of {self.size}")
        return self


class Shard(SourceSettings):
    """Pack images into WebDataset tars with an index, splits, classes and counts."""

    stage_version: ClassVar[int] = 4
    lower_for_memory: ClassVar[tuple[str, ...]] = ("workers", "max_megapixels", "max_long_side")

    max_short_side: int = setting(512, "a longer short side is scaled down to this, in pixels", ge=1)
    max_long_side: int = setting(1024, "a longer long side is scaled down to this, in pixels", ge=1)
    jpeg_quality: int = setting(95, "quality of JPEG images that have to be encoded again", ge=1, le=100)
    background: tuple[int, int, int] = setting((255, 255, 255), "RGB under transparent pixels, 0 to 255 each")
    channels: int = setting(
        3,
        "3: RGB; 1: grey (colours become their luma); others: images of just so many channels, alpha being one of them",
        ge=1,
        le=4096,
    )
    window: tuple[float, float] | None = setting(
        None, "[low, high]: values that become 0 and 255 in 16-bit, 32-bit and float images, which need one"
    )
    tile: Tile | None = setting(None, "cut images that are larger into squares, at full size (the caps do not apply)")
    max_megapixels: float = setting(178.95697, "largest image that is decoded; this is Pillow's own limit", gt=0)
    images_per_shard: int = setting(5000, "images that are tried for one tar", ge=1)
    max_rejected: float = setting(0.005, "largest share of unreadable images before the stage fails", ge=0, le=1)
    near_duplicates: bool = setting(True, "look for near-duplicates, within and across splits")
    near_duplicate_distance: float = setting(
        0.15,
        "largest distance of a pair after alignment, 0 (equal) to 1 (unrelated); at the default 1 in 10 is missed, and "
        "1 pair in a million of unrelated images is taken",
        ge=0,
        lt=1,
    )
    workers: int = setting(2, "processes that read and encode images", hashed=False, ge=1)

    @model_validator(mode="after")
    def _check(self) -> "Shard":
        if any(not 0 <= value <= 255 for value in self.background):
            raise ValueError("background has three values from 0 to 255")
        if self.window is not None and not self.window[0] < self.window[1]:
            raise ValueError(f"window: [low, high], the lower value first, not {[*self.window]}")
        return self

    def without_effect(self) -> set[str]:
        idle = super().without_effect() | (set() if self.tile is None else {"max_short_side", "max_long_side"})
        return idle if self.near_duplicates else idle | {"near_duplicate_distance"}

    def estimate(self, inputs: Mapping[str, Estimate]) -> Estimate:
        source = DIGITS if self.source == "sklearn:digits" else inputs["source"]
        # A photograph takes some ten times its JPEG in memory, up to the caps.
        decoded = DECODED_PER_STORED * source.disk_bytes // max(source.samples, 1)
        largest = self.max_short_side * self.max_long_side if self.tile is None else self.tile.size**2
        sample_bytes = min(decoded, self.channels * largest)
        # A copied image keeps its size, and one that is scaled down has less; the tar adds headers, a label, padding.
        stored = source.disk_bytes
        if self.tile is None:
            stored = min(stored, source.samples * sample_bytes // STORED_PART)
        disk_bytes = stored + 2048 * source.samples
        samples = source.samples if self.tile is None else source.samples * max(1, decoded // max(sample_bytes, 1))
        return Estimate(samples, sample_bytes, disk_bytes, self.workers * LIBRARIES_BYTES)
