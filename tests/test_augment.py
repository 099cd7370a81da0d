"""The stage augment: the resolved policy and the contact sheet, from real shards."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import BadData
from stages.images import open_shards
from stages.settings.augment import Augment
from stages.views import Policy, load, preset, read_policy
from stages.views.contact_sheet import CELL, EPOCHS, GAP
from stages.views.policy import DEFAULT_ENGINE

RunStage = Callable[..., Path]
SETTINGS = {"shards": "shards", "image_size": 28}


@pytest.fixture
def shards(tmp_path: Path, run_stage: RunStage) -> Path:
    """Twenty images of mixed sizes, all in train but for four."""
    source = tmp_path / "images"
    random = np.random.default_rng(0)
    for number in range(20):
        place = source / ("test" if number % 5 == 0 else "train") / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        colours = random.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        size = (20 + number, 48 - number)
        Image.fromarray(colours).resize(size, Image.Resampling.BILINEAR).save(place / f"{number:02}.png")
    return run_stage("shard", {"source": f"folder:{source}", "workers": 1})


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_policy_is_resolved(shards: Path, run_stage: RunStage) -> None:
    out = run_stage(
        "augment", {**SETTINGS, "preset": "aerial", "crop_area": [0.3, 0.9], "hue": 0.0}, {"shards": shards}
    )
    assert sorted(path.name for path in out.iterdir()) == ["contact_sheet.png", "policy.json"]
    policy = read_policy(out)
    train = open_shards(shards, "train")
    together = torch.cat([train[position].image.flatten(1) for position in range(16)], dim=1).double() / 255
    assert policy.mean == pytest.approx(together.mean(1).tolist(), abs=1e-6)
    assert policy.std == pytest.approx(together.std(1, correction=0).tolist(), abs=1e-6)
    chosen = {"crop_area": (0.3, 0.9), "hue": 0.0, "mean": policy.mean, "std": policy.std}
    assert policy == Policy.model_validate({**preset("aerial", 28), **chosen})


def test_every_setting_reaches_the_policy(shards: Path, run_stage: RunStage) -> None:
    settings = {
        "image_size": 12, "crop_area": [0.5, 0.6], "crop_ratio": [0.9, 1.1], "horizontal_flip": 0.1,
        "vertical_flip": 0.2, "quarter_turns": 0.3, "colour_jitter": 0.4, "colour_strength": 0.6, "brightness": 0.7,
        "contrast": 0.75, "saturation": 0.85, "hue": 0.05, "grey": 0.15, "blur": 0.25, "blur_sigma": [0.2, 0.4],
        "interpolation": "bicubic", "antialias": False, "engine": "fused",
    }  # fmt: skip
    assert set(settings) == set(Policy.model_fields) - {"mean", "std"}
    assert set(settings) == set(Augment.model_fields) - {"shards", "preset", "contact_sheet_images"}
    out = run_stage("augment", {"shards": "shards", **settings}, {"shards": shards})
    resolved = json.loads((out / "policy.json").read_text())
    assert {name: resolved[name] for name in settings} == settings


def test_equal_bytes_again_and_another_sheet_by_seed(shards: Path, run_stage: RunStage) -> None:
    first, again = (hashes(run_stage("augment", SETTINGS, {"shards": shards})) for _ in range(2))
    other = hashes(run_stage("augment", SETTINGS, {"shards": shards}, seed=1))
    assert first == again
    assert first["policy.json"] == other["policy.json"]
    assert first["contact_sheet.png"] != other["contact_sheet.png"]


@pytest.mark.parametrize("engine", ["kornia", "fused"])
def test_contact_sheet_shows_originals_and_the_views_of_training(
    shards: Path, run_stage: RunStage, engine: str
) -> None:
    settings = {**SETTINGS, "contact_sheet_images": 3, "engine": engine}
    out = run_stage("augment", settings, {"shards": shards}, seed=7)
    assert read_policy(out).engine == engine
    with Image.open(out / "contact_sheet.png") as sheet:
        assert (sheet.format, sheet.mode, sheet.info) == ("PNG", "RGB", {})
        pixels = torch.from_numpy(np.array(sheet)).permute(2, 0, 1)
    step = CELL + GAP
    assert pixels.shape == (3, GAP + 3 * step, 4 * GAP + (1 + 2 * EPOCHS) * step)
    train, policy = open_shards(shards, "train"), read_policy(out)
    batch = train.batch([2, 8, 13])  # the middles of three equal parts of 16
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (policy.mean, policy.std))
    for epoch in range(EPOCHS):
        views = load(policy, seed=7)(batch.images, batch.sample_ids, epoch, batch.sizes) * std + mean
        for number in range(2):
            for row in range(3):
                top, left = GAP + row * step, 4 * GAP + (1 + 2 * epoch + number) * step
                shown = pixels[:, top : top + CELL : 4, left : left + CELL : 4] / 255  # enlarged four times
                torch.testing.assert_close(shown, views[number, row].clamp(0, 1), rtol=0, atol=0.51 / 255)
    height, width = batch.sizes[0].tolist()
    assert height > width
    across = (CELL - round(width * CELL / height)) // 2
    assert (pixels[:, GAP : GAP + CELL, GAP : GAP + across] == 255).all()
    original = pixels[:, GAP : GAP + CELL, GAP + across : GAP + CELL - across].float()
    expected = batch.images[0, :, :height, :width].float()
    assert (original.mean((1, 2)) - expected.mean((1, 2))).abs().max() < 3


def test_an_engine_is_written_whether_it_was_chosen_or_not(shards: Path, run_stage: RunStage) -> None:
    out = run_stage("augment", SETTINGS, {"shards": shards})
    written = json.loads((out / "policy.json").read_text())
    assert written["engine"] == DEFAULT_ENGINE
    del written["engine"]  # as files were before there were two
    (out / "policy.json").write_text(json.dumps(written))
    assert read_policy(out).engine == "kornia"


def test_large_views_and_few_images(shards: Path, run_stage: RunStage) -> None:
    out = run_stage("augment", {**SETTINGS, "image_size": 150, "contact_sheet_images": 64}, {"shards": shards})
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.height == GAP + 16 * (CELL + GAP)  # all there are


def test_no_training_part_is_a_clear_error(shards: Path, run_stage: RunStage) -> None:
    summary = json.loads((shards / "shards.json").read_text())
    del summary["splits"]["train"]
    (shards / "shards.json").write_text(json.dumps(summary))
    with pytest.raises(BadData, match="no train split, only test"):
        run_stage("augment", SETTINGS, {"shards": shards})


def test_one_colour_is_a_clear_error(tmp_path: Path, run_stage: RunStage) -> None:
    for name in "abc":
        (tmp_path / "plain" / "train").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "teal").save(tmp_path / "plain" / "train" / f"{name}.png")
    folder = run_stage("shard", {"source": f"folder:{tmp_path / 'plain'}", "workers": 1})
    with pytest.raises(BadData, match="one colour"):
        run_stage("augment", SETTINGS, {"shards": folder})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("crop_area", [0.9, 0.1]), ("crop_area", [0.0, 1.0]), ("crop_ratio", [2.0, 1.0]), ("blur_sigma", [0.0, 1.0]),
        ("hue", 0.4), ("preset", "nature"), ("image_size", 2),
        ("engine", "dali"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_before_the_run(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        Augment.model_validate_json(json.dumps({"shards": "shards", field: value}), strict=True)
