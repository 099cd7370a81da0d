"""Channels last, except where torch writes past its buffers."""

import pytest
import torch
from torch import nn

from stages.models import build_encoder, choose_memory_format


@pytest.mark.parametrize(
    ("backbone", "width", "expected"),
    [
        ("resnet10", 4, torch.contiguous_format),
        ("resnet10", 7, torch.contiguous_format),
        ("resnet10", 8, torch.channels_last),
        ("resnet50", 16, torch.channels_last),
    ],
)
def test_narrow_encoders_are_trained_contiguous(backbone: str, width: int, expected: torch.memory_format) -> None:
    encoder = build_encoder(backbone, width, 64, False, 16, 3)
    assert choose_memory_format(encoder, channels_last=True) == expected
    assert choose_memory_format(encoder, channels_last=False) == torch.contiguous_format


def test_convolutions_that_are_not_affected_stay_channels_last() -> None:
    """1x1 without stride, and 3x3 with one."""
    network = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(16, 8, 1, stride=2))
    assert choose_memory_format(network, channels_last=True) == torch.channels_last
    assert choose_memory_format(nn.Conv2d(32, 32, 1, stride=2, groups=8), channels_last=True) == torch.contiguous_format
