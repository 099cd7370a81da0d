"""The random draws of views: a pure function of (seed, epoch, sample id, view), drawn once, here, for every engine.

Bits come from Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), a counter-based
generator: no state, so neither batch size, order, world size nor resume point can change what a sample gets. All
arithmetic after it is exact integers, or additions, multiplications, divisions and square roots of float64, which
IEEE 754 fixes to the last bit on every device; library exp and log, which are not fixed so, are left out.
"""

import math
from dataclasses import dataclass, fields
from functools import cache
from itertools import permutations

import torch
from torch import Tensor

from stages.views.policy import Policy

CROP_TRIES = 10
"""As in torchvision's RandomResizedCrop, after which a central crop is taken."""

ORDERS = tuple(permutations(range(4)))
"""The 24 orders of the operators (0 brightness, 1 contrast, 2 saturation, 3 hue)."""

# Where each draw of a view lies in its row of uniforms. New draws go to the end, so that old ones keep their bits.
_AREA = slice(0, 10)
_RATIO = slice(10, 20)
_TOP, _LEFT, _HORIZONTAL_FLIP, _VERTICAL_FLIP, _TURNED, _TURN = range(20, 26)
_JITTER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _ORDER, _GREY, _BLUR, _SIGMA = range(26, 35)
_BLOCKS = 9  # of four words

_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Parameters:
    """What was drawn for N = views * B views, view-major: the first B belong to view 0. All tensors are [N].

    Attributes:
        top, left, height, width: int64, the crop box in pixels of the image; it lies inside the image.
        horizontal_flip, vertical_flip: bool, applied to the resized crop.
        quarter_turns: int64, 0 to 3 turns by 90 degrees against the clock, after the flips.
        colour_jitter: bool, whether the four operators are applied at all.
        brightness, contrast, saturation: float32 factors, 1 changes nothing.
        hue: float32 shift as a share of the colour circle, 0 changes nothing.
        order: int64 [N, 4], the operator at each of the four positions: 0 brightness, 1 contrast, 2 saturation, 3 hue.
        grey, blur: bool.
        blur_sigma: float32, in pixels of the view.
    """

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    horizontal_flip: Tensor
    vertical_flip: Tensor
    quarter_turns: Tensor
    colour_jitter: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    order: Tensor
    grey: Tensor
    blur: Tensor
    blur_sigma: Tensor

    def __len__(self) -> int:
        return len(self.top)

    def __getitem__(self, rows: Tensor | slice) -> "Parameters":
        """The parameters of some of the views."""
        return Parameters(*(getattr(self, field.name)[rows] for field in fields(self)))

    def to(self, device: torch.device) -> "Parameters":
        """The same on another device."""
        return Parameters(*(getattr(self, field.name).to(device) for field in fields(self)))


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four random 32-bit words for each counter.

    Args:
        counter: four int64 tensors of equal shape, each element from 0 to 2**32 - 1.
        key: two words of 32 bits.
    Returns:
        Four int64 tensors of that shape, each element from 0 to 2**32 - 1.
    """
    word0, word1, word2, word3 = counter
    key0, key1 = key
    for _ in range(10):
        # The 64-bit product wraps into a signed number; its bits are those of the unsigned one, which is all we take.
        product0, product1 = word0 * 0xD2511F53, word2 * 0xCD9E8D57
        word0, word1, word2, word3 = (
            ((product1 >> 32) & _WORD) ^ word1 ^ key0,
            product1 & _WORD,
            ((product0 >> 32) & _WORD) ^ word3 ^ key1,
            product0 & _WORD,
        )
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return word0, word1, word2, word3


def uniforms(seed: int, sample_ids: Tensor, epoch: int | Tensor, views: int) -> Tensor:
    """Uniform numbers of 24 bits in [0, 1) for each view of each sample: float64 [views * B, 36], view-major.

    Counter: sample id (two words), epoch, view and block (16 bits each). Key: the seed, modulo 2**64.
    """
    device = sample_ids.device
    view = torch.arange(views, device=device)[:, None, None]
    block = torch.arange(_BLOCKS, device=device)
    place = (view * 0x10000 + block).expand(views, len(sample_ids), _BLOCKS)
    ids = sample_ids.to(torch.int64)[:, None].expand_as(place)
    epochs = torch.as_tensor(epoch, device=device).to(torch.int64).view(-1, 1).expand_as(place)
    counter = (ids & _WORD, (ids >> 32) & _WORD, epochs & _WORD, place)
    words = torch.stack(philox(counter, (seed & _WORD, (seed >> 32) & _WORD)), dim=-1)
    return (words >> 8).flatten(2).flatten(0, 1).to(torch.float64) * 2.0**-24


def draw(
    policy: Policy, seed: int, sample_ids: Tensor, epoch: int | Tensor, sizes: Tensor, views: int = 2
) -> Parameters:
    """Draw the parameters of all views of a batch.

    Args:
        policy: probabilities and ranges.
        seed: of the run.
        sample_ids: int64 [B].
        epoch: number of the epoch, or int64 [B], one for each sample.
        sizes: int64 [B, 2], height and width of each image, on the device of `sample_ids`.
        views: how many views of each image.
    Returns:
        Parameters of views * B views on that device; those of a sample are bit-equal in every batch, on every device.
    """
    device = sample_ids.device
    if device.type == "mps":  # which has no float64
        return draw(policy, seed, sample_ids.cpu(), epoch, sizes.cpu(), views).to(device)
    uniform = uniforms(seed, sample_ids, epoch, views)
    top, left, height, width = _draw_crop(policy, uniform, sizes.to(torch.int64).repeat(views, 1))
    strength = policy.colour_strength
    turns = torch.floor(uniform[:, _TURN] * 3).to(torch.int64) + 1
    return Parameters(
        top=top,
        left=left,
        height=height,
        width=width,
        horizontal_flip=uniform[:, _HORIZONTAL_FLIP] < policy.horizontal_flip,
        vertical_flip=uniform[:, _VERTICAL_FLIP] < policy.vertical_flip,
        quarter_turns=turns * (uniform[:, _TURNED] < policy.quarter_turns),
        colour_jitter=uniform[:, _JITTER] < policy.colour_jitter,
        brightness=_draw_factor(uniform[:, _BRIGHTNESS], policy.brightness * strength),
        contrast=_draw_factor(uniform[:, _CONTRAST], policy.contrast * strength),
        saturation=_draw_factor(uniform[:, _SATURATION], policy.saturation * strength),
        hue=_between(uniform[:, _HUE], -policy.hue * strength, policy.hue * strength).float(),
        order=_orders_on(device)[torch.floor(uniform[:, _ORDER] * len(ORDERS)).to(torch.int64)],
        grey=uniform[:, _GREY] < policy.grey,
        blur=uniform[:, _BLUR] < policy.blur,
        blur_sigma=_between(uniform[:, _SIGMA], *policy.blur_sigma).float(),
    )


@cache
def _orders_on(device: torch.device) -> Tensor:
    """ORDERS [24, 4], uploaded once."""
    return torch.tensor(ORDERS, device=device)


def _between(uniform: Tensor, smallest: float, largest: float) -> Tensor:
    return uniform * (largest - smallest) + smallest


def _draw_factor(uniform: Tensor, largest_change: float) -> Tensor:
    return _between(uniform, max(0.0, 1 - largest_change), 1 + largest_change).float()


def _draw_crop(policy: Policy, uniform: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Crop boxes as published (Szegedy et al. 2015; torchvision's RandomResizedCrop): top, left, height, width [N].

    Ten tries of area and log-uniform ratio, the first whose rounded box fits; else the largest central box whose
    ratio is in range.
    """
    image_height, image_width = sizes.unbind(1)
    smallest_ratio, largest_ratio = policy.crop_ratio
    area = _between(uniform[:, _AREA], *policy.crop_area) * (image_height * image_width)[:, None]  # [N, tries]
    ratio = _exp(_between(uniform[:, _RATIO], math.log(smallest_ratio), math.log(largest_ratio)))
    tried_width = torch.round(torch.sqrt(area * ratio)).to(torch.int64)
    tried_height = torch.round(torch.sqrt(area / ratio)).to(torch.int64)
    fits = (tried_width > 0) & (tried_width <= image_width[:, None])
    fits &= (tried_height > 0) & (tried_height <= image_height[:, None])
    first = fits.to(torch.int8).argmax(dim=1, keepdim=True)  # the first of equal maxima
    found = fits.gather(1, first).squeeze(1)

    exact_height, exact_width = sizes.to(torch.float64).unbind(1)
    central_height = torch.where(
        exact_width / exact_height < smallest_ratio, torch.round(exact_width / smallest_ratio), exact_height
    )
    central_width = torch.where(
        exact_width / exact_height > largest_ratio, torch.round(exact_height * largest_ratio), exact_width
    )
    central_height, central_width = central_height.clamp(min=1).long(), central_width.clamp(min=1).long()
    height = torch.where(found, tried_height.gather(1, first).squeeze(1), central_height)
    width = torch.where(found, tried_width.gather(1, first).squeeze(1), central_width)
    free_height, free_width = image_height - height, image_width - width
    top = torch.floor(uniform[:, _TOP] * (free_height + 1)).to(torch.int64)
    left = torch.floor(uniform[:, _LEFT] * (free_width + 1)).to(torch.int64)
    return (
        torch.where(found, top, free_height // 2),
        torch.where(found, left, free_width // 2),
        height,
        width,
    )


def _exp(exponent: Tensor) -> Tensor:
    """exp of float64 by exact steps: exp(x) = exp(x / 256) ** 256, with eight terms of the series. |x| < 10: 1e-12."""
    small = exponent * (1 / 256)
    result = torch.ones_like(small)
    for divisor in range(8, 0, -1):  # Horner: 1 + x (1 + x/2 (1 + x/3 (...)))
        result = result * small * (1 / divisor) + 1.0
    for _ in range(8):
        result = result * result
    return result
