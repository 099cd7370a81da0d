"""Settings of the stage `augment`."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from pipeline.settings import Estimate, StageSettings, artifact, setting


def _check_increasing(interval: tuple[float, float]) -> tuple[float, float]:
    if interval[0] > interval[1]:
        raise ValueError("the smallest value comes first")
    return interval


Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Interval = Annotated[tuple[Positive, Positive], AfterValidator(_check_increasing)]
ShareInterval = Annotated[tuple[Share, Share], AfterValidator(_check_increasing)]


FITTED_SIZES = (16, 32, 64, 96, 128, 224)


class Augment(StageSettings):
    """Resolve the view policy of SimCLR (Chen et al. 2020, appendix A) and draw a contact sheet of real views.

    A field that is left out takes the value of the preset.
    """

    stage_version: ClassVar[int] = 3
    lower_for_memory: ClassVar[tuple[str, ...]] = ("contact_sheet_images", "image_size")

    shards: str = artifact("shard", description="images whose training part gives mean and std")
    preset: Literal["natural", "colour-matters", "grey", "microscopy", "aerial", "text"] = setting(
        "natural", "what the images are: decides crops, flips, turns and colours"
    )
    image_size: int | None = setting(
        32,
        "height and width of a view, in pixels; null: the largest of 16, 32, 64, 96, 128 and 224 that the median short "
        "side of the training images reaches",
        ge=4,
    )
    crop_area: ShareInterval | None = setting(None, "share of the image's area that a crop covers, [smallest, largest]")
    crop_ratio: Interval | None = setting(None, "width / height of a crop, [smallest, largest]")
    horizontal_flip: float | None = setting(None, "probability", ge=0, le=1)
    vertical_flip: float | None = setting(None, "probability", ge=0, le=1)
    quarter_turns: float | None = setting(None, "probability of a rotation by 90, 180 or 270 degrees", ge=0, le=1)
    colour_jitter: float | None = setting(None, "probability of the four colour operators", ge=0, le=1)
    colour_strength: float | None = setting(
        None, "s of the paper: multiplies brightness, contrast, saturation and hue", ge=0, le=2
    )
    brightness: float | None = setting(None, "largest change of brightness, at strength 1", ge=0, le=2)
    contrast: float | None = setting(None, "largest change of contrast, at strength 1", ge=0, le=2)
    saturation: float | None = setting(None, "largest change of saturation, at strength 1", ge=0, le=2)
    hue: float | None = setting(
        None, "largest shift of hue, as a share of the colour circle, at strength 1", ge=0, le=0.25
    )
    grey: float | None = setting(None, "probability", ge=0, le=1)
    blur: float | None = setting(None, "probability; 0 in the presets for views of 64 pixels or less", ge=0, le=1)
    blur_sigma: Interval | None = setting(
        None, "standard deviation of the blur in pixels of the view, [smallest, largest]"
    )
    interpolation: Literal["bilinear", "bicubic", "nearest"] | None = setting(None, "how a crop is resized")
    antialias: bool | None = setting(None, "widen the interpolation kernel where a crop is scaled down")
    engine: Literal["kornia", "fused"] | None = setting(
        None,
        "kornia: the published operators one by one; fused: one warp, one colour matrix and one blur, several times as "
        "fast, with hue as a rotation and colours clamped once",
    )
    contact_sheet_images: int = setting(12, "images on the contact sheet", ge=1, le=64)

    def image_size_for(self, short_side: int) -> int:
        """The size of a view, or the one that fits images of this median short side, in pixels."""
        if self.image_size is not None:
            return self.image_size
        return max((size for size in FITTED_SIZES if size <= short_side), default=FITTED_SIZES[0])

    def estimate(self, inputs: Mapping[str, Estimate]) -> Estimate:
        samples = inputs["shards"].samples if "shards" in inputs else 0
        return Estimate(samples, sample_bytes=3 * 4 * (self.image_size or FITTED_SIZES[-1]) ** 2, disk_bytes=2**20)
