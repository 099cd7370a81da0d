"""Where each pixel of a view is taken from: crop, resize, flips and turns, for both engines."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.views.draws import Parameters
from stages.views.policy import Policy
from stages.views.resample import Boxes, Resampling, plan_resampling, resample


def warp(images: Tensor, parameters: Parameters, policy: Policy) -> Tensor:
    """Crop, resize, flip and turn.

    Args:
        images: uint8 [B, C, H, W], a padded canvas; only what lies in an image's crop box is read.
        parameters: of N = V * B views, view-major, on the images' device.
        policy: what is not drawn: size, interpolation and antialiasing.
    Returns:
        float32 [N, C, image_size, image_size] from 0 to 1.
    """
    views = resample(images, plan_warp(parameters, policy, images.shape[2:]))
    return turn(views, parameters.quarter_turns, policy)


def plan_warp(parameters: Parameters, policy: Policy, canvas: Sequence[int]) -> Resampling:
    """All of a warp but the transposition that is half of a quarter turn; canvas: height and width in pixels."""
    turns = parameters.quarter_turns
    # A turn is a transposition and a flip. Flips cost nothing in the resampling, so turns go there too:
    # one turn = flip left and right, transpose; two = both flips; three = flip top and bottom, transpose.
    boxes = Boxes(
        parameters.top,
        parameters.left,
        parameters.height,
        parameters.width,
        parameters.horizontal_flip ^ ((turns == 1) | (turns == 2)),
        parameters.vertical_flip ^ ((turns == 2) | (turns == 3)),
    )
    return plan_resampling(boxes, canvas, policy.image_size, policy.interpolation, policy.antialias)


def turn(views: Tensor, turns: Tensor, policy: Policy) -> Tensor:
    """The transpositions that are left to do: views [N, C, s, s] and their quarter turns [N] -> [N, C, s, s]."""
    if policy.quarter_turns == 0:
        return views
    return torch.where((turns % 2 == 1)[:, None, None, None], views.transpose(2, 3), views)
