"""The first layer of an encoder, for images that are not RGB."""

from torch import Tensor, nn
from torch.nn import init

RGB_CHANNELS = 3


class UnusableBackbone(ValueError):
    """The backbone that the settings name does not exist, or does not go with the other settings."""

    exit_code = 2


def inflate(model: nn.Module, channels: int) -> None:
    """Give the first convolution of RGB images its weights' mean over RGB for each of C channels, times 3 / C.

    Grey images give what they gave before, up to rounding. timm repeats the three weights by the same factor; here no
    channel is taken for red, because which is like which is not known.

    Raises:
        UnusableBackbone: the model does not start with a convolution of RGB images.
    """
    stem = _stem(model)
    weight = stem.weight.detach().mean(dim=1, keepdim=True) * (RGB_CHANNELS / channels)
    _replace(model, stem, weight.repeat(1, channels, 1, 1))


def draw_stem(model: nn.Module, channels: int) -> None:
    """Draw the weights of the first convolution anew for C channels, with the spread that the output needs.

    Raises:
        UnusableBackbone: the model does not start with a convolution of RGB images.
    """
    stem = _stem(model)
    weight = stem.weight.detach()
    spread = float(weight.std()) * (RGB_CHANNELS / channels) ** 0.5
    _replace(model, stem, init.normal_(weight.new_empty(weight.shape[0], channels, *weight.shape[2:]), std=spread))


def _stem(model: nn.Module) -> nn.Conv2d:
    """The first layer that sees RGB images."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels == RGB_CHANNELS and layer.groups == 1:
            return layer
    raise UnusableBackbone(f"{type(model).__name__} does not start with a convolution: it takes RGB images only")


def _replace(model: nn.Module, stem: nn.Conv2d, weight: Tensor) -> None:
    stem.weight = nn.Parameter(weight.contiguous())
    stem.in_channels = weight.shape[1]
    if hasattr(model, "transform_input"):  # of googlenet and inception_v3, by the statistics of RGB images
        setattr(model, "transform_input", False)  # noqa: B010 - torch does not know the type of such an attribute
