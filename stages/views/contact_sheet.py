"""A contact sheet: originals beside their views, to look at before days of training."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from stages.images.display import displayed
from stages.views.draws import draw
from stages.views.engines import compute_views
from stages.views.policy import Policy

CELL = 112
"""Pixels that a view fills on the sheet, about; small views are enlarged by a whole number, large ones scaled down."""
GAP = 4
EPOCHS = 4


def write_contact_sheet(
    path: Path, images: Tensor, sizes: Tensor, sample_ids: Tensor, policy: Policy, seed: int
) -> None:
    """Write a PNG with a row for each image: the original, then both views of its first four epochs.

    The views are those that training with this policy and seed sees, without the normalisation. Equal arguments give
    equal bytes.

    Args:
        images: uint8 [B, C, H, W], padded canvas.
        sizes: int64 [B, 2]. sample_ids: int64 [B].
    """
    plain = policy.model_copy(update={"mean": (0.0,) * policy.channels, "std": (1.0,) * policy.channels})
    with torch.no_grad():
        views = [
            compute_views(images, draw(plain, seed, sample_ids, epoch, sizes), plain).unflatten(0, (2, len(images)))
            for epoch in range(EPOCHS)
        ]
    levels = (torch.cat(views) * 255).round().clamp(0, 255).to(torch.uint8)  # [epochs * 2, B, C, h, w]
    side = policy.image_size * round(CELL / policy.image_size) if policy.image_size <= CELL else CELL
    step = side + GAP
    sheet = Image.new("RGB", (GAP + step * (1 + len(levels)) + 3 * GAP, GAP + step * len(images)), "white")
    for row, (image, (height, width)) in enumerate(zip(images, sizes.tolist(), strict=True)):
        original = _fit(image[:, :height, :width], side)
        across, down = (side - original.width) // 2, (side - original.height) // 2
        sheet.paste(original, (GAP + across, GAP + row * step + down))
        for column, view in enumerate(levels[:, row], start=1):
            sheet.paste(_fit(view, side), (4 * GAP + column * step, GAP + row * step))
    sheet.save(path, format="PNG", compress_level=9)


def _fit(image: Tensor, side: int) -> Image.Image:
    """uint8 [C, h, w] with its longer side scaled to `side` pixels: in whole pixels if larger, smoothly if smaller."""
    picture = Image.fromarray(displayed(image.permute(1, 2, 0).numpy()))
    scale = side / max(picture.size)
    fitted = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(fitted, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
