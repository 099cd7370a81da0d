"""The engine that follows the published operators one by one, on batches: Kornia's functions, and an equal hue.

Crop, flips and turns; the four colour operators in the order that was drawn, clamped in between; grey; blur;
normalisation. An operator runs only on the views that it was drawn for.
"""

import torch
from kornia.color import rgb_to_grayscale
from kornia.enhance.adjust import (
    adjust_brightness_accumulative,
    adjust_contrast_with_mean_subtraction,
    adjust_saturation_with_gray_subtraction,
)
from kornia.filters import gaussian_blur2d
from torch import Tensor

from stages.views.draws import Parameters
from stages.views.hue import shift_hue
from stages.views.policy import Policy
from stages.views.resample import batch_parts
from stages.views.warp import warp

HOST_FLOATS = 2**22
"""Numbers that a CPU works on at once: more than its caches like best, since Kornia's operators take long to start."""


def kornia_views(images: Tensor, parameters: Parameters, policy: Policy) -> Tensor:
    """Views of images, by parameters that were drawn before.

    Args:
        images: uint8 [B, C, H, W], a padded canvas.
        parameters: of N = V * B views, view-major.
        policy: what is not drawn: size, interpolation, mean and std.
    Returns:
        float32 [N, C, image_size, image_size], normalised.
    """
    size, parameters = policy.image_size, parameters.to(images.device)
    rows = torch.arange(len(parameters), device=images.device).view(-1, max(1, len(images)))  # [V, B]
    result = torch.empty(*rows.shape, images.shape[1], size, size, device=images.device)
    for part in batch_parts(images, size, HOST_FLOATS):
        drawn = parameters[rows[:, part].flatten()]
        views = warp(images[part], drawn, policy)
        jitter_colours(views, drawn, policy)
        take_colour_away(views, drawn)
        blur(views, drawn, policy)
        result[:, part] = normalise(views, policy.mean, policy.std).unflatten(0, (len(rows), -1))
    return result.flatten(0, 1)


def jitter_colours(views: Tensor, parameters: Parameters, policy: Policy) -> None:
    """Brightness, contrast, saturation and hue in the drawn order, in place; the last two are only for RGB."""
    operators = (
        (policy.brightness, parameters.brightness, adjust_brightness_accumulative),
        (policy.contrast, parameters.contrast, _adjust_contrast),
        (policy.saturation, parameters.saturation, adjust_saturation_with_gray_subtraction),
        (policy.hue, parameters.hue, shift_hue),
    )
    # Which views an operator takes is read on the host, once for all.
    order = torch.where(parameters.colour_jitter[:, None], parameters.order, -1).cpu()
    for position in range(len(operators)):
        for number, (largest_change, factor, adjust) in enumerate(operators):
            chosen = (order[:, position] == number).nonzero().squeeze(1).to(views.device)
            if largest_change * policy.colour_strength > 0 and len(chosen):
                views.index_copy_(0, chosen, adjust(views.index_select(0, chosen), factor.index_select(0, chosen)))


def _adjust_contrast(views: Tensor, factor: Tensor) -> Tensor:
    """Stretch about the mean grey of each RGB view; about the mean of all channels where they are no colours.

    For the latter Kornia 0.8 takes the mean of the whole batch.
    """
    if views.shape[1] == 3:
        return adjust_contrast_with_mean_subtraction(views, factor)
    return views.mean(dim=(1, 2, 3), keepdim=True).lerp(views, factor[:, None, None, None]).clamp_(0, 1)


def take_colour_away(views: Tensor, parameters: Parameters) -> None:
    """Replace the views that were drawn for it by their luma (ITU-R BT.601), in place."""
    chosen = parameters.grey.nonzero().squeeze(1)
    if len(chosen):
        views.index_copy_(0, chosen, rgb_to_grayscale(views.index_select(0, chosen)).expand(-1, 3, -1, -1))


def blur(views: Tensor, parameters: Parameters, policy: Policy) -> None:
    """Gaussian blur of the views that were drawn for it, each with its own sigma, mirrored at the edges, in place."""
    chosen = parameters.blur.nonzero().squeeze(1)
    if len(chosen):
        sigma = parameters.blur_sigma.index_select(0, chosen)[:, None].expand(-1, 2)
        views.index_copy_(0, chosen, gaussian_blur2d(views.index_select(0, chosen), policy.blur_kernel, sigma))


def normalise(views: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(views - mean) / std by channel, in place."""
    return views.sub_(views.new_tensor(mean)[:, None, None]).div_(views.new_tensor(std)[:, None, None])
