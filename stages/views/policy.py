"""The policy of views: every number that decides how an image becomes a view. Frozen, complete, one JSON file."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

SMALL_IMAGE_SIZE = 64
"""Views of this many pixels or less are small: weaker colour, no blur, evaluation on the whole image."""

OF_COLOURS = ("saturation", "hue", "grey")
"""Fields of what only RGB images have."""

Interpolation = Literal["bilinear", "bicubic", "nearest"]
Engine = Literal["kornia", "fused"]

DEFAULT_ENGINE: Engine = "kornia"
"""Of every preset."""


class PolicyError(ValueError):
    """A policy file that cannot be used."""

    exit_code = 4


class OtherChannels(ValueError):
    """A policy does not go with images of so many channels."""

    exit_code = 2


def _check_increasing(interval: tuple[float, float]) -> tuple[float, float]:
    if interval[0] > interval[1]:
        raise ValueError("the smallest value comes first")
    return interval


Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Interval = Annotated[tuple[Positive, Positive], AfterValidator(_check_increasing)]
ShareInterval = Annotated[tuple[Share, Share], AfterValidator(_check_increasing)]


class Policy(BaseModel):
    """All that an engine needs beside seed, ids and images. A policy says everything itself; there is one default, for
    files of before there were two engines.

    The order of operations is that of SimCLR (Chen et al. 2020, appendix A): crop and resize, flips and turns,
    colour jitter (its four operators in random order), grey, blur, normalisation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    image_size: int = Field(ge=4, description="height and width of a view, in pixels")
    crop_area: ShareInterval = Field(description="share of the image's area that a crop covers, [smallest, largest]")
    crop_ratio: Interval = Field(description="width / height of a crop, [smallest, largest]")
    horizontal_flip: Probability = Field(description="probability")
    vertical_flip: Probability = Field(description="probability")
    quarter_turns: Probability = Field(description="probability of a rotation by 90, 180 or 270 degrees")
    colour_jitter: Probability = Field(description="probability of the four colour operators")
    colour_strength: float = Field(ge=0, le=2, description="s of the paper: multiplies the next four")
    brightness: float = Field(ge=0, le=2, description="largest change of the factor, at strength 1")
    contrast: float = Field(ge=0, le=2, description="largest change of the factor, at strength 1")
    saturation: float = Field(ge=0, le=2, description="largest change of the factor, at strength 1")
    hue: float = Field(ge=0, le=0.25, description="largest shift, as a share of the colour circle, at strength 1")
    grey: Probability = Field(description="probability")
    blur: Probability = Field(description="probability")
    blur_sigma: Interval = Field(
        description="standard deviation of the blur in pixels of the view, [smallest, largest]"
    )
    interpolation: Interpolation = Field(description="how a crop is resized")
    antialias: bool = Field(description="widen the interpolation kernel where a crop is scaled down")
    engine: Engine = Field("kornia", description="what computes the views")
    mean: tuple[float, ...] = Field(min_length=1, description="by channel, scale 0 to 1, subtracted")
    std: tuple[Positive, ...] = Field(min_length=1, description="by channel, scale 0 to 1, divided by")

    @model_validator(mode="after")
    def _check(self) -> "Policy":
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels and std {len(self.std)}")
        of_colours = [name for name in OF_COLOURS if getattr(self, name) > 0]
        if self.channels != 3 and of_colours:
            raise ValueError(f"{', '.join(of_colours)}: for RGB images only, and mean has {self.channels} channels")
        return self

    @property
    def channels(self) -> int:
        """Of the images that it is for."""
        return len(self.mean)

    @property
    def blur_kernel(self) -> int:
        """Taps of the blur: about a tenth of the view, odd, at least 3 (google-research/simclr, data_util.py)."""
        return max(3, self.image_size // 10 // 2 * 2 + 1)


_PUBLISHED: dict[str, Any] = {
    "crop_area": (0.08, 1.0),
    "crop_ratio": (3 / 4, 4 / 3),
    "horizontal_flip": 0.5,
    "vertical_flip": 0.0,
    "quarter_turns": 0.0,
    "colour_jitter": 0.8,
    "brightness": 0.8,
    "contrast": 0.8,
    "saturation": 0.8,
    "hue": 0.2,
    "grey": 0.2,
    "blur_sigma": (0.1, 2.0),
    "interpolation": "bilinear",
    "antialias": True,
    "engine": DEFAULT_ENGINE,
}
_SMALL_VIEWS: dict[str, Any] = {"colour_strength": 0.5, "blur": 0.0}  # Chen et al. 2020, B.9: CIFAR-10
_LARGE_VIEWS: dict[str, Any] = {"colour_strength": 1.0, "blur": 0.5}  # Chen et al. 2020, appendix A: ImageNet

PRESETS: dict[str, dict[str, Any]] = {
    # The published policy.
    "natural": {},
    # Flowers, birds, goods: what colour it is says what it is. Light may change, hue hardly, colour never goes.
    "colour-matters": {"colour_strength": 0.5, "saturation": 0.4, "hue": 0.04, "grey": 0.0},
    # One channel stored as three: there is no hue or saturation to change, and no colour to take away.
    "grey": {"saturation": 0.0, "hue": 0.0, "grey": 0.0},
    # No up and no down; the stain varies but tells something; a tiny crop may show nothing but background.
    "microscopy": {
        "crop_area": (0.2, 1.0),
        "vertical_flip": 0.5,
        "quarter_turns": 0.75,  # all four orientations equally often
        "colour_strength": 0.5,
    },
    # Seen from above: no up and no down; light and season vary as in photographs.
    "aerial": {"vertical_flip": 0.5, "quarter_turns": 0.75},
    # Letters and digits: a mirror image is another sign or none, and so is a small part of one.
    "text": {"crop_area": (0.4, 1.0), "horizontal_flip": 0.0, "colour_strength": 0.5},
}
"""What each preset changes of the published policy."""


def preset(name: str, image_size: int) -> dict[str, Any]:
    """Fields of a Policy (all but mean and std) for what the images are.

    Args:
        name: a key of PRESETS.
        image_size: height and width of a view; at most 64 pixels means weaker colour and no blur, as published.
    Raises:
        ValueError: no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    by_size = _SMALL_VIEWS if image_size <= SMALL_IMAGE_SIZE else _LARGE_VIEWS
    return {"image_size": image_size, **_PUBLISHED, **by_size, **PRESETS[name]}


def write_policy(policy: Policy, path: Path) -> None:
    """Write a policy as JSON; `read_policy` gives it back equal."""
    path.write_text(policy.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_policy(path: Path) -> Policy:
    """Read policy.json, given itself or the folder that holds it.

    Raises:
        PolicyError: it is not there, is no JSON, or a field is missing, unknown or out of range (all named).
    """
    file = path / "policy.json" if path.is_dir() else path
    try:
        return Policy.model_validate_json(file.read_bytes())
    except OSError as error:
        raise PolicyError(f"{file}: cannot be read ({error.strerror}); run the augment step again") from None
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}".removeprefix(": ") for fault in error.errors()
        )
        raise PolicyError(f"{file}: not a view policy ({faults}); run the augment step again") from None
