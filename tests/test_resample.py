"""Crop and resize against torchvision and PIL, image by image."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as published

from stages.views import resample
from stages.views.policy import Interpolation
from stages.views.resample import (
    Boxes,
    batch_parts,
    crop_and_resize,
    matrices,
    plan_resampling,
    resampling_taps,
    taps_by_kind,
)

MODES: dict[Interpolation, tuple[InterpolationMode, Image.Resampling]] = {
    "bilinear": (InterpolationMode.BILINEAR, Image.Resampling.BILINEAR),
    "bicubic": (InterpolationMode.BICUBIC, Image.Resampling.BICUBIC),
    "nearest": (InterpolationMode.NEAREST_EXACT, Image.Resampling.NEAREST),
}


def random_boxes(generator: torch.Generator, sizes: Tensor) -> Boxes:
    """Any boxes inside the images, one pixel and all of it included."""
    height, width = (torch.rand(len(sizes), 2, generator=generator) * sizes).long().add(1).unbind(1)
    top, left = (
        ((sizes - torch.stack((height, width), 1) + 1) * torch.rand(len(sizes), 2, generator=generator)).long().T
    )
    flips = torch.rand(2, len(sizes), generator=generator) < 0.5
    return Boxes(top, left, height, width, flips[0], flips[1])


@pytest.fixture(params=["taps", "matrices"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tests hold for the way of accelerators too."""
    if request.param == "matrices":
        monkeypatch.setattr(resample, "taps_by_kind", resampling_taps)
        monkeypatch.setattr(resample, "_sum_taps", resample._multiply)


def resize_one_by_one(images: Tensor, boxes: Boxes, size: int, interpolation: Interpolation, antialias: bool) -> Tensor:
    results = []
    for image, top, left, height, width, mirrored, upside_down in zip(images, *boxes, strict=True):
        view = published.resized_crop(
            image.double() / 255, int(top), int(left), int(height), int(width), [size, size],
            interpolation=MODES[interpolation][0], antialias=antialias,
        )  # fmt: skip
        view = published.horizontal_flip(view) if mirrored else view
        results.append(published.vertical_flip(view) if upside_down else view)
    return torch.stack(results).clamp(0, 1).float()


# Sizes of `nearest` are powers of two: there torchvision's scale, in float32, is exact at ties.
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(
    ("interpolation", "canvas", "size"),
    [
        (interpolation, canvas, 16 if interpolation == "nearest" and size == 24 else size)
        for interpolation in MODES
        for canvas, size in (((32, 32), 32), ((61, 40), 24), ((40, 61), 24), ((90, 70), 8))
    ],
)
def test_equals_torchvision(interpolation: Interpolation, antialias: bool, canvas: tuple[int, int], size: int) -> None:
    generator = torch.Generator().manual_seed(sum(canvas))
    images = torch.randint(0, 256, (40, 3, *canvas), dtype=torch.uint8, generator=generator)
    boxes = random_boxes(generator, torch.tensor(canvas).expand(40, 2))
    ours = crop_and_resize(images, boxes, size, interpolation, antialias)
    expected = resize_one_by_one(images, boxes, size, interpolation, antialias)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("interpolation", MODES)
def test_equals_pillow(interpolation: Interpolation) -> None:
    generator = torch.Generator().manual_seed(1)
    # Of middling values: Pillow clips what bicubic overshoots between its two passes.
    images = torch.randint(64, 192, (30, 3, 50, 64), dtype=torch.uint8, generator=generator)
    boxes = random_boxes(generator, torch.tensor((50, 64)).expand(30, 2))._replace(
        horizontal_flip=torch.zeros(30, dtype=torch.bool), vertical_flip=torch.zeros(30, dtype=torch.bool)
    )
    ours = crop_and_resize(images, boxes, 16, interpolation, antialias=True)
    for image, view, top, left, height, width in zip(images, ours, *boxes[:4], strict=True):
        crop = image[:, top : top + height, left : left + width].permute(1, 2, 0).contiguous().numpy()
        expected = np.asarray(Image.fromarray(crop).resize((16, 16), MODES[interpolation][1]))
        difference = view.permute(1, 2, 0) * 255 - torch.from_numpy(expected.astype(np.float32))
        assert difference.abs().max() <= 1.1  # Pillow rounds to 8 bits after each of its two passes


def test_two_views_of_each_image() -> None:
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (5, 3, 20, 30), dtype=torch.uint8, generator=generator)
    boxes = random_boxes(generator, torch.tensor((20, 30)).expand(10, 2))
    together = crop_and_resize(images, boxes, 16, "bilinear", True)
    apart = [
        crop_and_resize(images, Boxes(*(field[half] for field in boxes)), 16, "bilinear", True)
        for half in (slice(0, 5), slice(5, 10))
    ]
    torch.testing.assert_close(together, torch.cat(apart), rtol=0, atol=1e-6)


@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize("antialias", [True, False])
def test_nothing_outside_the_box_is_read(interpolation: Interpolation, antialias: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (20, 3, 40, 33), dtype=torch.uint8, generator=generator)
    boxes = random_boxes(generator, torch.tensor((40, 33)).expand(20, 2))
    emptied = torch.full_like(images, 255)
    for before, after, top, left, height, width in zip(images, emptied, *boxes[:4], strict=True):
        box = (slice(None), slice(top, top + height), slice(left, left + width))
        after[box] = before[box]
    ours, again = (crop_and_resize(each, boxes, 12, interpolation, antialias) for each in (images, emptied))
    assert torch.equal(ours, again)


def test_rows_sum_to_one_and_whole_image_at_its_own_size_is_itself() -> None:
    generator = torch.Generator().manual_seed(4)
    boxes = random_boxes(generator, torch.tensor((50, 50)).expand(30, 2))
    for interpolation in MODES:
        plan = plan_resampling(boxes, (50, 50), 17, interpolation, antialias=True)
        rows, columns = matrices(plan.row, plan.row_weight, 50), matrices(plan.column, plan.column_weight, 50)
        torch.testing.assert_close(rows.sum(2), torch.ones(30, 17))
        torch.testing.assert_close(columns.sum(2), torch.ones(30, 17))
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=generator)
    zero, all_of_it, no = torch.zeros(2).long(), torch.full((2,), 16), torch.zeros(2, dtype=torch.bool)
    same = crop_and_resize(images, Boxes(zero, zero, all_of_it, all_of_it, no, no), 16, "bilinear", True)
    torch.testing.assert_close(same, images / 255, rtol=0, atol=1e-6)


def test_chequerboard_scaled_down_is_even_with_antialiasing_only() -> None:
    chequerboard = (torch.arange(63)[:, None] + torch.arange(63)) % 2 * 255
    images = chequerboard.to(torch.uint8).expand(1, 3, 63, 63)
    zero, side, no = torch.zeros(1).long(), torch.tensor([63]), torch.zeros(1, dtype=torch.bool)
    boxes = Boxes(zero, zero, side, side, no, no)
    for interpolation in ("bilinear", "bicubic"):
        even, moire = (crop_and_resize(images, boxes, 9, interpolation, antialias) for antialias in (True, False))
        assert (even - 0.5).abs().max() < 0.05
        assert moire.std() > 0.4


def test_both_ways_are_one() -> None:
    """Tall, wide and square canvases: sums of taps against products of matrices."""
    generator = torch.Generator().manual_seed(5)
    for canvas in ((70, 40), (40, 70), (55, 55)):
        images = torch.randint(0, 256, (7, 2, *canvas), dtype=torch.uint8, generator=generator)
        boxes = random_boxes(generator, torch.tensor(canvas).expand(14, 2))
        plan = plan_resampling(boxes, canvas, 21, "bicubic", True)
        taps, products = resample._sum_taps(images, plan), resample._multiply(images, plan)
        assert taps.shape == products.shape == (14, 2, 21, 21)
        assert taps.is_contiguous()
        assert products.is_contiguous()
        torch.testing.assert_close(taps, products, rtol=0, atol=1e-6)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("interpolation", MODES)
def test_taps_by_kind_are_those_of_each_box(interpolation: Interpolation, antialias: bool) -> None:
    """A CPU's and an accelerator's, which has room for boxes as long as the canvas: they come to the same matrices."""
    for size_out in (8, 21, 70):
        length = torch.cat((torch.arange(1, 51), torch.tensor([3, 50, 3, 7]))).repeat(2)
        flipped = torch.arange(108) < 54
        found = [
            taps_of(length, flipped, 60, size_out, interpolation, antialias)
            for taps_of in (taps_by_kind, resampling_taps)
        ]
        by_kind, directly = (matrices(tap, weight, 60) for tap, weight in found)
        torch.testing.assert_close(by_kind, directly, rtol=0, atol=1e-6)
        torch.testing.assert_close(by_kind[54:], by_kind[:54].flip(1), rtol=0, atol=1e-6)
        if antialias and size_out == 8 and interpolation != "nearest":
            assert found[0][0].shape[2] < found[1][0].shape[2]
    for taps_of in (taps_by_kind, resampling_taps):
        tap, weight = taps_of(length[:0], flipped[:0], 60, 21, interpolation, antialias)
        assert tap.shape == weight.shape
        assert tap.shape[:2] == (0, 21)


def test_a_view_is_the_same_in_any_batch() -> None:
    """What else is in the batch decides how many taps there are room for; those that are not needed change nothing."""
    generator = torch.Generator().manual_seed(6)
    images = torch.randint(0, 256, (20, 3, 60, 80), dtype=torch.uint8, generator=generator)
    boxes = random_boxes(generator, torch.tensor((60, 80)).expand(20, 2))
    whole = resample._sum_taps(images, plan_resampling(boxes, (60, 80), 16, "bilinear", True))
    for row in range(20):
        one = slice(row, row + 1)
        plan = plan_resampling(Boxes(*(field[one] for field in boxes)), (60, 80), 16, "bilinear", True)
        torch.testing.assert_close(resample._sum_taps(images[one], plan), whole[one], rtol=0, atol=1e-6)


def test_large_canvases_are_worked_on_in_parts() -> None:
    def length(count: int, canvas: int, image_size: int, device: str = "cpu", **most: int) -> int:
        images = torch.empty(count, 3, canvas, canvas, dtype=torch.uint8, device=device)
        parts = list(batch_parts(images, image_size, **most))
        assert [row for part in parts for row in range(count)[part]] == list(range(count))
        return len(range(count)[parts[0]])

    assert length(600, 32, 32) >= 200
    assert length(20, 500, 224) < 4
    assert length(20, 500, 224, host_floats=2**23) > 4
    assert length(2, 5000, 224) == 1
    assert length(9, 1024, 4000, "meta") == 2
