"""How far apart two thumbnails are once one is laid over the other: moved, scaled, and freed of its own light.

A coarse search over shifts and scales, then Gauss-Newton steps on both (Lucas and Kanade 1981; gain and offset as in
Evangelidis and Psarakis 2008), then the distance.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.images.fingerprints import ILLUMINATION, SIDE, blur, filtered, planes

NOISE = 0.7
"""Standard deviation, in pixels, of the blur that takes away what compression and interpolation add."""

# The coarse search, at half size.
HALF = SIDE // 2
WINDOW = 12
SCALES = (0.9, 1.0, 1.1)
LEAST_CORRELATION = 0.75
"""Pairs that correlate less after the coarse search are given up: 1 in 200 of what is found without it."""

STEPS, FIRST_STEPS = 7, 3
HOPE = 0.2
"""By how much a distance after the first steps may exceed what is asked for; else the pair is given up. Of the
3,906 pairs of CIFAR-10 within 0.15 that loses 3, of the 7,361 within 0.3 one."""
LARGEST_SCALE, LARGEST_SHIFT = 1.25, 0.3
"""Bounds of the refinement; shifts as a share of half the side."""

# The distance.
DETAIL = 3.5
NEIGHBOURHOOD = 3.0
"""Standard deviations, in pixels: structures up to DETAIL are compared, the contrast around each evened out."""
CONTRAST_FLOOR = 0.005
"""On the scale from 0 to 1: contrast at the level of rounding and compression is not lifted."""
DOUBT = 30.0
"""Pixels' worth of evidence against a pair, of 1,024: images with next to nothing in them cannot be told apart."""

PAIRS_AT_ONCE, REFINED_AT_ONCE = 128, 64
"""What stays in a processor's cache."""


def aligned_distances(first: Tensor, second: Tensor, is_mirrored: Tensor, most: float = 2.0) -> Tensor:
    """Distance of each pair after alignment, from nearly 0 (equal, up to light) over 1 (unrelated) to 2.

    One less the correlation of evened-out detail, so gain and offset of brightness, also slowly varying ones, and
    colours have no effect. Evidence is counted in pixels with structure: where there is little, the distance grows.

    Args:
        first, second: uint8 [P, K, 32, 32], thumbnails.
        is_mirrored: bool [P]; the first of a pair is to be mirrored.
        most: pairs that will hardly come as close as that are not refined to the end.

    Returns:
        float64 [P], rounded to 4 decimals; 1 where the coarse search gave a pair up.
    """
    first = first.clone()
    first[is_mirrored] = first[is_mirrored].flip(-1)
    distances = torch.ones(len(first), dtype=torch.float64)
    if len(first) == 0:
        return distances
    parts = [
        _coarse(planes(one), planes(other))
        for one, other in zip(first.split(PAIRS_AT_ONCE), second.split(PAIRS_AT_ONCE), strict=True)
    ]
    correlation, poses = (torch.cat(one) for one in zip(*parts, strict=True))
    fits = _Fits(poses, poses.clone(), torch.full_like(correlation, -2.0))
    kept = torch.where(correlation >= LEAST_CORRELATION)[0]
    # Few are left, and fewer after the first steps; together they fill batches again.
    for steps in (FIRST_STEPS, STEPS - FIRST_STEPS):
        for part in kept.split(REFINED_AT_ONCE):
            moving, fixed = planes(first[part]), planes(second[part])
            before = fits.of(part)
            after = _refine(_without_illumination(moving), _without_illumination(fixed), before, steps)
            for whole, refined in zip(fits, after, strict=True):
                whole[part] = refined
            distance = _distance(_evened(moving[:, :1]), _evened(fixed[:, :1]), after.best_poses)
            distances[part] = distance.double()
        kept = kept[distances[kept] <= most + HOPE]
    return distances.round(decimals=4)


class _Fits(NamedTuple):
    """Where the refinement is: the poses that are next, the best so far, [P, 4], and the correlations of these, [P]."""

    poses: Tensor
    best_poses: Tensor
    best: Tensor

    def of(self, pairs: Tensor) -> "_Fits":
        return _Fits(*(one[pairs] for one in self))


def _without_illumination(values: Tensor) -> Tensor:
    return filtered(values, blur(NOISE)) - filtered(values, blur(ILLUMINATION))


def _evened(light: Tensor) -> Tensor:
    """Detail divided by the contrast around it: [P, 1, 32, 32], about 1 where there is structure, 0 where none."""
    detail = filtered(light, blur(NOISE)) - filtered(light, blur(DETAIL))
    contrast = filtered(detail.square(), blur(NEIGHBOURHOOD)).clamp_min(0).sqrt()
    return detail / (contrast + CONTRAST_FLOOR)


# Poses are [P, 4]: scale and shift along the width, scale and shift along the height. On coordinates from -1 to 1, the
# pixel of the second image at x lies in the first at scale * x + shift.


def _coarse(moving: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor]:
    """The best of 3 scales and 5 x 5 shifts, by the middle of the second image: correlations [P] and poses [P, 4]."""
    moving, fixed = _half_size(moving), _half_size(fixed)
    pairs = len(moving)
    crops = torch.einsum("sij,pcjk,slk->pscil", _crops(), fixed, _crops()).flatten(3)
    crops = (crops - crops.mean(dim=3, keepdim=True)).flatten(2)  # [P, 3, K * 144]
    crops = crops / crops.norm(dim=2, keepdim=True).clamp_min(1e-6)
    windows = moving.unfold(2, WINDOW, 1).unfold(3, WINDOW, 1).permute(0, 2, 3, 1, 4, 5)
    side = windows.shape[1]
    products = torch.bmm(crops, windows.reshape(pairs, side**2, -1).transpose(1, 2))  # [P, 3, 25]
    # The crops have mean 0, so that those of the windows do not matter; their lengths come from sums over windows.
    sums, squares = filtered(moving, _sums()), filtered(moving.square(), _sums())
    lengths = (squares - sums.square() / WINDOW**2).sum(dim=1).clamp_min(0).sqrt().clamp_min(1e-6)  # [P, 5, 5]
    best, place = (products / lengths.flatten(1)[:, None]).flatten(1).max(dim=1)
    scale = torch.tensor(SCALES)[place // side**2]
    place = place % side**2
    down, right = (place // side - side // 2) / (HALF / 2), (place % side - side // 2) / (HALF / 2)
    return best, torch.stack([scale, right, scale, down], dim=1)


def _half_size(values: Tensor) -> Tensor:
    fine, slow = _halves()
    return filtered(values, fine) - filtered(values, slow)


@lru_cache
def _halves() -> tuple[Tensor, Tensor]:
    """Half of 32 pixels, without noise; and the slow changes of light of them, [16, 32] each."""
    halves = F.avg_pool1d(torch.eye(SIDE)[None], 2)[0].T
    return halves @ blur(NOISE), halves @ blur(ILLUMINATION)


@lru_cache
def _sums() -> Tensor:
    """Sums over 12 neighbours of 16 pixels of a row, at each of 5 places: [5, 16]."""
    places = torch.arange(HALF) - torch.arange(HALF - WINDOW + 1)[:, None]
    return ((places >= 0) & (places < WINDOW)).float()


@lru_cache
def _crops() -> Tensor:
    """The middle 12 of 16 pixels of a row, at each scale: [3, 12, 16]."""
    places = (torch.arange(WINDOW) - (WINDOW - 1) / 2)[None] / torch.tensor(SCALES)[:, None] + (HALF - 1) / 2
    return (1 - (places[:, :, None] - torch.arange(HALF)).abs()).clamp_min(0)


def _refine(moving: Tensor, fixed: Tensor, fits: _Fits, steps: int) -> _Fits:
    """Gauss-Newton on scales and shifts, keeping the pose of highest correlation on the way."""
    poses, best_poses, best = fits
    grid = _grid()
    for _ in range(steps):
        warped, mask = _warp(moving, poses)
        image, target = _centred(warped, mask), _centred(fixed, mask)
        energy, product = image.square().sum((1, 2, 3)) + 1e-9, (image * target).sum((1, 2, 3))
        correlation = product / (energy * (target.square().sum((1, 2, 3)) + 1e-9)).sqrt()
        is_better = correlation > best
        best = torch.where(is_better, correlation, best)
        best_poses = torch.where(is_better[:, None], poses, best_poses)
        # Differences of neighbours, 2 pixels apart, by unit of the coordinates, 16 pixels long.
        right = F.pad(warped[..., 2:] - warped[..., :-2], (1, 1, 0, 0)) * (HALF / 2)
        down = F.pad(warped[..., 2:, :] - warped[..., :-2, :], (0, 0, 1, 1)) * (HALF / 2)
        slopes = torch.stack([right * grid, right, down * grid[:, None], down], dim=1) * mask[:, None]
        slopes, image = slopes.flatten(2), image.flatten(1)  # [P, 4, D], [P, D]
        # What a gain can explain is no movement.
        slopes = slopes - torch.bmm(slopes, image[:, :, None]) * image[:, None] / energy[:, None, None]
        gain = (product / energy).clamp_min(0.1)
        residual = target.flatten(1) / gain[:, None] - image
        normal = torch.bmm(slopes, slopes.transpose(1, 2))
        damping = 1e-3 * normal.diagonal(dim1=1, dim2=2).mean(dim=1) + 1e-6
        normal = normal + damping[:, None, None] * torch.eye(4)
        change = torch.linalg.solve(normal, torch.bmm(slopes, residual[:, :, None]))[:, :, 0]
        poses = poses + change.clamp(-0.1, 0.1)
        lowest = torch.tensor([1 / LARGEST_SCALE, -LARGEST_SHIFT] * 2)
        poses = poses.clamp(lowest, torch.tensor([LARGEST_SCALE, LARGEST_SHIFT] * 2))
    return _Fits(poses, best_poses, best)


def _distance(moving: Tensor, fixed: Tensor, poses: Tensor) -> Tensor:
    """One less the correlation where both images are, shrunk by the doubt; [P]."""
    warped, mask = _warp(moving, poses)
    image, target = _centred(warped, mask), _centred(fixed, mask)
    energies = (image.square().sum((1, 2, 3)) + DOUBT) * (target.square().sum((1, 2, 3)) + DOUBT)
    return 1 - (image * target).sum((1, 2, 3)) / energies.sqrt()


def _warp(images: Tensor, poses: Tensor) -> tuple[Tensor, Tensor]:
    """The images [P, K, 32, 32] as seen at the poses, and the mask [P, 1, 32, 32] of what lies inside them."""
    columns, inside_columns = _interpolation(poses[:, 0], poses[:, 1])
    rows, inside_rows = _interpolation(poses[:, 2], poses[:, 3])
    pairs, channels = images.shape[:2]
    wide = torch.bmm(images.reshape(pairs, channels * SIDE, SIDE), columns.transpose(1, 2))
    warped = rows[:, None] @ wide.view(pairs, channels, SIDE, SIDE)
    return warped, (inside_rows[:, :, None] * inside_columns[:, None, :])[:, None]


def _interpolation(scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Linear interpolation of a row as matrices [P, 32, 32], and which of its results lie inside, [P, 32]."""
    places = (_grid() * scale[:, None] + shift[:, None]) * HALF + (SIDE - 1) / 2
    inside = ((places >= -0.5) & (places <= SIDE - 0.5)).float()
    places = places.clamp(0, SIDE - 1)
    return (1 - (places[:, :, None] - torch.arange(SIDE)).abs()).clamp_min(0), inside


def _grid() -> Tensor:
    """Centres of the pixels of a row, on coordinates from -1 to 1."""
    return (torch.arange(SIDE) - (SIDE - 1) / 2) / HALF


def _centred(values: Tensor, mask: Tensor) -> Tensor:
    """Without the mean of each channel inside the mask, and 0 outside."""
    inside = mask.sum((2, 3), keepdim=True).clamp_min(1)
    return (values - (values * mask).sum((2, 3), keepdim=True) / inside) * mask
