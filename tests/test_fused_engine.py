"""The fused engine against Kornia's functional operators, one by one and in the drawn order, on the same parameters."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kornia.color import rgb_to_grayscale
from kornia.enhance import adjust_hue
from kornia.enhance.adjust import (
    adjust_brightness_accumulative,
    adjust_contrast_with_mean_subtraction,
    adjust_saturation_with_gray_subtraction,
)
from kornia.filters import gaussian_blur2d
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as published

from stages.views import (
    Parameters,
    Policy,
    blur,
    draw,
    fused_engine,
    load,
    policy,
    preset,
    read_policy,
    resample,
    to_device,
    transfer,
)
from stages.views.blur import gaussian_blur
from stages.views.draws import ORDERS
from stages.views.fused_engine import colour_matrices, fused_views, hue_rotations, mix_colours
from stages.views.kornia_engine import kornia_views
from stages.views.lines import STRIP, lay_on_side, weighted_sums
from stages.views.warp import plan_warp, turn

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
NEUTRAL = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
OPERATORS = ("brightness", "contrast", "saturation", "hue")
LUMA = torch.tensor((0.299, 0.587, 0.114), dtype=torch.float64)


@pytest.fixture(params=["cpu", "accelerator"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tests hold for the products and convolutions that accelerators are given, too."""
    if request.param == "accelerator":
        monkeypatch.setattr(resample, "taps_by_kind", resample.resampling_taps)
        monkeypatch.setattr(resample, "_sum_taps", resample._multiply)
        monkeypatch.setattr(blur, "_sum_taps", blur._convolve)


def policy_of(name: str = "natural", image_size: int = 32, **changes: Any) -> Policy:
    return Policy.model_validate({**preset(name, image_size), **NEUTRAL, "engine": "fused", **changes})


def middling_images(count: int, height: int, width: int, channels: int = 3, seed: int = 0) -> Tensor:
    """uint8 [count, channels, height, width], of patches between 0.4 and 0.6, so that small changes clamp nothing."""
    generator = torch.Generator().manual_seed(seed)
    patches = 0.4 + 0.2 * torch.rand(count, channels, 5, 4, generator=generator)
    return (torch.nn.functional.interpolate(patches, (height, width), mode="bilinear") * 255).round().to(torch.uint8)


def noise(count: int, height: int, width: int, channels: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


def unchanged(count: int, side: int) -> Parameters:
    """Parameters of `count` views that are the images."""
    no, zero, one = torch.zeros(count, dtype=torch.bool), torch.zeros(count), torch.ones(count)
    start, whole = torch.zeros(count, dtype=torch.int64), torch.full((count,), side)
    order = torch.tensor(ORDERS)[torch.arange(count) % len(ORDERS)]
    return Parameters(start, start, whole, whole, no, no, start, ~no, one, one, one, zero, order, no, no, one)


def colours_by_hand(pixels: Tensor, drawn: Parameters, row: int) -> Tensor:
    """One view's operators in a plain loop, in float64, hue as a rotation and nothing clamped: [3, P] -> [3, P]."""
    pixels = pixels.double()
    for number in drawn.order[row].tolist() if drawn.colour_jitter[row] else []:
        factor = float(getattr(drawn, OPERATORS[number])[row])
        luma = LUMA @ pixels
        if number == 0:
            pixels = pixels * factor
        elif number == 1:
            pixels = factor * pixels + (1 - factor) * luma.mean()
        elif number == 2:
            pixels = factor * pixels + (1 - factor) * luma
        else:
            # Rodrigues: along the grey axis nothing changes, across it the plane turns.
            along = pixels.mean(0, keepdim=True).expand_as(pixels)
            across = pixels - along
            axis = torch.ones(3, 1, dtype=torch.float64) / 3**0.5
            turned = torch.linalg.cross(axis.expand_as(across), across, dim=0)
            angle = 2 * np.pi * factor
            pixels = along + np.cos(angle) * across + np.sin(angle) * turned
    return (LUMA @ pixels).expand_as(pixels) if drawn.grey[row] else pixels


# Geometry


@pytest.mark.parametrize(
    ("image_size", "changes"),
    [(32, {}), (20, {"interpolation": "bicubic"}), (16, {"antialias": False}), (16, {"interpolation": "nearest"})],
)
def test_crop_flip_and_turn_alone_equal_the_published_ones(image_size: int, changes: dict[str, Any]) -> None:
    chosen = policy_of("aerial", image_size, colour_jitter=0.0, grey=0.0, **PLAIN, **changes)
    images, ids, sizes = noise(20, 64, 48), torch.arange(20), torch.tensor((64, 48)).expand(20, 2)
    drawn = draw(chosen, 3, ids, 0, sizes)
    ours = fused_views(images, drawn, chosen)
    torch.testing.assert_close(ours, kornia_views(images, drawn, chosen), rtol=0, atol=1e-5)
    assert len(torch.unique(drawn.quarter_turns)) == 4
    if chosen.interpolation == "nearest":  # torchvision's scale, in float32, is inexact at ties
        return
    for row, view in enumerate(ours):
        top, left, height, width = (int(getattr(drawn, name)[row]) for name in ("top", "left", "height", "width"))
        image = images[row % 20].double() / 255
        mode = InterpolationMode(chosen.interpolation)
        size = [image_size, image_size]
        expected = published.resized_crop(image, top, left, height, width, size, mode, chosen.antialias).clamp(0, 1)
        expected = expected.flip(2) if drawn.horizontal_flip[row] else expected
        expected = expected.flip(1) if drawn.vertical_flip[row] else expected
        expected = expected.rot90(int(drawn.quarter_turns[row]), (1, 2))
        torch.testing.assert_close(view, expected.float(), rtol=0, atol=1e-5)


def test_chequerboard_is_grey_with_antialiasing_and_moire_without() -> None:
    board = ((torch.arange(63)[:, None] + torch.arange(63)) % 2 * 255).to(torch.uint8).expand(4, 3, 63, 63)
    for interpolation in ("bilinear", "bicubic"):
        even, moire = (
            fused_views(
                board,
                unchanged(4, 63),
                policy_of(image_size=9, interpolation=interpolation, antialias=antialias, **PLAIN),
            )
            for antialias in (True, False)
        )
        assert (even - 0.5).abs().max() < 0.05
        assert moire.std() > 0.4


@pytest.mark.parametrize("canvas", [(40, 33), (33, 40)])
def test_only_what_lies_inside_an_image_is_read(canvas: tuple[int, int]) -> None:
    sizes = torch.stack((torch.arange(30) % 20 + 14, torch.arange(30) % 17 + 17), 1)
    images = noise(30, *canvas)
    rows, columns = torch.arange(canvas[0])[None, :, None], torch.arange(canvas[1])[None, None, :]
    outside = ((rows >= sizes[:, :1, None]) | (columns >= sizes[:, 1:, None]))[:, None].expand_as(images)
    assert outside.any()
    poisoned = torch.where(outside, 255 - images, images)
    for changes in ({}, {"interpolation": "bicubic", "antialias": False}, {"interpolation": "nearest"}):
        views = load(policy_of("aerial", 16, blur=0.5, **changes))
        assert torch.equal(views(images, torch.arange(30), 0, sizes), views(poisoned, torch.arange(30), 0, sizes))


# Colour


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_an_operator_alone_is_kornias(name: str) -> None:
    theirs = {
        "brightness": adjust_brightness_accumulative,
        "contrast": adjust_contrast_with_mean_subtraction,
        "saturation": adjust_saturation_with_gray_subtraction,
    }[name]
    images, factors = middling_images(24, 16, 16), torch.linspace(0.6, 1.4, 24)
    drawn = replace(unchanged(24, 16), **{name: factors})
    ours = fused_views(images, drawn, policy_of(image_size=16, **PLAIN))
    torch.testing.assert_close(ours, theirs(images / 255, factors), rtol=0, atol=1e-5)


def test_grey_is_kornias() -> None:
    images = noise(6, 16, 16)
    drawn = replace(unchanged(6, 16), grey=torch.arange(6) % 2 == 0)
    ours = fused_views(images, drawn, policy_of(image_size=16, **PLAIN))
    expected = images / 255
    expected[::2] = rgb_to_grayscale(expected[::2])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_operators_in_every_order_are_kornias() -> None:
    """Each of the 24 orders, without hue: nothing is clamped, so that nothing may differ."""
    images, sizes = middling_images(48, 20, 20), torch.full((48, 2), 20)
    chosen = policy_of(image_size=16, colour_strength=0.25, hue=0.0, colour_jitter=0.9)
    drawn = draw(chosen, 0, torch.arange(48), 0, sizes)
    assert len(torch.unique(drawn.order, dim=0)) == 24
    ours, theirs = fused_views(images, drawn, chosen), kornia_views(images, drawn, chosen)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-5)  # after division by 0.224


def test_matrices_equal_a_plain_loop() -> None:
    chosen = policy_of(image_size=32, colour_strength=1.0)
    drawn = draw(chosen, 7, torch.arange(60), 0, torch.full((60, 2), 32))
    pixels = torch.rand(120, 3, 50, generator=torch.Generator().manual_seed(0))
    mixing, mean_mixing = colour_matrices(drawn, chosen)
    ours = mixing @ pixels + mean_mixing @ pixels.mean(2, keepdim=True)
    expected = torch.stack([colours_by_hand(view, drawn, row) for row, view in enumerate(pixels)])
    assert expected.abs().max() > 2
    torch.testing.assert_close(ours, expected.float(), rtol=0, atol=1e-5)
    other = replace(drawn, order=drawn.order.flip(1))  # hue keeps no luma, so that its place in the order is seen
    assert ((mixing - colour_matrices(other, chosen)[0]).abs().amax((1, 2)) > 0.01).double().mean() > 0.3


def test_colours_are_clamped_once_and_normalised() -> None:
    chosen = policy_of(image_size=32, colour_strength=1.0)
    drawn = draw(chosen, 7, torch.arange(10), 0, torch.full((10, 2), 32))
    views = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = torch.empty(2, 10, 3, 8, 8)
    mix_colours(views, *colour_matrices(drawn, chosen), chosen, ours)
    ours = ours.flatten(0, 1)
    mean, std = (torch.tensor(numbers, dtype=torch.float64)[:, None] for numbers in (chosen.mean, chosen.std))
    for row, view in enumerate(views):
        expected = (colours_by_hand(view.flatten(1), drawn, row).clamp(0, 1) - mean) / std
        torch.testing.assert_close(ours[row].flatten(1), expected.float(), rtol=0, atol=1e-4)


def test_images_without_colours_have_the_operators_that_are_left() -> None:
    for channels in (1, 2, 5):
        images, sizes = middling_images(12, 30, 20, channels), torch.tensor((30, 20)).expand(12, 2)
        without = {"saturation": 0.0, "hue": 0.0, "grey": 0.0}
        chosen = policy_of(
            image_size=16, colour_strength=0.25, **without, mean=(0.5,) * channels, std=(0.2,) * channels
        )
        drawn = draw(chosen, 0, torch.arange(12), 0, sizes)
        ours, theirs = fused_views(images, drawn, chosen), kornia_views(images, drawn, chosen)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-5)


# Blur


@pytest.mark.parametrize(("size", "taps"), [(32, 3), (50, 23), (12, 23)])
def test_blur_is_kornias_and_only_where_it_was_drawn(size: int, taps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    views, sigma = torch.rand(9, 3, size, size, generator=generator), torch.linspace(0.1, 2, 5)
    chosen = torch.tensor([7, 0, 3, 8, 4])
    expected = views.clone()
    expected[chosen] = gaussian_blur2d(views[chosen], taps, sigma[:, None].expand(-1, 2))
    before = views.clone()
    gaussian_blur(views, chosen[:0], sigma[:0], taps)
    assert torch.equal(views, before)
    gaussian_blur(views, chosen, sigma, taps)
    torch.testing.assert_close(views, expected, rtol=0, atol=1e-5)


def test_blur_equals_a_plain_loop() -> None:
    view = torch.rand(1, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    weights = [np.exp(-(distance**2) / (2 * 0.8**2)) for distance in (-2, -1, 0, 1, 2)]
    mirrored = lambda place: abs(place) if place < 6 else 10 - place  # noqa: E731
    expected = np.zeros((2, 6, 6))
    for row in range(6):
        for column in range(6):
            for down in range(5):
                for across in range(5):
                    pixel = view[0, :, mirrored(row + down - 2), mirrored(column + across - 2)].double().numpy()
                    expected[:, row, column] += weights[down] * weights[across] / sum(weights) ** 2 * pixel
    gaussian_blur(view, torch.tensor([0]), torch.tensor([0.8]), 5)
    assert np.abs(view[0].numpy() - expected).max() < 1e-6


# Lines


def test_sums_of_lines_and_pictures_on_their_side() -> None:
    generator = torch.Generator().manual_seed(0)
    lines, weight = torch.rand(11, 7, generator=generator), torch.rand(2, 5, 3, generator=generator)
    index = torch.randint(0, 11, (2, 5, 3), generator=generator)
    expected = torch.zeros(2, 5, 7, dtype=torch.float64)
    for picture in range(2):
        for place in range(5):
            for tap in range(3):
                expected[picture, place] += weight[picture, place, tap].double() * lines[index[picture, place, tap]]
    torch.testing.assert_close(weighted_sums(lines, index, weight), expected.float(), rtol=0, atol=1e-6)
    pictures = torch.rand(2, STRIP + 5, 3, 9, generator=generator).transpose(1, 2)
    turned = lay_on_side(pictures)
    assert turned.is_contiguous()
    assert torch.equal(turned, pictures.transpose(2, 3))


# Whole views


@cache
def photographs() -> Tensor:
    """uint8 [B, 3, 107, 107]: squares of two photographs that scikit-learn brings along."""
    squares = []
    for photograph in load_sample_images().images:
        image = torch.from_numpy(photograph.copy()).permute(2, 0, 1)
        squares += [
            image[:, top : top + 107, left : left + 107] for top in (0, 107, 214, 320) for left in (0, 250, 500)
        ]
    return torch.stack(squares)


def percentiles(ours: Tensor, theirs: Tensor) -> list[float]:
    """Of the absolute difference: 50, 90, 99, 99.9."""
    return [float(np.quantile((ours - theirs).abs().numpy(), share)) for share in (0.5, 0.9, 0.99, 0.999)]


def test_error_of_hue_as_a_rotation_by_percentile() -> None:
    """Against the hue in HSV, shares of the circle up to 0.1 and 0.2 (as published: strength 0.5 and 1)."""
    pixels = photographs() / 255
    for largest, most in ((0.1, (0.012, 0.055, 0.12, 0.15)), (0.2, (0.014, 0.085, 0.18, 0.25))):
        shares = torch.linspace(-largest, largest, len(pixels))
        theirs = adjust_hue(pixels, shares * 2 * torch.pi)
        ours, backwards = (
            (torch.from_numpy(hue_rotations(way * shares.numpy())).float() @ pixels.flatten(2)).clamp(0, 1)
            for way in (1, -1)
        )
        theirs = theirs.flatten(2)
        found = percentiles(ours, theirs)
        print(f"hue up to {largest}: {found}")
        assert all(error < bound for error, bound in zip(found, most, strict=True)), found
        assert percentiles(backwards, theirs)[1] > 1.5 * found[1]
        assert percentiles(pixels.flatten(2), theirs)[1] > 1.2 * found[1]


@pytest.mark.parametrize(
    ("image_size", "changes", "most"),
    [
        (32, {}, (0.006, 0.045, 0.12, 0.18)),
        (96, {}, (0.006, 0.065, 0.2, 0.4)),
        (32, {"hue": 0.0}, (1e-5, 0.006, 0.045, 0.14)),  # what leaving out the clamps does
        (96, {"hue": 0.0}, (1e-5, 0.02, 0.13, 0.28)),
    ],
)
def test_error_of_whole_views_by_percentile(image_size: int, changes: dict[str, Any], most: tuple[float, ...]) -> None:
    """Against the Kornia engine on the same parameters, on the scale 0 to 1."""
    chosen = policy_of(image_size=image_size, **changes, **PLAIN)
    images = photographs()
    drawn = draw(chosen, 0, torch.arange(len(images)), 0, torch.full((len(images), 2), 107), views=8)
    found = percentiles(fused_views(images, drawn, chosen), kornia_views(images, drawn, chosen))
    print(f"{image_size} pixels, {changes}: {found}")
    assert all(error < bound for error, bound in zip(found, most, strict=True)), found


def test_a_view_does_not_depend_on_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    images, ids = noise(21, 40, 50), torch.arange(21)
    sizes = torch.stack((torch.arange(21) + 20, torch.arange(21) + 30), 1)
    views = load(policy_of(image_size=72))
    whole = views(images, ids, 2, sizes)
    chosen = torch.tensor([20, 3, 7])
    some = views(images[chosen], ids[chosen], 2, sizes[chosen])
    torch.testing.assert_close(some, whole[:, chosen], rtol=0, atol=1e-4)
    monkeypatch.setattr(fused_engine, "batch_parts", lambda *_: [slice(0, 20), slice(20, 21)])
    torch.testing.assert_close(views(images, ids, 2, sizes), whole, rtol=0, atol=1e-4)


def test_full_precision_whatever_surrounds_it_and_any_layout() -> None:
    images, ids = noise(6, 40, 33), torch.arange(6)
    views = load(policy_of(image_size=72))
    alone = views(images, ids, 0)
    assert alone.shape == (2, 6, 3, 72, 72)
    assert alone.dtype == torch.float32
    assert not alone.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(views(images, ids, 0), alone)
    assert torch.equal(views(images.contiguous(memory_format=torch.channels_last), ids, 0), alone)


# What an accelerator is given


class Copies(TorchDispatchMode):
    """Notes all copies between devices: from which to which, and whether the host goes on at once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func is torch.ops.aten._to_copy.default and device is not None and device != args[0].device:
            self.seen.append((args[0].device.type, device.type, bool(kwargs.get("non_blocking"))))
        assert func is not torch.ops.aten.copy_.default or args[0].device == args[1].device
        return func(*args, **kwargs)


def test_only_copies_from_the_host_to_a_gpu_go_on_by_themselves() -> None:
    with FakeTensorMode(), Copies() as copies:
        there = to_device(torch.ones(3), torch.device("cuda"))
        assert to_device(there, torch.device("cuda", 0)) is there
        to_device(there, torch.device("cpu"))
        to_device(torch.ones(3), torch.device("meta"))
    assert copies.seen == [("cpu", "cuda", True), ("cuda", "cpu", False), ("cpu", "meta", False)]


def test_nothing_is_read_back_from_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """On torch's device without memory, where reading a number, or taking what a mask says, is an error."""
    monkeypatch.setattr(transfer, "WITHOUT_WAITING", ("meta",))
    images, sizes = noise(6, 40, 33), torch.tensor((40, 33)).expand(6, 2)
    for changes in ({}, {"interpolation": "bicubic", "antialias": False}, {"interpolation": "nearest"}):
        chosen = policy_of("aerial", 16, blur=0.5, **changes)
        drawn = draw(chosen, 0, torch.arange(6), 0, sizes)
        assert drawn.blur.any()
        with Copies() as copies:
            views = fused_views(to_device(images, torch.device("meta")), drawn, chosen)
        assert views.shape == (12, 3, 16, 16)
        assert set(copies.seen) == {("cpu", "meta", True)}


def test_what_runs_on_an_accelerator_compiles_as_one_graph() -> None:
    chosen = policy_of("aerial", 16, blur=0.5)
    images, sizes = noise(6, 40, 33), torch.tensor((40, 33)).expand(6, 2)
    drawn = draw(chosen, 0, torch.arange(6), 0, sizes)
    matrices, blurred = colour_matrices(drawn, chosen), drawn.blur.nonzero().squeeze(1)
    assert len(blurred)

    def views_of(images: Tensor, drawn: Parameters, mixing: Tensor, mean_mixing: Tensor, blurred: Tensor) -> Tensor:
        resampled = resample.resample(images, plan_warp(drawn, chosen, images.shape[2:]))
        views = torch.empty(len(drawn), 3, 16, 16)
        out = views.unflatten(0, (-1, len(images)))
        mix_colours(turn(resampled, drawn.quarter_turns, chosen), mixing, mean_mixing, chosen, out)
        gaussian_blur(views, blurred, drawn.blur_sigma[blurred], chosen.blur_kernel)
        return views

    torch.compiler.reset()
    compiled = torch.compile(views_of, backend="aot_eager", fullgraph=True)
    found = compiled(images, drawn, *matrices, blurred)
    torch.testing.assert_close(found, views_of(images, drawn, *matrices, blurred), rtol=0, atol=1e-6)
    torch.testing.assert_close(found, fused_views(images, drawn, chosen), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", policy.PRESETS)
def test_the_policy_chooses_the_engine(name: str, tmp_path: Path) -> None:
    images, ids = noise(5, 40, 33), torch.arange(5)
    computed = {}
    for engine, compute in (("kornia", kornia_views), ("fused", fused_views)):
        chosen = policy_of(name, 24, engine=engine)
        policy.write_policy(chosen, tmp_path / "policy.json")
        assert read_policy(tmp_path) == chosen
        computed[engine] = load(tmp_path, seed=4)(images, ids, 1).flatten(0, 1)
        drawn = draw(chosen, 4, ids, 1, torch.tensor((40, 33)).expand(5, 2))
        assert torch.equal(computed[engine], compute(images, drawn, chosen))
    assert not torch.equal(computed["kornia"], computed["fused"])
