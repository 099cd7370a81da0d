"""Crop and resize of whole batches, each image with a box of its own, as two products with banded matrices.

An axis-aligned resize is separable: out = rows @ crop @ columns^T, with one matrix [h, H] and one [w, W] for each view,
of which a row holds few numbers, the taps, that are not zero. The box lies inside its image and every weight outside
the box is zero, so that neither the padding of the canvas nor what surrounds the crop is ever read: the result is that
of cutting the box out and resizing it.

An accelerator multiplies whole matrices. A CPU sums the taps alone: a row of output is a weighted sum of two to four
rows of input, which lie in one piece; between the two products the picture is laid on its side for that.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stages.views.lines import lay_on_side, weighted_sums
from stages.views.policy import Interpolation


class Boxes(NamedTuple):
    """Crop boxes in pixels of the image, integers, [N] each; the flips [N] are applied to the result."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    horizontal_flip: Tensor
    vertical_flip: Tensor


@dataclass(frozen=True)
class Resampling:
    """What N views are made of: each of their rows of some rows of the image, each column of some columns.

    Attributes:
        row, column: int32 [N, out, taps], places in the canvas.
        row_weight, column_weight: float32 [N, out, taps].
        overshoots: weights may be negative, so that the result must be clamped.
    """

    row: Tensor
    row_weight: Tensor
    column: Tensor
    column_weight: Tensor
    overshoots: bool

    def __getitem__(self, views: Tensor) -> "Resampling":
        """The plan for some of the views."""
        fields = (field[views] for field in (self.row, self.row_weight, self.column, self.column_weight))
        return Resampling(*fields, overshoots=self.overshoots)

    def turned(self) -> "Resampling":
        """The plan for pictures laid on their side."""
        return Resampling(self.column, self.column_weight, self.row, self.row_weight, self.overshoots)


def batch_parts(images: Tensor, image_size: int, host_floats: int = 2**21) -> Iterator[slice]:
    """Slices of a batch to work on one after another, so that memory stays bounded however large the canvas is.

    Args:
        images: [B, C, H, W].
        image_size: of the views.
        host_floats: how many numbers a CPU is to work on at once: its caches hold 2**21 well.
    """
    floats = images.shape[1] * (images.shape[2] * images.shape[3] + 2 * image_size**2)  # of a canvas and of two views
    most = max(1, (host_floats if images.device.type == "cpu" else 2**28) // floats)
    parts = max(1, math.ceil(len(images) / most))
    at_once = max(1, math.ceil(len(images) / parts))  # parts of about equal size: each costs time of its own
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
    return resample(images, plan_resampling(boxes, images.shape[2:], image_size, interpolation, antialias))


def plan_resampling(
    boxes: Boxes, canvas: Sequence[int], image_size: int, interpolation: Interpolation, antialias: bool
) -> Resampling:
    """What crop_and_resize does with boxes, whatever the images are; canvas: height and width in pixels."""
    # Rows and columns in one go.
    start, length = torch.cat((boxes.top, boxes.left)), torch.cat((boxes.height, boxes.width))
    flipped = torch.cat((boxes.vertical_flip, boxes.horizontal_flip))
    taps_of = taps_by_kind if start.device.type == "cpu" else resampling_taps
    tap, weight = taps_of(length, flipped, max(canvas), image_size, interpolation, antialias)
    index = start[:, None, None].to(torch.int32) + tap
    (row, column), (row_weight, column_weight) = index.chunk(2), weight.chunk(2)
    return Resampling(row, row_weight, column, column_weight, overshoots=interpolation == "bicubic")


def resample(images: Tensor, plan: Resampling) -> Tensor:
    """Carry out for uint8 images [B, C, H, W] what was planned for N = V * B views of them: see crop_and_resize."""
    result = _sum_taps(images, plan) if images.device.type == "cpu" else _multiply(images, plan)
    return result.clamp_(0, 1) if plan.overshoots else result


def _sum_taps(images: Tensor, plan: Resampling) -> Tensor:
    """By the taps alone: the columns are summed first, the rows then."""
    batch, channels, height, width = images.shape
    if height > width:  # the first sums run over the whole canvas, and leave less where its longer side is summed
        return lay_on_side(_sum_taps(images.transpose(2, 3), plan.turned()))
    columns = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)  # [B, W, C, H]
    view = torch.arange(len(plan.row), dtype=torch.int32)
    column = plan.column + (view % batch * width)[:, None, None]
    narrow = weighted_sums(columns.flatten(0, 1).flatten(1), column, plan.column_weight)  # [N, w, C * H]
    rows = lay_on_side(narrow.unflatten(2, (channels, height)).transpose(1, 2))  # [N, C, H, w]
    plane = torch.arange(len(view) * channels, dtype=torch.int32).view(-1, channels, 1, 1)
    row = plan.row[:, None] + plane * height  # [N, C, h, taps]
    return weighted_sums(rows.flatten(0, 2), row, (plan.row_weight / 255)[:, None].expand_as(row))


def _multiply(images: Tensor, plan: Resampling) -> Tensor:
    """By whole matrices: rows and columns in the order that takes fewer products."""
    batch, channels, height, width = images.shape
    if height > width:
        return _multiply(images.transpose(2, 3), plan.turned()).transpose(2, 3).contiguous()
    rows = matrices(plan.row, plan.row_weight / 255, height)  # [N, h, H]
    columns = matrices(plan.column, plan.column_weight, width)  # [N, w, W]
    canvas = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)  # [B, W, C, H]
    views = []
    for rows_of_view, columns_of_view in zip(rows.split(batch), columns.split(batch), strict=True):
        narrow = torch.bmm(columns_of_view, canvas.flatten(2)).view(batch, -1, height)  # [B, w * C, H]
        whole = torch.bmm(narrow, rows_of_view.transpose(1, 2)).view(batch, -1, channels, rows.shape[1])
        views.append(whole.permute(0, 2, 3, 1))  # [B, w, C, h] -> [B, C, h, w]
    return torch.cat(views).contiguous()


def matrices(index: Tensor, weight: Tensor, size_in: int) -> Tensor:
    """Index and weight of taps [N, out, taps] as matrices, float32 [N, out, size_in]."""
    result = torch.zeros(*index.shape[:2], size_in, device=index.device)
    for number in range(index.shape[2]):  # one at a time: taps of a row may meet at an edge, and a sum has one order so
        result.scatter_add_(2, index[:, :, number, None].long(), weight[:, :, number, None])
    return result


def taps_by_kind(
    length: Tensor, flipped: Tensor, longest: int, size_out: int, interpolation: Interpolation, antialias: bool
) -> tuple[Tensor, Tensor]:
    """What resampling_taps gives, with as many taps as the longest that is there has need of: see there.

    Boxes of one length have the same taps but for the place where they start, and a batch has few lengths, so that a
    CPU finds those of each length once. An accelerator would have to be waited for to know how many there are.
    """
    kinds, kind = (2 * length + flipped).unique(return_inverse=True)
    longest = int(length.max()) if len(length) else longest
    taps, weights = resampling_taps(kinds // 2, kinds % 2 == 1, longest, size_out, interpolation, antialias)
    return taps[kind], weights[kind]


def resampling_taps(
    length: Tensor, flipped: Tensor, longest: int, size_out: int, interpolation: Interpolation, antialias: bool
) -> tuple[Tensor, Tensor]:
    """Which pixels each output pixel is the weighted sum of, where `length` pixels become `size_out`.

    Args:
        length: int64 [N], at most `longest`.
        flipped: bool [N], backwards.
    Returns:
        Index, int32, from 0 to length - 1, and weight, float32: both [N, size_out, taps]. An output pixel's weights
        sum to 1; those of taps that it has no need of are 0.
    """
    place = torch.arange(size_out, device=length.device)
    place = torch.where(flipped[:, None], size_out - 1 - place, place)  # [N, out]
    length = length[:, None]
    if interpolation == "nearest":
        index = ((2 * place + 1) * length // (2 * size_out))[:, :, None]
        return index.to(torch.int32), torch.ones(index.shape, device=length.device)

    kernel, reach = _kernel(interpolation, antialias)
    scale = length / size_out
    centre = (place + 0.5) * scale
    widening = scale.clamp(min=1.0) if antialias else torch.ones_like(scale)
    taps = math.ceil(2 * reach * max(1.0, longest / size_out)) if antialias else 2 * reach
    first = torch.floor(centre - reach * widening + 0.5)[:, :, None]
    tap = first + torch.arange(taps, device=length.device)  # [N, out, taps], in pixels of the box
    weight = kernel((tap + 0.5 - centre[:, :, None]) / widening[:, :, None])
    inside = tap.clamp(torch.zeros_like(length)[:, :, None], length[:, :, None] - 1)
    if antialias:  # taps outside the box count for nothing; without antialiasing they repeat its edge
        weight = weight * (tap == inside)
        weight = weight / weight.sum(2, keepdim=True)
    return inside.to(torch.int32), weight


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
