"""The layout of images and weights in memory."""

import torch
from torch import nn

SAFE_CHANNELS = 8


def choose_memory_format(encoder: nn.Module, channels_last: bool) -> torch.memory_format:
    """The layout to train an encoder in: channels last where it is wanted and safe.

    On CPUs the weight gradient of a strided 1x1 convolution over fewer than 8 channels, channels last, is written past
    its buffer (oneDNN issue 6035; seen with torch 2.14 at widths 1 to 7: the heap was corrupted).
    """
    convolutions = [module for module in encoder.modules() if isinstance(module, nn.Conv2d)]
    strided = [one for one in convolutions if one.kernel_size == (1, 1) and max(one.stride) > 1]
    is_safe = all(one.in_channels // one.groups >= SAFE_CHANNELS for one in strided)
    return torch.channels_last if channels_last and is_safe else torch.contiguous_format
