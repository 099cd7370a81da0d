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

import numpy as np
import torch
from torch import Tensor

from stages.views.blur import gaussian_blur
from stages.views.draws import Parameters
from stages.views.policy import Policy
from stages.views.resample import batch_parts, resample
from stages.views.transfer import to_device
from stages.views.warp import plan_warp, turn

LUMA = (0.299, 0.587, 0.114)
"""ITU-R BT.601: the grey of an RGB pixel."""


def fused_views(images: Tensor, parameters: Parameters, policy: Policy) -> Tensor:
    """Views of images, by parameters that were drawn before.

    Args:
        images: uint8 [B, C, H, W], a padded canvas.
        parameters: of N = V * B views, view-major. If they are on the host, nothing is read back from an accelerator,
            and the copies to a GPU do not wait for it: a few numbers for each view, see to_device.
        policy: what is not drawn: size, interpolation, mean and std.
    Returns:
        float32 [N, C, image_size, image_size], normalised.
    """
    device, channels, size = images.device, policy.channels, policy.image_size
    rows = torch.arange(len(parameters)).view(-1, max(1, len(images)))  # [V, B]
    parameters, drawn = parameters.to(torch.device("cpu")), parameters.to(device)
    resampling = plan_warp(drawn, policy, images.shape[2:])
    mixing, mean_mixing = (to_device(each, device) for each in colour_matrices(parameters, policy))
    result = torch.empty(len(parameters), channels, size, size, device=device)
    for part in batch_parts(images, size):
        host_rows = rows[:, part].flatten()
        of_part = to_device(host_rows, device)
        blurred = to_device(host_rows[parameters.blur[host_rows]], device)
        views = turn(resample(images[part], resampling[of_part]), drawn.quarter_turns[of_part], policy)
        out = result.unflatten(0, rows.shape)[:, part]
        mix_colours(views, mixing[of_part], mean_mixing[of_part], policy, out)
        gaussian_blur(result, blurred, drawn.blur_sigma[blurred], policy.blur_kernel)
    return result


def mix_colours(views: Tensor, mixing: Tensor, mean_mixing: Tensor, policy: Policy, out: Tensor) -> None:
    """Apply colour_matrices to views [N, C, s, s], clamp and normalise, into `out` [V, B, C, s, s]."""
    pixels = views.flatten(2)  # [N, C, s * s]
    mean_and_std = torch.tensor((policy.mean, policy.std), dtype=views.dtype)
    mean, std = to_device(mean_and_std, views.device)[:, :, None]  # [C, 1] each
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

    Numpy, since these are many operations on few numbers.

    Args:
        parameters: of N views, on the host.
    Returns:
        mixing and mean_mixing, float32 [N, C, C] each, on the host.
    """
    channels, jittered = policy.channels, parameters.colour_jitter.numpy()
    brightness, contrast, saturation, hue = (
        np.where(jittered, drawn.numpy(), neutral)
        for drawn, neutral in (
            (parameters.brightness, 1.0),
            (parameters.contrast, 1.0),
            (parameters.saturation, 1.0),
            (parameters.hue, 0.0),
        )
    )
    weights = np.array(LUMA if channels == 3 else (1 / channels,) * channels)
    to_luma = np.broadcast_to(weights, (channels, channels))  # a pixel to its luma, in each channel
    rotation = hue_rotations(hue) if channels == 3 else np.eye(channels)
    to_luma_after = (weights @ rotation)[..., None, :]  # to its luma after the rotation: [N, 1, C]
    place = parameters.order.numpy().argsort(axis=1)
    contrast_before, contrast_after = _split(contrast, place[:, 1] < place[:, 3])
    saturation_before, saturation_after = _split(saturation, place[:, 2] < place[:, 3])
    before, after = contrast_before * saturation_before, contrast_after * saturation_after

    # (after + (c' - after) to_luma) rotation (before + (c - before) to_luma), multiplied out: rotation @ to_luma and
    # to_luma @ to_luma are to_luma.
    mixing = _each(before * after) * rotation
    mixing += _each(contrast_after * (contrast_before - before)) * to_luma
    mixing += _each(before * (contrast_after - after)) * to_luma_after
    of_luma = contrast_after * (1 - contrast_before) + (1 - contrast_after) * (1 - before)
    mean_mixing = _each(of_luma) * to_luma + _each(before * (1 - contrast_after)) * to_luma_after
    both = np.stack((mixing, mean_mixing)) * _each(brightness)  # [2, N, C, C]
    grey = parameters.grey.numpy()
    both[:, grey] = (weights @ both[:, grey])[:, :, None]
    mixing, mean_mixing = torch.from_numpy(both.astype(np.float32))
    return mixing, mean_mixing


def hue_rotations(hue: np.ndarray) -> np.ndarray:
    """Rotations of RGB about the grey axis, red towards green (Rodrigues): [N] shares of the circle -> [N, 3, 3]."""
    angle = _each(2 * math.pi * hue)
    along = np.full((3, 3), 1 / 3)
    across = np.array(((0, -1, 1), (1, 0, -1), (-1, 1, 0))) / math.sqrt(3)
    return along + np.cos(angle) * (np.eye(3) - along) + np.sin(angle) * across


def _split(factor: np.ndarray, comes_first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A factor before hue and after it: [N] each, 1 at the place that is not its own."""
    return np.where(comes_first, factor, 1.0), np.where(comes_first, 1.0, factor)


def _each(numbers: np.ndarray) -> np.ndarray:
    """[N] -> [N, 1, 1], to multiply matrices by."""
    return numbers[:, None, None]
