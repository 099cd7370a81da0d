"""The policy: complete, frozen, checked; the presets say what users expect of them."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from stages.settings.augment import Augment
from stages.views.policy import PRESETS, Policy, PolicyError, preset, read_policy, write_policy

NEUTRAL = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def policy(name: str = "natural", image_size: int = 224, **changes: Any) -> Policy:
    return Policy.model_validate({**preset(name, image_size), **NEUTRAL, **changes})


def test_natural_is_the_published_policy() -> None:
    large, small = policy(image_size=224), policy(image_size=32)
    for each in (large, small):
        assert each.crop_area == (0.08, 1.0)
        assert each.crop_ratio == (3 / 4, 4 / 3)
        assert (each.horizontal_flip, each.vertical_flip, each.quarter_turns) == (0.5, 0.0, 0.0)
        assert (each.colour_jitter, each.grey) == (0.8, 0.2)
        assert (each.brightness, each.contrast, each.saturation, each.hue) == (0.8, 0.8, 0.8, 0.2)
        assert (each.interpolation, each.antialias) == ("bilinear", True)
    assert (large.colour_strength, large.blur, large.blur_sigma, large.blur_kernel) == (1.0, 0.5, (0.1, 2.0), 23)
    assert (small.colour_strength, small.blur) == (0.5, 0.0)
    assert policy(image_size=64).blur == 0
    assert policy(image_size=65).blur == 0.5


def test_presets_keep_what_matters_to_their_users() -> None:
    assert policy("colour-matters").grey == 0
    assert policy("colour-matters").hue * policy("colour-matters").colour_strength <= 0.02
    assert (policy("grey").saturation, policy("grey").hue, policy("grey").grey) == (0, 0, 0)
    assert policy("grey").brightness > 0
    for name in ("microscopy", "aerial"):
        assert (policy(name).horizontal_flip, policy(name).vertical_flip, policy(name).quarter_turns) == (
            0.5,
            0.5,
            0.75,
        )
    assert policy("microscopy").crop_area[0] > 0.08
    assert (policy("text").horizontal_flip, policy("text").vertical_flip, policy("text").quarter_turns) == (0, 0, 0)
    assert policy("text").crop_area[0] >= 0.3


def test_settings_offer_every_preset_and_every_field() -> None:
    assert set(get_args(Augment.model_fields["preset"].annotation)) == set(PRESETS)
    assert set(Policy.model_fields) - {"mean", "std"} <= set(Augment.model_fields)
    for name in PRESETS:
        assert set(PRESETS[name]) <= set(Policy.model_fields)


def test_unknown_preset_names_those_that_exist() -> None:
    with pytest.raises(ValueError, match="no preset 'nature'; there are natural, colour-matters"):
        preset("nature", 32)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("image_size", [4, 32, 64, 96, 224])
def test_json_round_trip(tmp_path: Path, name: str, image_size: int) -> None:
    before = policy(name, image_size, mean=(0.1 + 0.2, 1 / 3, 0.7))
    write_policy(before, tmp_path / "policy.json")
    assert read_policy(tmp_path / "policy.json") == before
    assert read_policy(tmp_path) == before
    assert set(json.loads((tmp_path / "policy.json").read_text())) == set(Policy.model_fields)
    assert before.blur_kernel % 2 == 1
    assert 3 <= before.blur_kernel <= max(3, image_size // 10 + 1)


def test_frozen() -> None:
    field = "grey"
    with pytest.raises(ValidationError, match="frozen"):
        setattr(policy(), field, 0.5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_size", 3),
        ("crop_area", (0.0, 1.0)),
        ("crop_area", (0.5, 1.5)),
        ("crop_area", (0.9, 0.1)),
        ("crop_ratio", (2.0, 1.0)),
        ("grey", 1.1),
        ("colour_strength", -1.0),
        ("hue", 0.3),
        ("blur_sigma", (0.0, 1.0)),
        ("interpolation", "lanczos"),
        ("std", (0.2, 0.0, 0.2)),
        ("mean", (0.5, float("nan"), 0.5)),
        ("sharpness", 1.0),
    ],
)
def test_values_out_of_range_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=field):
        policy(**{field: value})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "Invalid JSON"),
        ("{not json", "Invalid JSON"),
        ("[]", "should be an object"),
        ("{}", "image_size: Field required; crop_area: Field required"),
        (json.dumps({**preset("natural", 32), **NEUTRAL, "grey": 7}), "grey: Input should be less than or equal to 1"),
        (json.dumps({**preset("natural", 32), **NEUTRAL, "gray": 0.2}), "gray: Extra inputs are not permitted"),
    ],
)
def test_a_broken_file_is_one_clear_line(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "policy.json").write_text(content)
    with pytest.raises(PolicyError) as caught:
        read_policy(tmp_path)
    message = str(caught.value)
    assert expected in message
    assert "policy.json: not a view policy" in message
    assert "\n" not in message
    assert caught.value.exit_code == 4


def test_a_missing_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"policy\.json: cannot be read \(No such file or directory\)"):
        read_policy(tmp_path)
    assert issubclass(PolicyError, ValueError)
