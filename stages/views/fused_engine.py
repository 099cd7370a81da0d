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
    result = torch.empty(len(parameters), channels, size, size, device=device)
    for part in batch_parts(images, size):
        host_rows = rows[:, part].flatten()
        of_part, blurred = host_rows.to(device), host_rows[parameters.blur[host_rows]].to(device)
        views = turn(resample(images[part], resampling[of_part]), drawn.quarter_turns[of_part], policy)
        out = result.unflatten(0, rows.shape)[:, part]
        mix_colours(views, mixing[of_part], mean_mixing[of_part], policy, out)
        gaussian_blur(result, blurred, drawn.blur_sigma[blurred], policy.blur_kernel)
    return result


def mix_colours(views: Tensor, mixing: Tensor, mean_mixing: Tensor, policy: Policy, out: Tensor) -> None:
    """Apply colour_matrices to views [N, C, s, s], clamp and normalise, into `out` [V, B, C, s, s]."""
    pixels = views.flatten(2)  # [N, C, s * s]
    mean, std = views.new_tensor((policy.mean, policy.std))[:, :, None]  # [C, 1] each
    offset = torch.baddbmm(-mean, mean_mixing, pixels.mean(2, keepdim=True)) / std
    operands = zip(*(each.split(out.shape[1]) for each in (offset, mixing / std, pixels)), strict=True)
    for view, (offset_of_view, mixing_of_view, pixels_of_view) in zip(out, operands, strict=True):
        torch.baddbmm(offset_of_view, mixing_of_view, pixels_of_view, out=view.flatten(2))
    for channel, (middle, spread) in enumerate(zip(policy.mean, policy.std, strict=True)):
        out[:, :, channel].clamp_((0 - middle) / spread, (1 - middle) / spread)


def colour_matrices(parameters: Parameters, policy: Policy) -> tuple[Tensor, Tensor]:
    """What colour jitter and grey come to: colour = mixing @ pixel + mean_mixing @ mean of the view's pixels.

    Brightness only multiplies, contrast c and saturation s leave the mean luma and each pixel's luma as they were, and
    so these three are the same in any order: c s pixel + c (1 - s) luma + (1 - c) mean luma. Hue keeps what is grey but
    no luma. What the drawn order decides is thus whether contrast and saturation come before hue or after it.

    Returns:
        mixing and mean_mixing, float32 [N, C, C] each.
    """
    channels, jittered = policy.channels, parameters.colour_jitter
    brightness, contrast, saturation, hue = (
        torch.where(jittered, drawn, neutral)
        for drawn, neutral in (
            (parameters.brightness, 1.0),
            (parameters.contrast, 1.0),
            (parameters.saturation, 1.0),
            (parameters.hue, 0.0),
        )
    )
    weights = torch.tensor(LUMA if channels == 3 else (1 / channels,) * channels, device=hue.device)
    to_luma = weights.expand(channels, channels)  # a pixel to its luma, in each channel
    rotation = hue_rotations(hue) if channels == 3 else torch.eye(channels, device=hue.device).expand(len(hue), -1, -1)
    to_luma_after = (weights @ rotation)[:, None].expand(-1, channels, -1)  # to its luma after the rotation
    places = (parameters.order[:, :, None] == torch.arange(1, 4, device=hue.device)).int().argmax(1)  # [N, 3]
    comes_first = places[:, :2] < places[:, 2:]
    contrast_before, contrast_after = _split(contrast, comes_first[:, 0])
    saturation_before, saturation_after = _split(saturation, comes_first[:, 1])
    before, after = contrast_before * saturation_before, contrast_after * saturation_after

    def terms(of_luma: Tensor, of_luma_after: Tensor) -> Tensor:
        now, later = ((brightness * share)[:, None, None] for share in (of_luma, of_luma_after))
        return now * to_luma + later * to_luma_after

    # (after + (c' - after) to_luma) rotation (before + (c - before) to_luma), multiplied out: rotation @ to_luma and
    # to_luma @ to_luma are to_luma.
    mixing = (brightness * before * after)[:, None, None] * rotation + terms(
        contrast_after * (contrast_before - before), before * (contrast_after - after)
    )
    mean_mixing = terms(
        contrast_after * (1 - contrast_before) + (1 - contrast_after) * (1 - before), before * (1 - contrast_after)
    )
    grey = parameters.grey[:, None, None]
    mixing, mean_mixing = (torch.where(grey, (weights @ each)[:, None], each) for each in (mixing, mean_mixing))
    return mixing, mean_mixing


def _split(factor: Tensor, comes_first: Tensor) -> tuple[Tensor, Tensor]:
    """A factor before hue and after it: [N] each, 1 at the place that is not its own."""
    return torch.where(comes_first, factor, 1.0), torch.where(comes_first, 1.0, factor)


def hue_rotations(hue: Tensor) -> Tensor:
    """Rotations of RGB about the grey axis, red towards green (Rodrigues): [N] shares of the circle -> [N, 3, 3]."""
    angle = (2 * math.pi) * hue[:, None, None]
    along = torch.full((3, 3), 1 / 3, device=hue.device)
    across = torch.tensor(((0, -1, 1), (1, 0, -1), (-1, 1, 0)), device=hue.device) / math.sqrt(3)
    return along + torch.cos(angle) * (torch.eye(3, device=hue.device) - along) + torch.sin(angle) * across
