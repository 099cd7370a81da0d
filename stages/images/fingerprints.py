"""Thumbnails of 32x32 pixels and descriptors of them: what near-duplicates are looked for with. Nothing is trained.

All filters are matrices that act on rows and on columns, so that they are exact, quick on many small images, and the
same on every device.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 32
"""Height and width of a thumbnail: images are squeezed, so that a copy of another aspect ratio still fits."""

CELLS = 6
COLOUR_WEIGHT = 0.5
ILLUMINATION = 6.0
"""Standard deviation, in pixels, of the blur that is taken away: slow changes of light tell little."""
SMALLEST_NORM = 0.02
"""Descriptors shorter than this (flat images) stay short, and resemble nothing."""


def thumbnails(images: Tensor, sizes: Tensor) -> Tensor:
    """Small copies: of RGB images in colour, of others as the mean over their channels.

    Args:
        images: uint8 [B, C, H, W], each in the upper left corner of the canvas.
        sizes: int64 [B, 2], height and width of each.

    Returns:
        uint8 [B, K, 32, 32], K = 3 for C = 3, else 1.
    """
    channels = 3 if images.shape[1] == 3 else 1
    small = torch.empty(len(images), channels, SIDE, SIDE, dtype=torch.uint8)
    for height, width in sizes.unique(dim=0).tolist():
        chosen = torch.where((sizes == torch.tensor([height, width])).all(dim=1))[0]
        pixels = images[chosen, :, :height, :width]
        if channels == 1:
            pixels = pixels.float().mean(dim=1, keepdim=True).round().to(torch.uint8)
        resized = F.interpolate(pixels.contiguous(), size=(SIDE, SIDE), mode="bilinear", antialias=True)
        small[chosen] = resized
    return small


def planes(small: Tensor) -> Tensor:
    """uint8 [B, K, 32, 32] -> floats [B, K, 32, 32] from 0 to 1: mean over the channels, then two weighted differences.

    The differences are those of an opponent colour space (red against blue, green against both).
    """
    values = small.float() / 255
    if values.shape[1] == 1:
        return values
    red, green, blue = values.unbind(dim=1)
    differences = [red - blue, green - (red + blue) / 2]
    return torch.stack([(red + green + blue) / 3, *(COLOUR_WEIGHT * one for one in differences)], dim=1)


def descriptors(small: Tensor) -> Tensor:
    """A unit vector an image: 6 x 6 means of each plane, of the first without slow changes of light.

    Invariant to gain and offset of brightness; a tenth of the side more or less at the border changes it little.

    Args:
        small: uint8 [B, K, 32, 32].

    Returns:
        [B, 36 K] float32; of images with next to no contrast shorter than a unit.
    """
    values = planes(small)
    light = values[:, :1] - filtered(values[:, :1], blur(ILLUMINATION))
    cells = filtered(torch.cat([light, values[:, 1:]], dim=1), _cells())
    cells = (cells - cells.mean(dim=(2, 3), keepdim=True)).flatten(1)
    return cells / cells.norm(dim=1, keepdim=True).clamp_min(SMALLEST_NORM)


def mirrored(vectors: Tensor) -> Tensor:
    """Descriptors [B, 36 K] of the images mirrored left to right, from those of the images."""
    return vectors.view(len(vectors), -1, CELLS, CELLS).flip(-1).flatten(1)


def filtered(values: Tensor, rows: Tensor) -> Tensor:
    """A separable filter: [..., 32, 32] and a matrix [n, 32] give [..., n, n]."""
    return rows @ values @ rows.T


@lru_cache
def blur(sigma: float) -> Tensor:
    """Gaussian blur of a row of 32 pixels, reflected at its ends, as a matrix [32, 32]."""
    radius = int(3 * sigma + 1)
    kernel = torch.exp(-(torch.arange(-radius, radius + 1).double() ** 2) / (2 * sigma**2))
    padded = F.pad(torch.eye(SIDE, dtype=torch.float64)[None], (radius, radius), mode="reflect")
    blurred = F.conv1d(padded.transpose(0, 1), (kernel / kernel.sum())[None, None])
    return blurred[:, 0].T.float().contiguous()


@lru_cache
def _cells() -> Tensor:
    """Means over 6 parts of a row, [6, 32]."""
    return F.adaptive_avg_pool1d(torch.eye(SIDE)[None], CELLS)[0].T.contiguous()
