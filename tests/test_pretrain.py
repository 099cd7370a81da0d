"""SimCLR's training loop on digits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunStage
from safetensors.torch import load_file

from pipeline.errors import UsageError
from stages.models import build_encoder, load_encoder, save_model
from stages.settings.pretrain import Pretrain

TINY: dict[str, Any] = {
    "architecture": {"backbone": "resnet10", "width": 4},
    "projector": {"layers": 2, "hidden": 16, "dimension": 8},
    "optimiser": {"name": "sgd", "learning_rate": 0.1},
    "epochs": 2,
    "batch_size": 128,
    "temperature": 0.2,
    "record_every_steps": 4,
    "device": "cpu",
}


@pytest.fixture
def inputs(run_stage: RunStage) -> dict[str, Path]:
    shards = run_stage("shard", {"source": "sklearn:digits"})
    views = run_stage("augment", {"preset": "text", "image_size": 8, "contact_sheet_images": 1}, {"shards": shards})
    return {"shards": shards, "views": views}


def lines(files: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (files / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_says_how(run_stage: RunStage, inputs: dict[str, Path]) -> None:
    files = run_stage("pretrain", TINY | {"architecture": {"backbone": "resnet10", "width": 16}}, inputs)
    rows = lines(files)
    means = [row for row in rows if "loss" in row]
    assert [row["step"] for row in means] == [4, 8, 12, 16, 20, 22]
    assert means[-1]["loss"] < means[0]["loss"] - 0.3
    assert means[-1]["probe_accuracy"] > 0.15
    assert {"learning_rate", "gradient_norm", "alignment", "uniformity", "epoch"} <= means[0].keys()
    health = [row for row in rows if "rankme" in row]
    assert [row["step"] for row in health] == [11, 22]
    assert all(0 < row["rankme_share"] <= 1 and row["rankme_samples"] == 80 for row in health)
    encoder, card = load_encoder(files)
    assert encoder.embedding_size == card.embedding_size == 128
    assert card.image_size == 8


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(run_stage: RunStage, inputs: dict[str, Path]) -> None:
    settings = TINY | {"max_steps": 3}
    first, second, other = (run_stage("pretrain", settings, inputs, seed=seed) for seed in (0, 0, 1))
    for name in ("encoder.safetensors", "projector.safetensors", "metrics.jsonl", "model.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert (first / "encoder.safetensors").read_bytes() != (other / "encoder.safetensors").read_bytes()


def test_the_online_probe_changes_nothing(run_stage: RunStage, inputs: dict[str, Path]) -> None:
    settings = TINY | {"max_steps": 5}
    with_probe = run_stage("pretrain", settings, inputs)
    without = run_stage("pretrain", settings | {"online_probe": False}, inputs)
    assert (with_probe / "encoder.safetensors").read_bytes() == (without / "encoder.safetensors").read_bytes()
    assert "probe_accuracy" in lines(with_probe)[0]
    assert "probe_accuracy" not in lines(without)[0]


def test_what_cannot_change_the_result_does_not(run_stage: RunStage, inputs: dict[str, Path]) -> None:
    settings = TINY | {"max_steps": 5}
    cadence = {"workers": 1, "log_every_seconds": 0.0, "checkpoint_every_steps": 2}
    assert (run_stage("pretrain", settings, inputs) / "encoder.safetensors").read_bytes() == (
        run_stage("pretrain", settings | cadence, inputs) / "encoder.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"optimiser": {"name": "lars"}},
        {"optimiser": {"name": "adamw", "learning_rate": 1e-3, "scaling": "none"}},
        {"precision": "bf16"},
        {"channels_last": False, "gradient_clip": 0.5},
        {"architecture": {"backbone": "timm:test_vit"}, "optimiser": {"name": "adamw", "learning_rate": 1e-3}},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)
def test_other_settings_run_and_stay_finite(
    run_stage: RunStage, inputs: dict[str, Path], changes: dict[str, Any]
) -> None:
    if "timm" in str(changes):
        views = {"preset": "text", "image_size": 32, "contact_sheet_images": 1}
        inputs = inputs | {"views": run_stage("augment", views, {"shards": inputs["shards"]})}
    files = run_stage("pretrain", TINY | {"max_steps": 3, "batch_size": 32} | changes, inputs)
    assert all(torch.isfinite(value).all() for value in load_file(files / "encoder.safetensors").values())
    if "gradient_clip" in changes:
        assert all(row["gradient_norm"] > 0 for row in lines(files) if "loss" in row)


def test_a_start_from_an_encoder_keeps_its_weights_and_its_normalisation(
    run_stage: RunStage, inputs: dict[str, Path], tmp_path: Path
) -> None:
    encoder = build_encoder("resnet10", 4, 64, False, 8)
    first = run_stage("pretrain", TINY | {"max_steps": 1}, inputs)
    _, card = load_encoder(first)
    start = tmp_path / "start"
    start.mkdir()
    card = card.model_copy(update={"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)})
    save_model(start, card, encoder, None)
    slow = {"optimiser": {"name": "sgd", "learning_rate": 1e-12}, "max_steps": 1}
    files = run_stage("pretrain", TINY | slow, inputs | {"encoder": start})
    continued, continued_card = load_encoder(files)
    assert (continued_card.mean, continued_card.std) == (card.mean, card.std)
    for name, parameter in continued.named_parameters():
        assert torch.allclose(parameter, dict(encoder.named_parameters())[name], atol=1e-9), name


def test_a_batch_larger_than_the_set_is_refused(run_stage: RunStage, inputs: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match=r"batch_size: 5000 is more than the 1438 training images"):
        run_stage("pretrain", TINY | {"batch_size": 5000}, inputs)


def test_views_are_smaller_first_where_the_settings_say_so(run_stage: RunStage, inputs: dict[str, Path]) -> None:
    small_policy = {"preset": "text", "image_size": 6, "contact_sheet_images": 1}
    small = inputs | {"views": run_stage("augment", small_policy, {"shards": inputs["shards"]})}
    settings = TINY | {"max_steps": 6, "record_every_steps": 1}
    grown = run_stage("pretrain", settings | {"smaller_views": [{"share": 0.5, "image_size": 6}]}, inputs)
    always_small = run_stage("pretrain", settings, small)
    never_small = run_stage("pretrain", settings, inputs)
    losses, small_losses, large_losses = (
        [row["loss"] for row in lines(files) if "loss" in row] for files in (grown, always_small, never_small)
    )
    assert losses[:3] == small_losses[:3]
    assert losses[3:] != small_losses[3:]
    assert losses[0] != large_losses[0]
    assert load_encoder(grown)[1].image_size == 8

    whole = run_stage("pretrain", settings | {"smaller_views": [{"share": 1.0, "image_size": 6}]}, inputs)
    assert (whole / "encoder.safetensors").read_bytes() == (always_small / "encoder.safetensors").read_bytes()


def test_smaller_views_that_an_encoder_does_not_take_are_refused(run_stage: RunStage, inputs: dict[str, Path]) -> None:
    views = {"preset": "text", "image_size": 32, "contact_sheet_images": 1}
    inputs = inputs | {"views": run_stage("augment", views, {"shards": inputs["shards"]})}
    settings = TINY | {
        "architecture": {"backbone": "timm:resmlp_12_224"},
        "smaller_views": [{"share": 0.5, "image_size": 16}],
    }
    with pytest.raises(UsageError, match=r"smaller_views: the encoder takes no images of 16 pixels"):
        run_stage("pretrain", settings, inputs)


def test_shares_of_smaller_views_are_parts_of_one_whole() -> None:
    parts = [{"share": 0.6, "image_size": 8}, {"share": 0.5, "image_size": 16}]
    with pytest.raises(ValueError, match=r"add up to 1\.1, more than 1"):
        Pretrain(shards="shards", views="views", smaller_views=parts)
