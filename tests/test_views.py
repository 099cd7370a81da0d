"""Whole views against a slow loop over torchvision's operators, with the same drawn parameters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as published

from stages.views import (
    OtherChannels,
    Parameters,
    Policy,
    PolicyError,
    Square,
    draw,
    evaluation_view,
    kornia_engine,
    load,
    preset,
    squares,
    write_policy,
)
from stages.views.resample import crop_and_resize

NEUTRAL = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
ONE_LEVEL = 1 / 255 / 0.224  # of 8 bits, after normalisation
OPERATORS = (
    ("brightness", published.adjust_brightness, kornia_engine.adjust_brightness_accumulative),
    ("contrast", published.adjust_contrast, kornia_engine.adjust_contrast_with_mean_subtraction),
    ("saturation", published.adjust_saturation, kornia_engine.adjust_saturation_with_gray_subtraction),
    ("hue", published.adjust_hue, kornia_engine.shift_hue),
)


def policy(name: str = "natural", image_size: int = 32, **changes: Any) -> Policy:
    return Policy.model_validate({**preset(name, image_size), **NEUTRAL, **changes})


def images_like_photographs(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """uint8 [count, 3, height, width]: colours in patches, some pixels black, white or grey."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.rand(count, 3, 5, 5, generator=generator) * 1.4 - 0.2
    images = torch.nn.functional.interpolate(patches, (height, width), mode="bilinear")
    images += 0.1 * torch.randn(count, 3, height, width, generator=generator)
    images[:, :, : height // 4, : width // 4] = images[:, :1, : height // 4, : width // 4]
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def canvas_of(count: int, height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images of mixed sizes on a canvas: images [count, 3, height, width], sizes [count, 2]."""
    generator = torch.Generator().manual_seed(seed)
    least = torch.tensor((height // 2, width // 2))
    sizes = least + (torch.rand(count, 2, generator=generator) * (torch.tensor((height, width)) - least + 1)).long()
    return images_like_photographs(count, height, width, seed), sizes


def views_one_by_one(images: Tensor, parameters: Parameters, chosen: Policy) -> Tensor:
    """The published operators, a view at a time, in float64: [N, 3, h, w]."""
    size, blur, mode = chosen.image_size, chosen.blur_kernel, InterpolationMode(chosen.interpolation)
    views = []
    for row in range(len(parameters)):
        drawn = parameters[torch.tensor(row)]
        top, left, height, width = (int(value) for value in (drawn.top, drawn.left, drawn.height, drawn.width))
        image = images[row % len(images)].double() / 255
        view = published.resized_crop(image, top, left, height, width, [size, size], mode, chosen.antialias)
        view = view.clamp(0, 1)
        view = published.horizontal_flip(view) if drawn.horizontal_flip else view
        view = published.vertical_flip(view) if drawn.vertical_flip else view
        view = published.rotate(view, 90.0 * int(drawn.quarter_turns))
        if drawn.colour_jitter:
            for number in drawn.order.tolist():
                name, adjust, _ = OPERATORS[number]
                view = adjust(view, float(getattr(drawn, name)))
        view = published.rgb_to_grayscale(view, 3) if drawn.grey else view
        view = published.gaussian_blur(view, [blur, blur], [float(drawn.blur_sigma)] * 2) if drawn.blur else view
        views.append(published.normalize(view, list(chosen.mean), list(chosen.std)))
    return torch.stack(views).float()


@pytest.mark.parametrize(
    ("name", "image_size", "changes"),
    [
        ("natural", 32, {}),
        ("natural", 72, {}),
        ("natural", 24, {"interpolation": "bicubic", "colour_strength": 1.0}),
        ("natural", 24, {"antialias": False, "blur": 0.5}),
        ("microscopy", 20, {"quarter_turns": 0.9, "blur": 1.0}),
        ("aerial", 16, {"colour_strength": 2.0}),
        ("colour-matters", 16, {}),
        ("grey", 16, {}),
        ("text", 16, {}),
    ],
)
def test_equals_a_slow_loop_over_published_operators(name: str, image_size: int, changes: dict[str, Any]) -> None:
    chosen = policy(name, image_size, **changes)
    images, sizes = canvas_of(40, 50, 61)
    ids = torch.arange(40) + 100
    ours = load(chosen, seed=5)(images, ids, 3, sizes)
    assert ours.shape == (2, 40, 3, image_size, image_size)
    assert ours.dtype == torch.float32
    expected = views_one_by_one(images, draw(chosen, 5, ids, 3, sizes), chosen)
    difference = (ours.flatten(0, 1) - expected).abs()
    assert difference.quantile(0.999) < 0.5 * ONE_LEVEL
    assert difference.max() < 1.5 * ONE_LEVEL


@pytest.mark.parametrize(("name", "theirs", "ours"), OPERATORS)
def test_each_colour_operator_is_the_published_one(
    name: str, theirs: Callable[..., Tensor], ours: Callable[..., Tensor]
) -> None:
    images = images_like_photographs(30, 16, 16) / 255
    factors = torch.linspace(-0.5, 0.5, 30) if name == "hue" else torch.linspace(0, 2, 30)
    expected = torch.stack([theirs(image, float(factor)) for image, factor in zip(images, factors, strict=True)])
    torch.testing.assert_close(ours(images, factors), expected, rtol=0, atol=1e-3)


def test_the_drawn_order_of_the_operators_is_kept() -> None:
    """A view whose order is another one looks otherwise: the test above would not pass by chance."""
    chosen = policy(colour_jitter=1.0, colour_strength=1.0, grey=0.0)
    images, ids, sizes = images_like_photographs(20, 32, 32), torch.arange(20), torch.full((20, 2), 32)
    drawn = draw(chosen, 0, ids, 0, sizes)
    ours, expected = kornia_engine.kornia_views(images, drawn, chosen), views_one_by_one(images, drawn, chosen)
    other = views_one_by_one(images, Parameters(**{**vars(drawn), "order": drawn.order.flip(1)}), chosen)
    assert (ours - expected).abs().mean() < 0.05 * (ours - other).abs().mean()


@pytest.mark.parametrize("filling", ["white", "noise"])
@pytest.mark.parametrize(("interpolation", "antialias"), [("bilinear", True), ("bicubic", False), ("nearest", True)])
def test_padding_never_changes_a_view(filling: str, interpolation: str, antialias: bool) -> None:
    images, sizes = canvas_of(30, 40, 33)
    rows, columns = torch.arange(40)[None, :, None], torch.arange(33)[None, None, :]
    outside = ((rows >= sizes[:, :1, None]) | (columns >= sizes[:, 1:, None]))[:, None].expand_as(images)
    assert outside.any()
    noise = torch.randint(0, 256, images.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(9))
    refilled = torch.where(outside, noise if filling == "noise" else torch.full_like(images, 255), images)
    views = load(policy("aerial", 16, interpolation=interpolation, antialias=antialias, blur=0.5))
    ids = torch.arange(30)
    assert torch.equal(views(images, ids, 0, sizes), views(refilled, ids, 0, sizes))
    for image_size in (16, 80):
        one, other = (evaluation_view(each, sizes, image_size, **NEUTRAL) for each in (images, refilled))
        assert torch.equal(one, other)


def test_a_larger_canvas_changes_nothing_that_is_seen() -> None:
    images, sizes = canvas_of(12, 30, 40)
    wider = torch.nn.functional.pad(images, (0, 9, 0, 25))
    views, ids = load(policy()), torch.arange(12)
    torch.testing.assert_close(views(images, ids, 0, sizes), views(wider, ids, 0, sizes), rtol=0, atol=1e-3)


def test_same_again_and_other_by_seed_epoch_id_and_view() -> None:
    images, ids = images_like_photographs(1, 32, 32).expand(8, -1, -1, -1), torch.arange(8)
    views = load(policy(), seed=1)
    first = views(images, ids, 0)
    assert torch.equal(first, views(images, ids, 0))
    assert not first.requires_grad
    others = torch.cat(
        [first, views(images, ids, 1), load(policy(), seed=2)(images, ids, 0), views(images, ids + 8, 0)]
    )
    assert len(torch.unique(others.flatten(0, 1), dim=0)) == 64


def test_a_sample_looks_the_same_in_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    images, sizes = canvas_of(21, 40, 40)
    views, ids = load(policy("natural", 72)), torch.arange(21)
    whole = views(images, ids, 2, sizes)
    chosen = torch.tensor([20, 3, 7])
    torch.testing.assert_close(
        views(images[chosen], ids[chosen], 2, sizes[chosen]), whole[:, chosen], rtol=0, atol=0.25 * ONE_LEVEL
    )
    monkeypatch.setattr(kornia_engine, "batch_parts", lambda *_: [slice(0, 20), slice(20, 21)])
    torch.testing.assert_close(views(images, ids, 2, sizes), whole, rtol=0, atol=0.25 * ONE_LEVEL)


def test_evaluation_in_parts_is_the_same_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    images, sizes = canvas_of(50, 32, 32)
    whole = evaluation_view(images, sizes, 32, **NEUTRAL)
    monkeypatch.setattr("stages.views.batch_parts", lambda images, image_size: [slice(0, 7), slice(7, 50)])
    assert torch.equal(evaluation_view(images, sizes, 32, **NEUTRAL), whole)


def test_evaluation_resizes_large_canvases_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole batch of photographs in floats would take gigabytes."""
    seen = []

    def watched(images: Tensor, *others: Any) -> Tensor:
        seen.append(len(images))
        return crop_and_resize(images, *others)

    monkeypatch.setattr("stages.views.crop_and_resize", watched)
    assert evaluation_view(torch.zeros(7, 3, 1024, 1024, dtype=torch.uint8), None, 32, **NEUTRAL).shape[0] == 7
    assert seen == [1] * 7
    assert evaluation_view(torch.zeros(0, 3, 32, 32, dtype=torch.uint8), None, 32, **NEUTRAL).shape[0] == 0


def test_full_precision_whatever_surrounds_it() -> None:
    images, ids = images_like_photographs(6, 40, 40), torch.arange(6)
    views = load(policy())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = views(images, ids, 0)
        evaluated = evaluation_view(images, None, 16, **NEUTRAL)
    assert torch.equal(inside, views(images, ids, 0))
    assert torch.equal(evaluated, evaluation_view(images, None, 16, **NEUTRAL))


@pytest.mark.parametrize("engine", ["kornia", "fused"])
def test_no_images_give_no_views(engine: str) -> None:
    images, ids = torch.zeros(0, 3, 40, 33, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
    assert load(policy(engine=engine, blur=0.5))(images, ids, 0).shape == (2, 0, 3, 32, 32)


def test_channels_last_images_give_the_same_views() -> None:
    images, ids = images_like_photographs(6, 40, 33), torch.arange(6)
    views = load(policy())
    assert torch.equal(views(images, ids, 0), views(images.contiguous(memory_format=torch.channels_last), ids, 0))


def test_loads_from_a_file_or_a_folder(tmp_path: Path) -> None:
    write_policy(policy(), tmp_path / "policy.json")
    images, ids = images_like_photographs(3, 32, 32), torch.arange(3)
    expected = load(policy(), seed=3)(images, ids, 0)
    for place in (tmp_path, tmp_path / "policy.json", str(tmp_path)):
        assert torch.equal(load(place, seed=3, device="cpu")(images, ids, 0), expected)
    with pytest.raises(PolicyError, match="nowhere"):
        load(tmp_path / "nowhere")


def test_wrong_arguments_are_named() -> None:
    images, ids = images_like_photographs(3, 16, 16), torch.arange(3)
    views = load(policy())
    with pytest.raises(ValueError, match="images must be uint8"):
        views(images.float(), ids, 0)
    with pytest.raises(ValueError, match="images must be uint8"):
        views(images[:, 0], ids, 0)
    with pytest.raises(OtherChannels, match="the images have 1 channels, and the view is for 3") as error:
        views(images[:, :1], ids, 0)
    assert error.value.exit_code == 2
    with pytest.raises(ValueError, match="one id an image"):
        views(images, ids[:2], 0)
    with pytest.raises(ValueError, match=r"sizes must be int64 \[B, 2\]"):
        views(images, ids, 0, torch.full((2, 2), 16))


def test_evaluation_is_a_central_square_resized() -> None:
    images, sizes = canvas_of(10, 120, 150)
    for image_size, share in ((32, 1.0), (64, 1.0), (65, 0.875), (96, 0.875)):
        for interpolation, antialias in (("bilinear", True), ("bilinear", False), ("bicubic", True)):
            ours = evaluation_view(
                images, sizes, image_size, **NEUTRAL, interpolation=interpolation, antialias=antialias
            )
            for view, image, (height, width) in zip(ours, images, sizes.tolist(), strict=True):
                side = round(min(height, width) * share)
                square = published.resized_crop(
                    image.double() / 255, (height - side) // 2, (width - side) // 2, side, side,
                    [image_size, image_size], InterpolationMode(interpolation), antialias,
                )  # fmt: skip
                expected = published.normalize(square.clamp(0, 1), list(NEUTRAL["mean"]), list(NEUTRAL["std"])).float()
                torch.testing.assert_close(view, expected, rtol=0, atol=0.25 * ONE_LEVEL)


def test_other_squares_are_cut_where_they_say() -> None:
    images, sizes = canvas_of(6, 40, 50)
    found = squares(5, mirror=True)
    assert len(found) == len(set(found)) == 10
    for square in found:
        ours = evaluation_view(images, sizes, 32, **NEUTRAL, square=square)
        for view, image, (height, width) in zip(ours, images, sizes.tolist(), strict=True):
            side = round(min(height, width) * 0.875)
            top, left = (height - side) * square.down // 2, (width - side) * square.right // 2
            cut = image[:, top : top + side, left : left + side]
            if square.mirrored:
                cut = cut.flip(-1)
            whole = evaluation_view(cut[None].contiguous(), None, 32, **NEUTRAL)[0]
            torch.testing.assert_close(view, whole, rtol=0, atol=1e-5)
    assert squares(1, mirror=False) == (Square(),)
    assert squares(1, mirror=True) == (Square(), Square(mirrored=True))


def test_evaluation_of_small_images_at_their_own_size_is_the_image() -> None:
    images = images_like_photographs(4, 32, 32)
    ours = evaluation_view(images, None, 32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    torch.testing.assert_close(ours, images / 255, rtol=0, atol=1e-6)


def test_a_single_view_is_the_first_of_two() -> None:
    images, ids = images_like_photographs(5, 40, 50), torch.arange(5)
    pair, single = (load(policy(), 3, views=views)(images, ids, 2) for views in (2, 1))
    assert single.shape == (1, 5, 3, 32, 32)
    assert torch.allclose(single[0], pair[0], atol=ONE_LEVEL)
