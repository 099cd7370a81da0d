"""The draws: published vectors, a plain loop as reference, torchvision's distribution, bits that no batch changes."""

import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from stages.views.draws import CROP_TRIES, ORDERS, Parameters, draw, philox, uniforms
from stages.views.policy import Policy, preset

NEUTRAL = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


def policy(name: str = "natural", image_size: int = 96, **changes: Any) -> Policy:
    return Policy.model_validate({**preset(name, image_size), **NEUTRAL, **changes})


def equal(left: Parameters, right: Parameters) -> bool:
    return all(torch.equal(getattr(left, field.name), getattr(right, field.name)) for field in fields(Parameters))


def mixed_sizes(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(1, 700, (count, 2), generator=generator)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    """From Random123's kat_vectors."""
    word0, word1, word2, word3 = (np.array([word], dtype=np.uint64) for word in counter)
    assert tuple(int(word[0]) for word in philox((word0, word1, word2, word3), key)) == expected


def test_uniforms_are_uniform_and_unrelated() -> None:
    ids = torch.arange(5000)
    numbers = torch.from_numpy(uniforms(3, ids, epoch=1, views=2)).T
    assert numbers.shape == (10_000, 36)
    assert numbers.dtype == torch.float64
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert torch.equal(numbers * 2**24, torch.floor(numbers * 2**24))
    counts = torch.stack([torch.histc(column.float(), 10, 0, 1) for column in numbers.T])
    assert ((counts - 1000) ** 2 / 1000).sum(1).max() < 35  # chi-square of 9 degrees, 36 columns: far out
    others = [uniforms(3, ids, 2, 2), uniforms(4, ids, 1, 2), uniforms(3, ids + 2**32, 1, 2)]
    others = [*(torch.from_numpy(other).T for other in others), numbers.flip(0)]
    together = torch.corrcoef(torch.cat([numbers, *others], dim=1).T)
    assert (together - torch.eye(180)).abs().max() < 0.06
    assert len(torch.unique(torch.cat([numbers, *others[:3]]), dim=0)) == 40_000


def test_seeds_and_ids_of_more_than_32_bits_count() -> None:
    ids = torch.tensor([5])
    first = uniforms(1, ids, 0, 1)
    assert not np.array_equal(first, uniforms(1 + 2**32, ids, 0, 1))
    assert not np.array_equal(first, uniforms(1, ids + 2**33, 0, 1))
    assert np.array_equal(first, uniforms(1 + 2**64, ids, 0, 1))


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 7, 13, 31, 257, 1001])
def test_bits_do_not_depend_on_the_batch(batch: int) -> None:
    """Several thousand samples, whole and cut into odd batches: equal to the last bit."""
    count = 5005 if batch > 5 else 300
    ids, sizes, chosen = torch.arange(count) * 7919 + 2**31 - 500, mixed_sizes(count), policy("microscopy")
    whole = draw(chosen, 11, ids, 4, sizes)
    for start in range(0, count, batch):
        part = torch.arange(start, min(start + batch, count))
        rows = torch.cat([part, part + count])
        assert equal(draw(chosen, 11, ids[part], 4, sizes[part]), whole[rows])


def test_views_of_a_sample_do_not_depend_on_their_number() -> None:
    ids, sizes = torch.arange(50), mixed_sizes(50)
    assert equal(draw(policy(), 0, ids, 0, sizes, views=5)[torch.arange(100)], draw(policy(), 0, ids, 0, sizes))


def test_each_sample_may_have_an_epoch_of_its_own() -> None:
    ids, sizes, epochs = torch.arange(20) // 2, mixed_sizes(20), torch.arange(20) % 3 + 2**31
    drawn = draw(policy(), 5, ids, epochs, sizes, views=1)
    for row in range(20):
        one = slice(row, row + 1)
        assert equal(drawn[one], draw(policy(), 5, ids[one], int(epochs[row]), sizes[one], views=1))


def test_bits_stay_as_they_were() -> None:
    """Golden values: whoever changes them changes every later run, and raises the stage versions."""
    drawn = draw(policy(), 42, torch.tensor([123_456_789_012]), 7, torch.tensor([[333, 500]]))
    boxes = torch.stack((drawn.top, drawn.left, drawn.height, drawn.width), 1)
    assert boxes.tolist() == [[9, 99, 282, 264], [35, 190, 296, 271]]
    assert drawn.colour_jitter.tolist() == [False, True]
    assert drawn.order.tolist() == [[0, 2, 1, 3], [0, 1, 3, 2]]
    factors = torch.stack((drawn.brightness, drawn.contrast, drawn.saturation, drawn.hue, drawn.blur_sigma), 1)
    assert [[number.hex() for number in row] for row in factors.tolist()] == [
        ["0x1.4b1fcc0000000p-1", "0x1.2d73d60000000p-1", "0x1.565b780000000p+0", "-0x1.560a160000000p-3",
         "0x1.9299320000000p-1"],
        ["0x1.a256d60000000p+0", "0x1.8d08060000000p+0", "0x1.2728c20000000p+0", "0x1.8ffc1c0000000p-3",
         "0x1.0af7d80000000p-2"],
    ]  # fmt: skip


def philox_by_hand(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in plain integers (Salmon et al. 2011, section 4.3)."""
    for _ in range(10):
        left, right = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [(right >> 32) ^ counter[1] ^ key[0], right % 2**32, (left >> 32) ^ counter[3] ^ key[1], left % 2**32]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


def test_uniforms_equal_a_plain_loop() -> None:
    seed, ids, epochs = 2**40 + 17, [3, 2**32 + 1, 2**40 - 1], [0, 2**33 + 5, 7]
    found = uniforms(seed, torch.tensor(ids), torch.tensor(epochs), views=3)
    assert found.shape == (36, 9)
    for view in range(3):
        for place, (sample, epoch) in enumerate(zip(ids, epochs, strict=True)):
            words = []
            for block in range(9):
                counter = [sample % 2**32, sample >> 32, epoch % 2**32, view * 2**16 + block]
                words += philox_by_hand(counter, [seed % 2**32, seed >> 32])
            assert found[:, view * 3 + place].tolist() == [(word >> 8) / 2**24 for word in words]


def crop_by_hand(numbers: list[float], size: list[int], chosen: Policy) -> tuple[int, ...]:
    """torchvision's RandomResizedCrop.get_params, from given uniform numbers."""
    image_height, image_width = size
    areas, ratios = numbers[:CROP_TRIES], numbers[CROP_TRIES : 2 * CROP_TRIES]
    smallest, largest = chosen.crop_ratio
    for area, ratio in zip(areas, ratios, strict=True):
        area = image_height * image_width * (chosen.crop_area[0] + area * (chosen.crop_area[1] - chosen.crop_area[0]))
        ratio = math.exp(math.log(smallest) + ratio * (math.log(largest) - math.log(smallest)))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= image_width and 0 < height <= image_height:
            top, left = numbers[20] * (image_height - height + 1), numbers[21] * (image_width - width + 1)
            return int(top), int(left), height, width
    width, height = image_width, image_height
    if image_width / image_height < smallest:
        height = round(width / smallest)
    elif image_width / image_height > largest:
        width = round(height * largest)
    return (image_height - height) // 2, (image_width - width) // 2, height, width


@pytest.mark.parametrize("crop_ratio", [(3 / 4, 4 / 3), (0.1, 10.0), (1.0, 1.0)])
def test_crops_equal_a_plain_loop(crop_ratio: tuple[float, float]) -> None:
    chosen, ids, sizes = policy(crop_ratio=crop_ratio), torch.arange(2000), mixed_sizes(2000)
    drawn = draw(chosen, 5, ids, 0, sizes)
    boxes = torch.stack((drawn.top, drawn.left, drawn.height, drawn.width), 1).tolist()
    rows = uniforms(5, ids, 0, 2).T.tolist()
    expected = [list(crop_by_hand(row, size, chosen)) for row, size in zip(rows, sizes.tolist() * 2, strict=True)]
    assert boxes == expected


def test_boxes_lie_inside_even_very_thin_images() -> None:
    sizes = torch.tensor([[1, 1], [1, 1000], [1000, 1], [3, 400], [2, 2]]).repeat(200, 1)
    for chosen in (policy(), policy(crop_area=(1e-6, 1e-6)), policy(crop_ratio=(50.0, 60.0))):
        drawn = draw(chosen, 0, torch.arange(1000), 0, sizes)
        image_height, image_width = sizes.repeat(2, 1).unbind(1)
        assert (drawn.height >= 1).all()
        assert (drawn.width >= 1).all()
        assert ((drawn.top >= 0) & (drawn.top + drawn.height <= image_height)).all()
        assert ((drawn.left >= 0) & (drawn.left + drawn.width <= image_width)).all()


def furthest_apart(left: Tensor, right: Tensor) -> float:
    """The Kolmogorov-Smirnov distance of two samples."""
    values = torch.cat((left, right)).double()
    shares = [torch.searchsorted(each.double().sort().values, values, right=True) / len(each) for each in (left, right)]
    return float((shares[0] - shares[1]).abs().max())


@pytest.mark.parametrize("size", [(32, 32), (200, 320)])
def test_crops_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    count = 4000
    drawn = draw(policy(), 1, torch.arange(count // 2), 0, torch.tensor(size).expand(count // 2, 2))
    ours = torch.stack((drawn.top, drawn.left, drawn.height, drawn.width)).double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        image = torch.empty(3, *size)
        boxes = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    theirs = torch.tensor(boxes).double().T
    for measure in (
        lambda box: box[2] * box[3],
        lambda box: box[3] / box[2],
        lambda box: box[0],
        lambda box: box[1],
        lambda box: box[2],
        lambda box: box[3],
    ):
        assert furthest_apart(measure(ours), measure(theirs)) < 0.036  # p = 0.01 for two samples of 4,000


def test_everything_else_follows_the_policy() -> None:
    count = 20_000
    chosen = policy("microscopy", colour_strength=1.0, blur=0.3)
    drawn = draw(chosen, 2, torch.arange(count // 2), 0, torch.tensor((50, 50)).expand(count // 2, 2))
    for mask, probability in (
        (drawn.horizontal_flip, 0.5),
        (drawn.vertical_flip, 0.5),
        (drawn.colour_jitter, 0.8),
        (drawn.grey, 0.2),
        (drawn.blur, 0.3),
    ):
        assert float(mask.double().mean()) == pytest.approx(probability, abs=0.015)
    assert (torch.bincount(drawn.quarter_turns, minlength=4) / count - 0.25).abs().max() < 0.015
    for values, smallest, largest in (
        (drawn.brightness, 0.2, 1.8),
        (drawn.contrast, 0.2, 1.8),
        (drawn.saturation, 0.2, 1.8),
        (drawn.hue, -0.2, 0.2),
        (drawn.blur_sigma, 0.1, 2.0),
    ):
        assert values.dtype == torch.float32
        even = torch.linspace(smallest, largest, count)
        assert furthest_apart(values, even) < 0.015
        assert smallest - 1e-6 <= float(values.min()) < float(values.max()) <= largest + 1e-6
    assert len(set(ORDERS)) == 24
    counts = torch.unique(drawn.order, dim=0, return_counts=True)[1]
    assert len(counts) == 24
    assert (counts / count * 24 - 1).abs().max() < 0.15
    together = torch.stack((drawn.brightness, drawn.contrast, drawn.saturation, drawn.hue, drawn.blur_sigma))
    assert (torch.corrcoef(together) - torch.eye(5)).abs().max() < 0.03


def test_strength_above_one_never_makes_a_factor_negative() -> None:
    drawn = draw(policy(colour_strength=2.0), 0, torch.arange(500), 0, torch.tensor((8, 8)).expand(500, 2))
    assert float(drawn.brightness.min()) >= 0
    assert float(drawn.brightness.max()) > 2


def test_probabilities_of_nought_and_one_are_certain() -> None:
    names = ("horizontal_flip", "vertical_flip", "quarter_turns", "colour_jitter", "grey", "blur")
    for probability in (0.0, 1.0):
        changes: dict[str, Any] = dict.fromkeys(names, probability)
        chosen = policy(**changes)
        drawn = draw(chosen, 0, torch.arange(3000), 0, torch.tensor((8, 8)).expand(3000, 2))
        for mask in (drawn.horizontal_flip, drawn.vertical_flip, drawn.colour_jitter, drawn.grey, drawn.blur):
            assert (mask == bool(probability)).all()
        assert ((drawn.quarter_turns > 0) == bool(probability)).all()
