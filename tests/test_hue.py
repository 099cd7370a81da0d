"""Hue against Python's colorsys, a pixel at a time, and against Kornia's way through HSV."""

import colorsys
from itertools import product

import pytest
import torch
from kornia.enhance import adjust_hue
from torch import Tensor

from stages.views.hue import shift_hue

SHIFTS = torch.tensor((-0.5, -0.3, -0.1, -1e-9, 0.0, 0.05, 1 / 6, 0.4, 0.5), dtype=torch.float64)


def colours() -> Tensor:
    """float64 [3, 1, P]: all mixtures of five levels, so that channels tie in every way, and some at random."""
    levels = torch.tensor([*product((0.0, 1e-6, 0.25, 0.5, 1.0), repeat=3)], dtype=torch.float64)
    drawn = torch.rand(300, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.cat((levels, drawn)).T[:, None]


def hue_by_hand(pixels: Tensor, shift: float) -> Tensor:
    """[3, 1, P] -> [3, 1, P]."""
    turned = []
    for red, green, blue in pixels[:, 0].T.tolist():
        hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
        turned.append(colorsys.hsv_to_rgb((hue + shift) % 1.0, saturation, value))
    return torch.tensor(turned, dtype=torch.float64).T[:, None]


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_equals_colorsys_pixel_by_pixel_and_kornia(dtype: torch.dtype, error: float) -> None:
    views = colours().expand(len(SHIFTS), -1, -1, -1)
    given = views.to(dtype, copy=True)
    ours = shift_hue(given, SHIFTS.to(dtype))
    expected = torch.stack([hue_by_hand(view, shift) for view, shift in zip(views, SHIFTS.tolist(), strict=True)])
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=error)
    # Kornia adds 1e-8 to the largest channel before it divides: of 1e-6 that is a hundredth.
    theirs = adjust_hue(given, SHIFTS.to(dtype) * 2 * torch.pi)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-7)
    assert torch.equal(given, views.to(dtype)), "what was given is left as it was"


def test_grey_stays_and_smallest_and_largest_channel_keep_their_values() -> None:
    grey = torch.linspace(0, 1, 64).expand(1, 3, 8, 64)
    assert torch.equal(shift_hue(grey, torch.tensor([0.37])), grey)
    views = torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    turned = shift_hue(views, torch.linspace(-0.5, 0.5, 50))
    assert torch.equal(turned.amin(1), views.amin(1))
    torch.testing.assert_close(turned.amax(1), views.amax(1), rtol=0, atol=1e-6)
