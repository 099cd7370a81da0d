"""Copies between the host and a device that do not make the host wait where they need not."""

import torch
from torch import Tensor

WITHOUT_WAITING = ("cuda",)
"""Devices that take a copy from the host as one more piece of work, after what they were given before."""


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, itself where it is there already.

    A copy from the host to a GPU may be under way when this returns if the tensor's memory is pinned: nobody may write
    over that before the device's current stream has come to it. Memory that is not pinned is free again, since CUDA
    has read it by then (which, where it is more than some dozen KiB, it may wait for the stream to do). All other
    copies are done, above all those to the host, which would be read too early otherwise.
    """
    is_handed_over = tensor.device.type == "cpu" and device.type in WITHOUT_WAITING
    return tensor.to(device, non_blocking=is_handed_over)
