"""How far apart two thumbnails are once one is laid over the other: moved, scaled, and freed of its own light.

A coarse search over shifts and scales, then Gauss-Newton steps on both (Lucas and Kanade 1981; gain and offset as in
Evangelidis and Psarakis 2008), then the distance.
"""

from functools import lru_cache

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

STEPS = 7
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

PAIRS_AT_ONCE = 128
"""What stays in a processor's cache."""


def aligned_distances(first: Tensor, second: Tensor, is_mirrored: Tensor) -> Tensor:
    """Distance of each pair after alignment, from nearly 0 (equal, up to light) over 1 (unrelated) to 2.

    One less the correlation of evened-out detail, so gain and offset of brightness, also slowly varying ones, and
    colours have no effect. Evidence is counted in pixels with structure: where there is little, the distance grows.

    Args:
        first, second: uint8 [P, K, 32, 32], thumbnails.
        is_mirrored: bool [P]; the first of a pair is to be mirrored.

    Returns:
        float64 [P], rounded to 4 decimals; 1 where the coarse search gave a pair up.
    """
    first = torch.where(is_mirrored[:, None, None, None], first.flip(-1), first)
    distances = torch.ones(len(first), dtype=torch.float64)
    for start in range(0, len(first), PAIRS_AT_ONCE):
        part = slice(start, start + PAIRS_AT_ONCE)
        moving, fixed = planes(first[part]), planes(second[part])
        correlation, poses = _coarse(moving, fixed)
        kept = torch.where(correlation >= LEAST_CORRELATION)[0]
        if len(kept):
            moving, fixed = moving[kept], fixed[kept]
            poses = _refine(_without_illumination(moving), _without_illumination(fixed), poses[kept])
            distances[start + kept] = _distance(_evened(moving[:, :1]), _evened(fixed[:, :1]), poses).double()
    return distances.round(decimals=4)


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
    pairs, channels = moving.shape[:2]
    windows = moving.unfold(2, WINDOW, 1).unfold(3, WINDOW, 1).permute(0, 2, 3, 1, 4, 5)
    side = windows.shape[1]
    windows = _unit(windows.reshape(pairs, side**2, channels, -1))  # [P, 25, K * 144]
    crops = torch.einsum("sij,pcjk,slk->pscil", _crops(), fixed, _crops())
    crops = _unit(crops.reshape(pairs, len(SCALES), channels, -1))  # [P, 3, K * 144]
    best, place = torch.bmm(crops, windows.transpose(1, 2)).flatten(1).max(dim=1)
    scale = torch.tensor(SCALES)[place // side**2]
    place = place % side**2
    down, right = (place // side - side // 2) / (HALF / 2), (place % side - side // 2) / (HALF / 2)
    return best, torch.stack([scale, right, scale, down], dim=1)


def _half_size(values: Tensor) -> Tensor:
    halves = F.avg_pool1d(torch.eye(SIDE)[None], 2)[0].T  # [16, 32]
    return filtered(values, halves @ blur(NOISE)) - filtered(values, halves @ blur(ILLUMINATION))


def _unit(vectors: Tensor) -> Tensor:
    """[P, n, K, D] -> [P, n, K * D], without the mean of each channel, of unit length."""
    vectors = (vectors - vectors.mean(dim=3, keepdim=True)).flatten(2)
    return vectors / vectors.norm(dim=2, keepdim=True).clamp_min(1e-6)


@lru_cache
def _crops() -> Tensor:
    """The middle 12 of 16 pixels of a row, at each scale: [3, 12, 16]."""
    places = (torch.arange(WINDOW) - (WINDOW - 1) / 2)[None] / torch.tensor(SCALES)[:, None] + (HALF - 1) / 2
    return (1 - (places[:, :, None] - torch.arange(HALF)).abs()).clamp_min(0)


def _refine(moving: Tensor, fixed: Tensor, poses: Tensor) -> Tensor:
    """Gauss-Newton on scales and shifts; the pose of highest correlation on the way, [P, 4]."""
    best = torch.full((len(moving),), -2.0)
    best_poses = poses
    grid = _grid()
    for _ in range(STEPS):
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
    return best_poses


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
