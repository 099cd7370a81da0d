"""Hue of RGB pictures turned in HSV, as the published operator does, without going to HSV and back.

On CPUs Kornia's adjust_hue takes more than half of the time of all that the Kornia engine does.
"""

import torch
from torch import Tensor


def shift_hue(views: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of each view; saturation and value stay as they are.

    In HSV a colour is its largest and its smallest channel, their difference c (chroma), and a place on a circle of six
    parts, on which each channel goes from smallest to largest, stays there for two parts, and goes back (Smith 1978,
    "Color gamut transform pairs"). All is computed c times as large, so that nothing is divided and grey stays grey.

    Args:
        views: float [N, 3, H, W], from 0 to 1.
        shift: float [N], shares of the circle from -1/2 to 1/2.
    Returns:
        [N, 3, H, W]: kornia.enhance.adjust_hue(views, 2 pi shift), up to rounding.
    """
    red, green, blue = views.unbind(1)
    smallest = torch.minimum(torch.minimum(red, green), blue)
    chroma = torch.maximum(torch.maximum(red, green), blue).sub_(smallest)
    place = torch.where(
        (red >= green) & (red >= blue),
        green - blue,
        torch.where(green >= blue, (blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4)),
    )  # from -1 to 5, times c
    place.addcmul_(chroma, 6 * shift[:, None, None])
    circle = 6 * chroma
    place.add_(circle * (place < 0)).sub_(circle * (place >= circle))
    result = torch.empty_like(views)
    # Red is smallest at 3 and green and blue are largest at 2 and 4: how far away that is, times c, is what they gain.
    _level(place.sub(chroma, alpha=3).abs_().sub_(chroma), chroma, smallest, result[:, 0])
    for channel, at in ((1, 2), (2, 4)):
        nearness = place.sub(chroma, alpha=at).abs_().neg_().add_(chroma, alpha=2)
        _level(nearness, chroma, smallest, result[:, channel])
    return result


def _level(gain: Tensor, chroma: Tensor, smallest: Tensor, out: Tensor) -> None:
    """smallest + gain, cut to what lies between 0 and chroma."""
    torch.add(torch.minimum(gain.clamp_(min=0), chroma), smallest, out=out)
