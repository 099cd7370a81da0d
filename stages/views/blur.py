"""Gaussian blur of whole batches, each view with a sigma of its own, as two sums over neighbours: down, then across."""

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.views.lines import lay_on_side, weighted_sums


def gaussian_blur(views: Tensor, chosen: Tensor, sigma: Tensor, taps: int) -> None:
    """Blur some of the views in place, mirrored at the edges (without repeating the edge itself).

    Args:
        views: float32 [N, C, s, s].
        chosen: int64 [n], which of them.
        sigma: float32 [n], standard deviation in pixels.
        taps: pixels of the kernel, odd, at most 2 s - 1; its weights are made to sum to 1.
    """
    if not len(chosen):
        return
    distance = torch.arange(taps, device=views.device) - taps // 2
    weight = torch.exp(-0.5 * (distance / sigma[:, None]).square())
    weight = weight / weight.sum(1, keepdim=True)  # [n, taps]
    blur = _sum_taps if views.device.type == "cpu" else _convolve
    views.index_copy_(0, chosen, blur(views, chosen, weight))


def _sum_taps(views: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
    """By sums of rows: a CPU takes half of the time that a convolution of single channels does, or less."""
    channels, size = views.shape[1:3]
    taps = weight.shape[1]
    place = torch.arange(size)[:, None] + torch.arange(taps) - taps // 2
    place = (size - 1) - ((size - 1) - place.abs()).abs()  # mirrored: [s, taps]
    plane = torch.arange(len(views) * channels).view(-1, channels, 1, 1)
    weight = weight[:, None, None].expand(-1, channels, size, -1)  # [n, C, s, taps]
    down = weighted_sums(views.flatten(0, 2), place + size * plane[chosen], weight)
    across = weighted_sums(lay_on_side(down).flatten(0, 2), place + size * plane[: len(chosen)], weight)
    return lay_on_side(across)


def _convolve(views: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
    """By convolutions with a kernel for each view and channel."""
    views = views.index_select(0, chosen)
    count, channels = views.shape[:2]
    reach = weight.shape[1] // 2
    kernel = weight.repeat_interleave(channels, 0)[:, None, :, None]  # [n * C, 1, taps, 1]
    padded = F.pad(views, (reach,) * 4, mode="reflect").flatten(0, 1)[None]  # [1, n * C, s + 2 reach, s + 2 reach]
    down = F.conv2d(padded, kernel, groups=count * channels)
    return F.conv2d(down, kernel.transpose(2, 3), groups=count * channels).view_as(views)
