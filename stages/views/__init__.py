"""Views of images: load a policy, give it batches.

views = load(folder_of_the_artifact, seed=0)
pair = views(images, sample_ids, epoch, sizes)  # float32 [2, B, C, h, w], normalised; `views=1`: [1, B, C, h, w]
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from stages.views.draws import Parameters, draw
from stages.views.engines import compute_views
from stages.views.kornia_engine import normalise
from stages.views.policy import (
    PRESETS,
    SMALL_IMAGE_SIZE,
    Interpolation,
    OtherChannels,
    Policy,
    PolicyError,
    preset,
    read_policy,
    write_policy,
)
from stages.views.resample import Boxes, batch_parts, crop_and_resize
from stages.views.transfer import to_device

__all__ = [
    "CENTRE",
    "PRESETS",
    "Interpolation",
    "OtherChannels",
    "Parameters",
    "Policy",
    "PolicyError",
    "Square",
    "Views",
    "compute_views",
    "draw",
    "evaluation_view",
    "load",
    "preset",
    "read_policy",
    "squares",
    "to_device",
    "write_policy",
]

EVALUATION_CROP = 0.875
"""Share of the short side that evaluation looks at where views are large (google-research/simclr, CROP_PROPORTION)."""


@dataclass(frozen=True)
class Square:
    """Where an image is looked at.

    Attributes:
        down, right: halves of what is free above and to the left of it: 1 is the middle, 0 and 2 are the edges.
        mirrored: left to right.
        is_smaller: its side is 0.875 of the short side, whatever the size of the view.
    """

    down: int = 1
    right: int = 1
    mirrored: bool = False
    is_smaller: bool = False


CENTRE = Square()


def squares(crops: Literal[1, 5], mirror: bool) -> tuple[Square, ...]:
    """The central square, or it and the four corners (Krizhevsky et al. 2012, section 4.1); each mirrored as well."""
    places = ((1, 1),) if crops == 1 else ((1, 1), (0, 0), (0, 2), (2, 0), (2, 2))
    return tuple(
        Square(down, right, mirrored, crops == 5)
        for mirrored in ((False, True) if mirror else (False,))
        for down, right in places
    )


@dataclass(frozen=True)
class Views:
    """Views of every image of a batch, by a policy and a seed. Made by `load`."""

    policy: Policy
    seed: int
    device: torch.device | None
    views: int = 2

    @torch.no_grad()
    def __call__(self, images: Tensor, sample_ids: Tensor, epoch: int | Tensor, sizes: Tensor | None = None) -> Tensor:
        """Draw and compute.

        Args:
            images: uint8 [B, C, H, W], canvas padded at the bottom and right. Pinned ones may be on their way to a GPU
                still when this returns: see to_device. A BatchLoader waits before it writes over its own.
            sample_ids: int64 [B]; with seed and epoch they decide all draws.
            epoch: number of the epoch, from 0; or int64 [B], a number that is another at each visit of a sample.
            sizes: int64 [B, 2], height and width of each image; the whole canvas if left out.
        Returns:
            float32 [2, B, C, h, w], normalised, on the engine's device (the images' if none was named). Ids and sizes
            on the host are best: what is drawn is drawn there.
        Raises:
            OtherChannels: the policy is for images of other channels.
            ValueError: images, ids or sizes of another type or shape.
        """
        images, sizes = _check_images(images, sizes, self.device, self.policy.channels)
        if sample_ids.shape != images.shape[:1]:
            raise ValueError(f"sample_ids must be one id an image, not {tuple(sample_ids.shape)} for {len(images)}")
        parameters = draw(self.policy, self.seed, sample_ids, epoch, sizes, self.views)
        with torch.autocast(images.device.type, enabled=False):
            return compute_views(images, parameters, self.policy).unflatten(0, (self.views, len(images)))


def load(
    policy_or_path: Policy | Path | str, seed: int = 0, device: torch.device | str | None = None, views: int = 2
) -> Views:
    """Views by a policy, or by the policy.json (or its folder) at a path.

    Args:
        seed: of the run: other seeds draw other views.
        device: where to compute; where the images are if left out.
        views: how many of each image; the first of two is the one that a single one would be.
    Raises:
        PolicyError: the file is missing or broken.
    """
    policy = policy_or_path if isinstance(policy_or_path, Policy) else read_policy(Path(policy_or_path))
    return Views(policy, seed, None if device is None else torch.device(device), views)


@torch.no_grad()
def evaluation_view(
    images: Tensor,
    sizes: Tensor | None,
    image_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    interpolation: Interpolation = "bilinear",
    antialias: bool = True,
    square: Square = CENTRE,
) -> Tensor:
    """The one view that evaluation and export use: a central square, resized. Nothing is drawn.

    The square's side is the short side of the image, times 0.875 where `image_size` is above 64 pixels, rounded.

    Args:
        images, sizes: as for Views.
        mean, std: by channel, scale 0 to 1.
        square: another than the central one.
    Returns:
        float32 [B, C, image_size, image_size], normalised.
    """
    images, sizes = _check_images(images, sizes, None, len(mean))
    sizes = to_device(sizes, images.device)
    short_side = sizes.amin(dim=1)
    is_whole = image_size <= SMALL_IMAGE_SIZE and not square.is_smaller
    side = short_side if is_whole else torch.round(short_side * EVALUATION_CROP).to(torch.int64)
    free = sizes - side[:, None]
    top, left = free[:, 0] * square.down // 2, free[:, 1] * square.right // 2
    unflipped = torch.zeros_like(side, dtype=torch.bool)
    boxes = Boxes(top, left, side, side, torch.full_like(unflipped, square.mirrored), unflipped)
    views = torch.empty(*images.shape[:2], image_size, image_size, device=images.device)
    with torch.autocast(images.device.type, enabled=False):
        for part in batch_parts(images, image_size):
            boxes_of_part = Boxes(*(field[part] for field in boxes))
            resized = crop_and_resize(images[part], boxes_of_part, image_size, interpolation, antialias)
            views[part] = normalise(resized, mean, std)
    return views


def _check_images(
    images: Tensor, sizes: Tensor | None, device: torch.device | None, channels: int
) -> tuple[Tensor, Tensor]:
    """Images on the device; sizes where they are, of the whole canvas where there are none."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images must be uint8 [B, {channels}, H, W], not {images.dtype} {tuple(images.shape)}")
    if images.shape[1] != channels:
        raise OtherChannels(
            f"the images have {images.shape[1]} channels, and the view is for {channels}: make it from the same shards"
        )
    if sizes is None:
        sizes = torch.tensor(images.shape[2:]).expand(len(images), 2)
    if sizes.shape != (len(images), 2):
        raise ValueError(f"sizes must be int64 [B, 2], not {tuple(sizes.shape)} for {len(images)} images")
    return to_device(images, device or images.device), sizes.to(torch.int64)
