import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import RunStage
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images
from torch import Tensor

from stages.images import alignment, near_duplicates, similar_pairs
from stages.images.alignment import aligned_distances
from stages.images.fingerprints import SIDE, descriptors, mirrored, planes, thumbnails
from stages.images.near_duplicates import SMALLEST_SIDE
from stages.images.similar_pairs import LEAST_SIMILARITY, PARTNERS

TILE = 90


def scenes() -> list[Image.Image]:
    """28 squares of the two photographs that scikit-learn ships."""
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    corners = [(left, top) for left in range(0, 640 - TILE, TILE) for top in (150, 250)]
    return [one.crop((left, top, left + TILE, top + TILE)) for one in photographs for left, top in corners]


def reduced(image: Image.Image, size: int = 32) -> Image.Image:
    return image.resize((size, size), Image.Resampling.BICUBIC)


def recompressed(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    reduced(image).save(file, "JPEG", quality=50)
    return Image.open(file).convert("RGB")


VARIANTS = {
    "recompressed": recompressed,
    "cropped": lambda one: reduced(one.crop((0, 3, TILE - 8, TILE - 1))),
    "scaled": lambda one: reduced(ImageOps.crop(one, 4)),
    "lit": lambda one: reduced(ImageEnhance.Brightness(ImageEnhance.Contrast(one).enhance(0.7)).enhance(1.2)),
    "grey": lambda one: reduced(one.convert("L").convert("RGB")),
    "mirrored": lambda one: reduced(ImageOps.mirror(one)),
    "large": lambda one: one.resize((200, 170), Image.Resampling.BICUBIC),
}


def small(images: list[Image.Image]) -> Tensor:
    made = []
    for image in images:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        made.append(thumbnails(pixels, torch.tensor([[image.height, image.width]])))
    return torch.cat(made)


def source(folder: Path) -> str:
    return f"folder:{folder}"


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def listed(files: Path) -> list[dict[str, Any]]:
    return pq.read_table(files / "near_duplicates.parquet").to_pylist()


def counts(files: Path) -> dict[str, Any]:
    return json.loads((files / "shards.json").read_text())["near_duplicates"]


def test_planted_variants_are_found_with_their_partner_and_nothing_else(tmp_path: Path, run_stage: RunStage):
    images = scenes()
    for number, image in enumerate(images):
        save(reduced(image), tmp_path / f"images/train/{number:02d}.png")
    planted = dict(enumerate(VARIANTS, start=3))
    for number, kind in planted.items():
        save(VARIANTS[kind](images[number]), tmp_path / f"images/test/{kind}.png")
    files = run_stage("shard", {"source": source(tmp_path / "images")})
    pairs = listed(files)
    assert {(one["key"], one["other_key"]) for one in pairs} == {
        (f"train/{number:02d}.png", f"test/{kind}.png") for number, kind in planted.items()
    }
    assert {one["other_key"] for one in pairs if one["mirrored"]} == {"test/mirrored.png"}
    assert [one["distance"] for one in pairs] == sorted(one["distance"] for one in pairs)
    assert all(0 < one["distance"] <= 0.15 for one in pairs)
    expected = {"splits": ["train", "test"], "pairs": len(VARIANTS), "images": [len(VARIANTS), len(VARIANTS)]}
    facts = counts(files)
    assert facts["across"] == [expected]
    assert facts["within"] == {"train": 0, "test": 0}
    assert (facts["images"], facts["searched"], facts["search"]) == (28 + 7, 28 + 7, "exact")


def test_three_splits_and_copies(tmp_path: Path, run_stage: RunStage, capsys: pytest.CaptureFixture[str]):
    images = [reduced(image) for image in scenes()[:6]]
    for split, numbers in {"train": (0, 1, 2, 3), "val": (1, 4), "test": (1, 2, 5)}.items():
        for number in numbers:
            save(images[number], tmp_path / f"images/{split}/{number}.png")
    save(images[3], tmp_path / "images/train/3 again.png")
    files = run_stage("shard", {"source": source(tmp_path / "images")})
    assert {(one["key"], one["other_key"], one["distance"]) for one in listed(files)} == {
        ("train/1.png", "val/1.png", 0.0),
        ("train/1.png", "test/1.png", 0.0),
        ("val/1.png", "test/1.png", 0.0),
        ("train/2.png", "test/2.png", 0.0),
        ("train/3 again.png", "train/3.png", 0.0),
    }
    facts = counts(files)
    assert facts["within"] == {"train": 1, "val": 0, "test": 0}
    assert [(one["splits"], one["pairs"], one["images"]) for one in facts["across"]] == [
        (["train", "val"], 1, [1, 1]),
        (["train", "test"], 2, [2, 2]),
        (["val", "test"], 1, [1, 1]),
    ]
    said = capsys.readouterr().err
    assert "2 images of test (66.67%) have a near-duplicate in train: near_duplicates.parquet" in said


def test_off_writes_no_list(tmp_path: Path, run_stage: RunStage):
    for number, image in enumerate(scenes()[:2]):
        save(reduced(image), tmp_path / f"images/train/{number}.png")
    files = run_stage("shard", {"source": source(tmp_path / "images"), "near_duplicates": False})
    assert counts(files) is None
    assert not (files / "near_duplicates.parquet").exists()


def test_groups_are_known_within_a_split(tmp_path: Path, run_stage: RunStage):
    first, second = (reduced(image) for image in scenes()[:2])
    for name, image in {"train/a-1": first, "train/a-2": first, "train/b-1": second, "train/c-1": second}.items():
        save(image, tmp_path / f"images/{name}.png")
    save(ImageEnhance.Brightness(first).enhance(0.8), tmp_path / "images/train/a-3.png")
    save(ImageEnhance.Brightness(second).enhance(0.8), tmp_path / "images/test/b-2.png")
    settings = {"group_pattern": r"/(\w)-", "allow_group_in_splits": True}
    files = run_stage("shard", {"source": source(tmp_path / "images"), **settings})
    assert {(one["key"], one["other_key"]) for one in listed(files)} == {
        ("train/b-1.png", "train/c-1.png"),
        ("train/b-1.png", "test/b-2.png"),
        ("train/c-1.png", "test/b-2.png"),
    }


def test_bytes_are_the_same_each_time_and_with_any_number_of_workers(tmp_path: Path, run_stage: RunStage):
    for number, image in enumerate(scenes()):
        save(reduced(image), tmp_path / f"images/train/{number:02d}.png")
        save(VARIANTS["cropped"](image), tmp_path / f"images/test/{number:02d}.png")
    settings = {"source": source(tmp_path / "images"), "near_duplicate_distance": 0.4}
    runs = [run_stage("shard", settings | {"workers": workers}) for workers in (1, 1, 2)]
    digests = {hashlib.sha256((files / "near_duplicates.parquet").read_bytes()).hexdigest() for files in runs}
    assert len(digests) == 1
    assert counts(runs[0])["pairs"] >= 28


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels(channels: int, tmp_path: Path, run_stage: RunStage):
    images = scenes()[:6]
    mode = {1: "L", 4: "RGBA"}[channels]
    for number, image in enumerate(images):
        save(reduced(image).convert(mode), tmp_path / f"images/train/{number}.png")
    save(VARIANTS["cropped"](images[2]).convert(mode), tmp_path / "images/test/2.png")
    files = run_stage("shard", {"source": source(tmp_path / "images"), "channels": channels})
    assert [(one["key"], one["other_key"]) for one in listed(files)] == [("train/2.png", "test/2.png")]


def test_flat_and_very_small_images_are_searched_for_copies_only(tmp_path: Path, run_stage: RunStage):
    for value in (90, 91, 200):
        save(Image.new("RGB", (32, 32), (value,) * 3), tmp_path / f"images/train/{value}.png")
    save(Image.new("RGB", (32, 32), (90,) * 3), tmp_path / "images/test/90.png")
    tiny = reduced(scenes()[0], SMALLEST_SIDE - 1)
    save(tiny, tmp_path / "images/train/tiny.png")
    save(ImageEnhance.Brightness(tiny).enhance(0.9), tmp_path / "images/test/tiny, darker.png")
    save(tiny, tmp_path / "images/test/tiny.png")
    files = run_stage("shard", {"source": source(tmp_path / "images")})
    assert {(one["key"], one["other_key"]) for one in listed(files)} == {
        ("train/90.png", "test/90.png"),
        ("train/tiny.png", "test/tiny.png"),
    }
    assert (counts(files)["images"], counts(files)["searched"]) == (7, 0)


def test_digits_do_not_flood(run_stage: RunStage):
    facts = counts(run_stage("shard", {"source": "sklearn:digits"}))
    assert (facts["images"], facts["searched"], facts["pairs"]) == (1797, 0, 0)


def test_one_image(tmp_path: Path, run_stage: RunStage):
    save(reduced(scenes()[0]), tmp_path / "images/train/0.png")
    files = run_stage("shard", {"source": source(tmp_path / "images")})
    assert listed(files) == []
    assert (counts(files)["pairs"], counts(files)["across"]) == (0, [])


def test_many_copies_are_bounded_and_the_list_is_cut(
    tmp_path: Path, run_stage: RunStage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(near_duplicates, "MOST_LISTED", 10)
    image = reduced(scenes()[0])
    for number in range(40):
        save(image, tmp_path / f"images/train/{number:02d}.png")
    save(image, tmp_path / "images/test/0.png")
    files = run_stage("shard", {"source": source(tmp_path / "images")})
    facts = counts(files)
    assert facts["across"] == [{"splits": ["train", "test"], "pairs": PARTNERS, "images": [PARTNERS, 1]}]
    # Each image has PARTNERS found by descriptor, whichever of the equal ones these are, and PARTNERS by its bytes.
    assert sum(min(PARTNERS, 39 - place) for place in range(40)) <= facts["within"]["train"] <= 40 * PARTNERS * 2
    assert len(listed(files)) == facts["listed"] == 10
    assert f"the closest 10 are listed, {facts['pairs'] - 10:,} are not" in capsys.readouterr().err


# The parts


def naive(queries: Tensor, gallery: Tensor, within: bool) -> set[tuple[int, int]]:
    """The candidates of a double loop."""
    found = set()
    for query, vector in enumerate(queries):
        both = [vector, mirrored(vector[None])[0]]
        ranked = sorted(
            (
                (-float(one @ gallery[other]), other)
                for other in range(query + 1 if within else 0, len(gallery))
                for one in both
            ),
        )
        found |= {(query, other) for similarity, other in ranked[:PARTNERS] if -similarity > LEAST_SIMILARITY}
    return found


def vectors(count: int, seed: int) -> Tensor:
    """Some that resemble one another: around a few centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(8, 108, generator=torch.Generator().manual_seed(5))
    chosen = centres[torch.randint(8, (count,), generator=generator)]
    noisy = chosen + 0.8 * torch.randn(count, 108, generator=generator)
    turned = torch.where((torch.arange(count) % 3 == 0)[:, None], mirrored(noisy), noisy)
    return torch.nn.functional.normalize(turned, dim=1)


@pytest.mark.parametrize("within", [True, False])
def test_candidates_are_those_of_a_double_loop(within: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(similar_pairs, "QUERIES_AT_ONCE", 7)
    monkeypatch.setattr(similar_pairs, "GALLERY_AT_ONCE", 13)
    queries, gallery = vectors(90, 0), vectors(110, 1)
    done: list[int] = []
    found = similar_pairs.similar_pairs(queries, None if within else gallery, None, done.append, is_exact=True)
    pairs = set(zip(found.query.tolist(), found.gallery.tolist(), strict=True))
    assert pairs == naive(queries, queries if within else gallery, within)
    assert len(pairs) > 200
    assert sum(done) == 90


def test_groups_and_cells_of_candidates():
    queries, gallery = vectors(300, 0), vectors(400, 1)
    exact = similar_pairs.similar_pairs(queries, gallery, None, lambda _: None, is_exact=True)
    done: list[int] = []
    by_cells = similar_pairs.similar_pairs(queries, gallery, None, done.append, is_exact=False)
    both = [set(zip(*(column.tolist() for column in one), strict=True)) for one in (exact, by_cells)]
    assert sum(done) == 300
    # Some of the 16 of a query lie in a cell that is not looked into, and others take their place.
    assert len(both[0] & both[1]) > 0.8 * len(both[0])
    groups = torch.arange(300) % 3
    related = similar_pairs.similar_pairs(queries, None, groups, lambda _: None, is_exact=True)
    assert len(related.query) > 100
    assert (groups[related.query] != groups[related.gallery]).all()


def test_descriptors_of_mirrored_images_and_of_other_light():
    images = small([reduced(image) for image in scenes()])
    made = descriptors(images)
    assert torch.allclose(descriptors(images.flip(-1)), mirrored(made), atol=1e-5)
    assert torch.allclose(made.norm(dim=1), torch.ones(len(made)), atol=1e-5)
    darker = descriptors((images.float() * 0.7 + 20).round().to(torch.uint8))
    assert (darker * made).sum(dim=1).min() > 0.99


def test_distance_is_symmetric_in_light_and_knows_the_mirror():
    images = small([reduced(image) for image in scenes()])
    as_they_are, turned = torch.zeros(len(images), dtype=torch.bool), torch.ones(len(images), dtype=torch.bool)
    own = aligned_distances(images, images, as_they_are)
    assert 0.02 < own.min() <= own.max() < 0.15  # the doubt
    assert torch.equal(aligned_distances(images.flip(-1), images, turned), own)
    assert aligned_distances(images, images.roll(1, 0), as_they_are).min() > 0.3  # twice what a pair may have
    darker = (images.float() * 0.6 + 30).round().to(torch.uint8)
    assert (aligned_distances(darker, images, as_they_are) - own).abs().max() < 0.05
    assert torch.equal(own, own.round(decimals=4))


@pytest.mark.parametrize("most", [0.1, 0.15])
def test_what_is_given_up_early_is_farther_than_was_asked_for(most: float):
    """All pairs of scenes and their variants, mirrored or not: the same distances where they are small enough."""
    images = scenes()
    made = [small([make(image) for image in images]) for make in (reduced, *VARIANTS.values())]
    first = made[0].repeat(len(made) * 2, 1, 1, 1)
    second = torch.cat([*made, *(one.roll(1, 0) for one in made)])
    for turned in (False, True):
        is_mirrored = torch.full((len(first),), turned)
        every, early = (
            aligned_distances(first, second, is_mirrored),
            aligned_distances(first, second, is_mirrored, most),
        )
        close = every <= most
        assert close.sum() > 20
        assert torch.equal(early[close], every[close])
        assert (early[~close] > most).all()
        assert (early != every).any()


def test_coarse_correlation_is_the_largest_of_a_loop_over_scales_and_shifts():
    images = small([reduced(image) for image in scenes()])[:6]
    moving, fixed = planes(images), planes(images.roll(1, 0))
    found, poses = alignment._coarse(moving, fixed)
    moving, fixed = (alignment._half_size(values).double() for values in (moving, fixed))
    inner = alignment.WINDOW
    for pair in range(len(images)):
        best = []
        for number, scale in enumerate(alignment.SCALES):
            crop = alignment._crops()[number].double()
            target = torch.stack([crop @ plane @ crop.T for plane in fixed[pair]])
            target = target - target.mean((1, 2), keepdim=True)
            for down in range(5):
                for right in range(5):
                    window = moving[pair, :, down : down + inner, right : right + inner]
                    window = window - window.mean((1, 2), keepdim=True)
                    value = float((window * target).sum() / (window.norm() * target.norm()))
                    best.append((value, [scale, (right - 2) / 8, scale, (down - 2) / 8]))
        value, pose = max(best)
        assert found[pair].item() == pytest.approx(value, abs=1e-5)
        torch.testing.assert_close(poses[pair], torch.tensor(pose))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 50), (200, 90)])
def test_thumbnails_look_inside_the_image_only(height: int, width: int):
    canvas = torch.full((2, 3, 220, 100), 255, dtype=torch.uint8)
    canvas[0, :, :height, :width] = torch.tensor([10, 100, 200], dtype=torch.uint8)[:, None, None]
    made = thumbnails(canvas, torch.tensor([[height, width], [220, 100]]))
    assert made.shape == (2, 3, SIDE, SIDE)
    assert torch.equal(made[0], torch.tensor([10, 100, 200], dtype=torch.uint8)[:, None, None].expand(3, SIDE, SIDE))
    assert (made[1] == 255).all()
