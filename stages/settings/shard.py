"""Settings of the stage `shard`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import WithJsonSchema, field_validator, model_validator

from pipeline.settings import LIBRARIES_BYTES, Estimate, ForeignInput, StageSettings, setting

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
)
UNREAD_SUFFIXES = frozenset(
    {".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".j2k", ".svg", ".psd", ".exr", ".tga", ".pnm", ".pbm", ".dcm"}
    | {".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".pef"}
)
"""Endings of images that are not read: files that have one are not left out without a warning."""
DECODED_PER_STORED = 12
DIGITS = Estimate(1797, disk_bytes=2**20)

SOURCE_PATTERN = "^(folder:.+|sklearn:digits)$"
"""For the schema; people get the validator's words."""


class Shard(StageSettings):
    """Pack images into WebDataset tars with an index, splits, classes and counts."""

    stage_version: ClassVar[int] = 3

    source: Annotated[str, WithJsonSchema({"type": "string", "pattern": SOURCE_PATTERN})] = setting(
        ...,
        "`folder:PATH` (class = parent folder; train/ val/ test/ are splits) or `sklearn:digits`",
        hashed=False,  # counts by content: see foreign_inputs
    )
    labels: Literal["folder", "none"] = setting("folder", "class = name of the parent folder, or no labels")
    splits: Literal["given", "drawn"] | None = setting(
        None,
        "given: the top folders train/ val/ test/, all else is left out; drawn: by the fractions; left out: given "
        "where every image lies in such a folder, drawn where none does",
    )
    val_fraction: float = setting(0.0, "share of the images that becomes `val` where splits are drawn", ge=0, lt=1)
    test_fraction: float = setting(0.2, "share of the images that becomes `test` where splits are drawn", ge=0, lt=1)
    max_short_side: int = setting(512, "a longer short side is scaled down to this, in pixels", ge=1)
    max_long_side: int = setting(1024, "a longer long side is scaled down to this, in pixels", ge=1)
    jpeg_quality: int = setting(95, "quality of JPEG images that have to be encoded again", ge=1, le=100)
    background: tuple[int, int, int] = setting((255, 255, 255), "RGB under transparent pixels, 0 to 255 each")
    images_per_shard: int = setting(5000, "images that are tried for one tar", ge=1)
    max_rejected: float = setting(0.005, "largest share of unreadable images before the stage fails", ge=0, le=1)
    workers: int = setting(2, "processes that read and encode images", hashed=False, ge=1)

    @field_validator("source")
    @classmethod
    def _check_source(cls, source: str) -> str:
        kind, _, path = source.partition(":")
        if source != "sklearn:digits" and (kind != "folder" or not path):
            raise ValueError(f"write folder:PATH or sklearn:digits, not {source!r}")
        return source

    @model_validator(mode="after")
    def _check(self) -> "Shard":
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction and test_fraction together must leave something for train")
        if any(not 0 <= value <= 255 for value in self.background):
            raise ValueError("background has three values from 0 to 255")
        return self

    def estimate(self, inputs: Mapping[str, Estimate]) -> Estimate:
        source = DIGITS if self.source == "sklearn:digits" else inputs["source"]
        # A copied image keeps its size; the tar adds two headers, a label and padding.
        disk_bytes = source.disk_bytes + 2048 * source.samples
        # A photograph takes some ten times its JPEG in memory, up to the caps.
        decoded = DECODED_PER_STORED * source.disk_bytes // max(source.samples, 1)
        sample_bytes = min(decoded, 3 * self.max_short_side * self.max_long_side)
        return Estimate(source.samples, sample_bytes, disk_bytes, self.workers * LIBRARIES_BYTES)

    def foreign_inputs(self) -> dict[str, ForeignInput]:
        kind, _, path = self.source.partition(":")
        if kind == "folder":
            return {"source": ForeignInput("folder", (Path(path).expanduser(),), IMAGE_SUFFIXES)}
        return {"source": ForeignInput(self.source)}
