"""Crop and resize of whole batches, each image with a box of its own, as two products with banded matrices.

An axis-aligned resize is separable: out = rows @ crop @ columns^T, with one matrix [h, H] and one [w, W] for each view.
The box lies inside its image and every weight outside the box is zero, so that neither the padding of the canvas nor
what surrounds the crop is ever read: the result is that of cutting the box out and resizing it.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from stages.views.policy import Interpolation


class Boxes(NamedTuple):
    """Crop boxes in pixels of the image, integers, [N] each; the flips [N] are applied to the result."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    horizontal_flip: Tensor
    vertical_flip: Tensor


def batch_parts(images: Tensor, image_size: int) -> Iterator[slice]:
    """Slices of a batch to work on one after another, so that memory stays bounded however large the canvas is.

    Args:
        images: [B, C, H, W].
        image_size: of the views.
    """
    floats = images.shape[1] * (images.shape[2] * images.shape[3] + 2 * image_size**2)  # of a canvas and of two views
    # So many that a CPU's caches, or a GPU's memory, hold them well.
    at_once = max(1, (2**23 if images.device.type == "cpu" else 2**28) // floats)
    for start in range(0, len(images), at_once):
        yield slice(start, start + at_once)


def crop_and_resize(
    images: Tensor, boxes: Boxes, image_size: int, interpolation: Interpolation, antialias: bool
) -> Tensor:
    """Cut a box out of each image, resize it to a square, flip it where asked.

    Equal to PIL's and torchvision's crop followed by resize, up to rounding; `nearest` takes the pixel under the
    centre of the output pixel (PIL's; torchvision's NEAREST_EXACT).

    Args:
        images: uint8 [B, C, H, W], a canvas padded at the bottom and right.
        boxes: N = V * B boxes, view-major (the first B for the first view of each image); each inside its image.
        image_size: height and width of the result.
        interpolation: bilinear, bicubic or nearest.
        antialias: widen the kernel where a box is scaled down (not for nearest).
    Returns:
        float32 [V * B, C, image_size, image_size] from 0 to 1.
    """
    batch, channels, canvas_height, canvas_width = images.shape
    kernel = interpolation, antialias
    rows = resampling_matrices(boxes.top, boxes.height, boxes.vertical_flip, canvas_height, image_size, *kernel)
    columns = resampling_matrices(boxes.left, boxes.width, boxes.horizontal_flip, canvas_width, image_size, *kernel)
    # The first product runs over the whole canvas, so it takes the side that leaves less for the second.
    rows_first = canvas_width <= canvas_height
    first, second = (rows, columns) if rows_first else (columns, rows)
    canvas = images.permute(0, 2, 1, 3) if rows_first else images.permute(0, 3, 1, 2)  # [B, long, C, short]
    canvas = canvas.to(torch.float32, memory_format=torch.contiguous_format).flatten(2)
    result = torch.empty(len(first), channels, image_size, image_size, device=images.device)
    for view, first_of_view, second_of_view in zip(
        result.split(batch), first.split(batch), second.split(batch), strict=True
    ):
        half = torch.bmm(first_of_view, canvas).view(batch, image_size * channels, -1)  # [B, h*C, short]
        whole = torch.bmm(half, second_of_view.transpose(1, 2)).view(batch, image_size, channels, image_size)
        torch.mul(whole.permute(0, 2, 1, 3) if rows_first else whole.permute(0, 2, 3, 1), 1 / 255, out=view)
    return result.clamp_(0, 1) if interpolation == "bicubic" else result  # its kernel overshoots


def resampling_matrices(
    start: Tensor,
    length: Tensor,
    flipped: Tensor,
    size_in: int,
    size_out: int,
    interpolation: Interpolation,
    antialias: bool,
) -> Tensor:
    """Matrices that resize `length` pixels from `start` on to `size_out`, backwards where flipped.

    Args:
        start, length: int64 [N], within size_in.
        flipped: bool [N].
    Returns:
        float32 [N, size_out, size_in]; each row sums to 1 and is zero outside start .. start + length.
    """
    place = torch.arange(size_out, device=start.device)
    place = torch.where(flipped[:, None], size_out - 1 - place, place)  # [N, out]
    start, length = start[:, None], length[:, None]
    matrices = torch.zeros(len(start), size_out, size_in, device=start.device)
    if interpolation == "nearest":
        nearest = (2 * place + 1) * length // (2 * size_out)
        return matrices.scatter_(2, (start + nearest)[:, :, None], 1.0)

    kernel, reach = _kernel(interpolation, antialias)
    scale = length / size_out
    centre = (place + 0.5) * scale
    widening = scale.clamp(min=1.0) if antialias else torch.ones_like(scale)
    taps = math.ceil(2 * reach * max(1.0, size_in / size_out)) if antialias else 2 * reach
    first = torch.floor(centre - reach * widening + 0.5)[:, :, None]
    tap = first + torch.arange(taps, device=start.device)  # [N, out, taps], in pixels of the box
    weight = kernel((tap + 0.5 - centre[:, :, None]) / widening[:, :, None])
    inside = tap.clamp(torch.zeros_like(length)[:, :, None], length[:, :, None] - 1)
    if antialias:  # taps outside the box count for nothing; without antialiasing they repeat its edge
        weight = weight * (tap == inside)
        weight = weight / weight.sum(2, keepdim=True)
    index = start[:, :, None] + inside.long()
    for number in range(taps):  # one at a time: taps of one row may meet at an edge, and a sum has one order only so
        matrices.scatter_add_(2, index[:, :, number, None], weight[:, :, number, None])
    return matrices


def _kernel(interpolation: Interpolation, antialias: bool) -> tuple[Callable[[Tensor], Tensor], int]:
    """Weight by distance in (widened) pixels, and how far it reaches."""
    if interpolation == "bilinear":
        return lambda distance: (1 - distance.abs()).clamp(min=0), 1
    # PIL takes -1/2 and so does torch with antialiasing; torch without it takes -3/4, as OpenCV does.
    sharpness = -0.5 if antialias else -0.75
    return lambda distance: _cubic(distance.abs(), sharpness), 2


def _cubic(distance: Tensor, sharpness: float) -> Tensor:
    """Keys 1981, "Cubic convolution interpolation for digital image processing", with a = sharpness."""
    near = ((sharpness + 2) * distance - (sharpness + 3)) * distance * distance + 1
    far = ((distance - 5) * distance + 8) * distance * sharpness - 4 * sharpness
    return torch.where(distance < 1, near, torch.where(distance < 2, far, torch.zeros_like(distance)))
