"""Two moves that resampling and blur are made of on a CPU: weighted sums of whole lines, and laying pictures on a side.

What is done along the columns of a picture is a sum of its rows, each of which lies in memory in one piece: nothing is
gathered one number at a time, and no product is spent on the many weights that are zero. What is done along the rows
is the same after the picture has been laid on its side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

STRIP = 32
"""Rows that are laid on a side at once: so many that what is read stays in the first cache until all of it is used."""


def weighted_sums(lines: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of lines.

    Args:
        lines: float32 [L, length].
        index: integers [..., taps], which lines. weight: float32 [..., taps].
    Returns:
        float32 [..., length].
    """
    *shape, taps = index.shape
    offsets = torch.arange(0, index.numel(), taps, dtype=torch.int32)
    sums = F.embedding_bag(
        index.flatten().to(torch.int32), lines, offsets, mode="sum", per_sample_weights=weight.flatten()
    )
    return sums.view(*shape, lines.shape[1])


def lay_on_side(pictures: Tensor) -> Tensor:
    """[N, C, h, w] of any strides -> [N, C, w, h], contiguous."""
    count, channels, height, width = pictures.shape
    result = pictures.new_empty(count, channels, width, height)
    for start in range(0, height, STRIP):
        strip = slice(start, start + STRIP)
        result[..., strip] = pictures[:, :, strip].transpose(2, 3)
    return result
