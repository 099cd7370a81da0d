"""The random draws of views: a pure function of (seed, epoch, sample id, view), drawn once, here, for every engine.

Bits come from Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), a counter-based
generator: no state, so neither batch size, order, world size nor resume point can change what a sample gets. All
arithmetic after it is exact integers, or additions, multiplications, divisions and square roots of float64, which
IEEE 754 fixes to the last bit on every machine; library exp and log, which are not fixed so, are left out.

All of it is numpy on the host: a few hundred operations on some thousand numbers, which take less time there than
starting them on an accelerator would, and what was drawn for whom is known without asking the accelerator.
"""

import math
from dataclasses import dataclass, fields
from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from stages.views.policy import Policy
from stages.views.transfer import to_device

CROP_TRIES = 10
"""As in torchvision's RandomResizedCrop, after which a central crop is taken."""

ORDERS = tuple(permutations(range(4)))
"""The 24 orders of the operators (0 brightness, 1 contrast, 2 saturation, 3 hue)."""
_ORDERS = np.array(ORDERS, dtype=np.int64)

# Which of its uniforms each draw of a view takes. New draws go to the end, so that old ones keep their bits.
_AREA = slice(0, 10)
_RATIO = slice(10, 20)
_TOP, _LEFT, _HORIZONTAL_FLIP, _VERTICAL_FLIP, _TURNED, _TURN = range(20, 26)
_JITTER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _ORDER, _GREY, _BLUR, _SIGMA = range(26, 35)
_BLOCKS = 9  # of four words

_WORD = 0xFFFFFFFF

Counter = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


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
        """The same on another device: see to_device."""
        return Parameters(*(to_device(getattr(self, field.name), device) for field in fields(self)))


def philox(counter: Counter, key: tuple[int, int]) -> Counter:
    """Philox4x32-10: four random 32-bit words for each counter.

    Args:
        counter: four uint64 arrays whose shapes broadcast, each element from 0 to 2**32 - 1.
        key: two words of 32 bits.
    Returns:
        Four uint64 arrays of the shape that they broadcast to, each element from 0 to 2**32 - 1.
    """
    word0, word1, word2, word3 = counter
    key0, key1 = key
    for _ in range(10):
        product0, product1 = word0 * 0xD2511F53, word2 * 0xCD9E8D57
        word0, word1, word2, word3 = (
            (product1 >> 32) ^ word1 ^ key0,
            product1 & _WORD,
            (product0 >> 32) ^ word3 ^ key1,
            product0 & _WORD,
        )
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return word0, word1, word2, word3


def uniforms(seed: int, sample_ids: Tensor, epoch: int | Tensor, views: int) -> np.ndarray:
    """Uniform numbers of 24 bits in [0, 1) for each view of each sample: float64 [36, views * B], view-major.

    Counter: sample id (two words), epoch, view and block (16 bits each). Key: the seed, modulo 2**64.
    """
    ids = sample_ids.cpu().numpy().astype(np.uint64)
    epochs = torch.as_tensor(epoch).cpu().numpy().astype(np.int64).astype(np.uint64).reshape(-1)
    block = np.arange(_BLOCKS, dtype=np.uint64)[:, None, None]
    place = np.arange(views, dtype=np.uint64)[:, None] * 0x10000 + block  # [blocks, views, 1]
    counter = (ids & _WORD, ids >> 32, epochs & _WORD, place)
    words = np.stack(philox(counter, (seed & _WORD, (seed >> 32) & _WORD)), axis=1)  # [blocks, 4, views, B]
    return (words >> 8).reshape(4 * _BLOCKS, -1).astype(np.float64) * 2.0**-24


def draw(
    policy: Policy, seed: int, sample_ids: Tensor, epoch: int | Tensor, sizes: Tensor, views: int = 2
) -> Parameters:
    """Draw the parameters of all views of a batch.

    Args:
        policy: probabilities and ranges.
        seed: of the run.
        sample_ids: int64 [B].
        epoch: number of the epoch, or int64 [B], one for each sample.
        sizes: int64 [B, 2], height and width of each image.
        views: how many views of each image.
    Returns:
        Parameters of views * B views, on the host; those of a sample are bit-equal in every batch.
    """
    uniform = uniforms(seed, sample_ids, epoch, views)
    top, left, height, width = _draw_crop(policy, uniform, np.tile(sizes.cpu().numpy().astype(np.int64), (views, 1)))
    strength = policy.colour_strength
    turns = np.floor(uniform[_TURN] * 3).astype(np.int64) + 1
    drawn = {
        "top": top,
        "left": left,
        "height": height,
        "width": width,
        "horizontal_flip": uniform[_HORIZONTAL_FLIP] < policy.horizontal_flip,
        "vertical_flip": uniform[_VERTICAL_FLIP] < policy.vertical_flip,
        "quarter_turns": turns * (uniform[_TURNED] < policy.quarter_turns),
        "colour_jitter": uniform[_JITTER] < policy.colour_jitter,
        "brightness": _draw_factor(uniform[_BRIGHTNESS], policy.brightness * strength),
        "contrast": _draw_factor(uniform[_CONTRAST], policy.contrast * strength),
        "saturation": _draw_factor(uniform[_SATURATION], policy.saturation * strength),
        "hue": _between(uniform[_HUE], -policy.hue * strength, policy.hue * strength).astype(np.float32),
        "order": _ORDERS[np.floor(uniform[_ORDER] * len(ORDERS)).astype(np.int64)],
        "grey": uniform[_GREY] < policy.grey,
        "blur": uniform[_BLUR] < policy.blur,
        "blur_sigma": _between(uniform[_SIGMA], *policy.blur_sigma).astype(np.float32),
    }
    return Parameters(**{name: torch.from_numpy(values) for name, values in drawn.items()})


def _between(uniform: np.ndarray, smallest: float, largest: float) -> np.ndarray:
    return uniform * (largest - smallest) + smallest


def _draw_factor(uniform: np.ndarray, largest_change: float) -> np.ndarray:
    return _between(uniform, max(0.0, 1 - largest_change), 1 + largest_change).astype(np.float32)


def _draw_crop(
    policy: Policy, uniform: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Crop boxes as published (Szegedy et al. 2015; torchvision's RandomResizedCrop): top, left, height, width [N].

    Ten tries of area and log-uniform ratio, the first whose rounded box fits; else the largest central box whose
    ratio is in range.
    """
    image_height, image_width = sizes.T
    smallest_ratio, largest_ratio = policy.crop_ratio
    area = _between(uniform[_AREA], *policy.crop_area) * (image_height * image_width)  # [tries, N]
    ratio = _exp(_between(uniform[_RATIO], math.log(smallest_ratio), math.log(largest_ratio)))
    tried_width = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    tried_height = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (tried_width > 0) & (tried_width <= image_width) & (tried_height > 0) & (tried_height <= image_height)
    first, row = fits.argmax(axis=0), np.arange(len(sizes))  # the first of equal maxima
    found = fits[first, row]

    exact_ratio = image_width / image_height
    too_tall, too_wide = exact_ratio < smallest_ratio, exact_ratio > largest_ratio
    central_height = np.where(too_tall, np.rint(image_width / smallest_ratio), image_height).clip(min=1)
    central_width = np.where(too_wide, np.rint(image_height * largest_ratio), image_width).clip(min=1)
    height = np.where(found, tried_height[first, row], central_height.astype(np.int64))
    width = np.where(found, tried_width[first, row], central_width.astype(np.int64))
    free_height, free_width = image_height - height, image_width - width
    top = np.floor(uniform[_TOP] * (free_height + 1)).astype(np.int64)
    left = np.floor(uniform[_LEFT] * (free_width + 1)).astype(np.int64)
    return np.where(found, top, free_height // 2), np.where(found, left, free_width // 2), height, width


def _exp(exponent: np.ndarray) -> np.ndarray:
    """exp of float64 by exact steps: exp(x) = exp(x / 256) ** 256, with eight terms of the series. |x| < 10: 1e-12."""
    small = exponent * (1 / 256)
    result = np.ones_like(small)
    for divisor in range(8, 0, -1):  # Horner: 1 + x (1 + x/2 (1 + x/3 (...)))
        result = result * small * (1 / divisor) + 1.0
    for _ in range(8):
        result = result * result
    return result
