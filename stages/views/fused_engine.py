"""The engine that makes a view in three steps: one warp, one affine colour transform, one blur where it was drawn.

Brightness, contrast, saturation and grey are affine in RGB, so that in whatever order they were drawn they are one
matrix for each view: colour = mixing @ pixel + mean_mixing @ mean. The mean is that of the warped view, by channel:
contrast stretches about the mean luma of the view as it is when its turn comes, which is linear in that mean. The
normalisation goes into the same matrix.

Two things are not what the Kornia engine does. Hue turns about the grey axis of RGB, where the published operator turns
in HSV, which is no linear map. And colours are clamped to 0 .. 1 once, after all operators, not after each.
tests/test_fused_engine.py measures both.
"""

import math

import torch
from torch import Tensor

from stages.views.blur import gaussian_blur
from stages.views.draws import Parameters
from stages.views.lines import keep_freed_memory
from stages.views.policy import Policy
from stages.views.resample import batch_parts, resample
from stages.views.warp import plan_warp, turn

LUMA = (0.299, 0.587, 0.114)
"""ITU-R BT.601: the grey of an RGB pixel."""


def fused_views(images: Tensor, parameters: Parameters, policy: Policy) -> Tensor:
    """Views of images, by parameters that were drawn before.

    Args:
        images: uint8 [B, C, H, W], a padded canvas.
        parameters: of N = V * B views, view-major; if on the host, an accelerator is never waited for.
        policy: what is not drawn: size, interpolation, mean and std.
    Returns:
        float32 [N, C, image_size, image_size], normalised.
    """
    device, channels, size = images.device, policy.channels, policy.image_size
    if device.type == "cpu":
        keep_freed_memory()
    rows = torch.arange(len(parameters)).view(-1, len(images))  # [V, B]
    drawn = parameters.to(device)
    resampling = plan_warp(drawn, policy, images.shape[2:])
    mixing, mean_mixing = colour_matrices(drawn, policy)
    result = torch.empty(*rows.shape, channels, size, size, device=device)
    for part in batch_parts(images, size):
        host_rows = rows[:, part].flatten()
        blurred = parameters.blur[host_rows].nonzero().squeeze(1).to(device)
        of_part = host_rows.to(device)
        views = turn(resample(images[part], resampling[of_part]), drawn.quarter_turns[of_part], policy)
        views = mix_colours(views, mixing[of_part], mean_mixing[of_part], policy)
        gaussian_blur(views, blurred, drawn.blur_sigma[of_part][blurred], policy.blur_kernel)
        result[:, part] = views.unflatten(0, (len(rows), -1))
    return result.flatten(0, 1)


def mix_colours(views: Tensor, mixing: Tensor, mean_mixing: Tensor, policy: Policy) -> Tensor:
    """Apply colour_matrices, clamp and normalise: [N, C, s, s], from 0 to 1 -> [N, C, s, s]."""
    pixels = views.flatten(2)  # [N, C, s * s]
    mean, std = views.new_tensor((policy.mean, policy.std))[:, :, None]  # [C, 1] each
    offset = torch.baddbmm(-mean, mean_mixing, pixels.mean(2, keepdim=True)) / std
    result = torch.baddbmm(offset, mixing / std, pixels).view_as(views)
    for channel, (middle, spread) in enumerate(zip(policy.mean, policy.std, strict=True)):
        result[:, channel].clamp_((0 - middle) / spread, (1 - middle) / spread)
    return result


def colour_matrices(parameters: Parameters, policy: Policy) -> tuple[Tensor, Tensor]:
    """What colour jitter and grey come to: colour = mixing @ pixel + mean_mixing @ mean of the view's pixels.

    Returns:
        mixing and mean_mixing, float32 [N, C, C] each.
    """
    device, channels = parameters.hue.device, policy.channels
    identity = torch.eye(channels, device=device)
    weights = LUMA if channels == 3 else (1 / channels,) * channels
    to_grey = torch.tensor(weights, device=device).expand(channels, channels)  # a pixel to its luma, in each channel
    jittered = parameters.colour_jitter
    brightness, contrast, saturation = (
        torch.where(jittered, factor, 1.0)[:, None, None]
        for factor in (parameters.brightness, parameters.contrast, parameters.saturation)
    )
    unchanged = identity.expand(len(parameters), -1, -1)
    hue = hue_rotations(torch.where(jittered, parameters.hue, 0.0)) if channels == 3 else unchanged
    operators = torch.stack((brightness * identity, contrast * identity, to_grey.lerp(identity, saturation), hue), 1)
    of_grey_mean = (1 - contrast) * to_grey
    mixing, mean_mixing = unchanged, torch.zeros_like(unchanged)
    view = torch.arange(len(parameters), device=device)
    for number in parameters.order.T:  # [N], the operator of each view at this place of the order
        operator = operators[view, number]
        grey_mean = of_grey_mean @ (mixing + mean_mixing) * (number == 1)[:, None, None]
        mixing, mean_mixing = operator @ mixing, operator @ mean_mixing + grey_mean
    grey = parameters.grey[:, None, None]
    return torch.where(grey, to_grey @ mixing, mixing), torch.where(grey, to_grey @ mean_mixing, mean_mixing)


def hue_rotations(hue: Tensor) -> Tensor:
    """Rotations of RGB about the grey axis, red towards green (Rodrigues): [N] shares of the circle -> [N, 3, 3]."""
    angle = (2 * math.pi) * hue[:, None, None]
    along = torch.full((3, 3), 1 / 3, device=hue.device)
    across = torch.tensor(((0, -1, 1), (1, 0, -1), (-1, 1, 0)), device=hue.device) / math.sqrt(3)
    return along + torch.cos(angle) * (torch.eye(3, device=hue.device) - along) + torch.sin(angle) * across
