"""Models on disk: model.json, weights that come back bit for bit, and one clear error for whatever does not fit."""

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torchvision import models

from stages.models import (
    ArchitectureCard,
    DamagedModel,
    ModelCard,
    ProjectorCard,
    WeightsCard,
    build_encoder,
    build_projector,
    count_parameters,
    load_encoder,
    save_model,
)
from stages.models.encoders import Encoder


def make_model(backbone: str = "resnet10", width: int = 4) -> tuple[ModelCard, Encoder, torch.nn.Module]:
    torch.manual_seed(0)
    encoder = build_encoder(backbone, width, 64, False, 32)
    encoder(torch.rand(4, 3, 32, 32))  # running statistics off their initial values
    card = ModelCard(
        kind="pretrain",
        architecture=ArchitectureCard(backbone=backbone, width=width, small_stem_up_to=64, pretrained=False),
        embedding_size=encoder.embedding_size,
        image_size=32,
        mean=(0.5, 0.25, 0.1),
        std=(0.2, 0.3, 0.123456789),
        interpolation="bilinear",
        antialias=True,
        projector=ProjectorCard(layers=2, hidden=8, dimension=4),
        parameters=count_parameters(encoder),
        weights=WeightsCard(source="initialised", licence=None),
    )
    return card, encoder, build_projector(encoder.embedding_size, 2, 8, 4)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(tmp_path, *make_model())
    return tmp_path


def test_card_has_the_keys_that_are_agreed(saved: Path) -> None:
    assert json.loads((saved / "model.json").read_text()) == {
        "format": 1,
        "kind": "pretrain",
        "architecture": {"backbone": "resnet10", "width": 4, "small_stem_up_to": 64, "pretrained": False},
        "embedding_size": 32,
        "image_size": 32,
        "mean": [0.5, 0.25, 0.1],
        "std": [0.2, 0.3, 0.123456789],
        "interpolation": "bilinear",
        "antialias": True,
        "projector": {"layers": 2, "hidden": 8, "dimension": 4},
        "parameters": 19572,
        "weights": {"source": "initialised", "licence": None},
        "channels": 3,
        "neck": None,
        "labels_seen": [],
        "head": None,
    }


def test_card_comes_back_equal_and_is_frozen() -> None:
    card = make_model()[0]
    assert ModelCard.from_json(card.to_json()) == card
    with pytest.raises(ValidationError, match="frozen"):
        card.image_size = 64  # pyrefly: ignore[read-only]


@pytest.mark.parametrize(
    ("backbone", "width"), [("resnet10", 4), ("mobilenet_v3_small", 64), ("timm:vit_tiny_patch16_224", 64)]
)
def test_an_encoder_comes_back_bit_for_bit(backbone: str, width: int, tmp_path: Path) -> None:
    card, encoder, projector = make_model(backbone, width)
    save_model(tmp_path, card, encoder, projector)
    loaded, loaded_card = load_encoder(tmp_path)
    images = torch.rand(3, 3, 32, 32)
    assert loaded_card == card
    assert not loaded.training
    assert torch.equal(loaded(images), encoder.eval()(images))
    assert loaded.weights.mean == card.mean
    assert {"encoder.safetensors", "projector.safetensors", "model.json"} == {path.name for path in tmp_path.iterdir()}


def test_the_file_has_the_names_of_the_library(tmp_path: Path) -> None:
    card, encoder, _ = make_model("mobilenet_v3_small", 64)
    save_model(tmp_path, card, encoder, None)
    result = models.mobilenet_v3_small().load_state_dict(load_file(tmp_path / "encoder.safetensors"), strict=False)
    assert result.unexpected_keys == []
    assert result.missing_keys == ["classifier.3.weight", "classifier.3.bias"]
    assert not (tmp_path / "projector.safetensors").exists()


def test_memory_format_does_not_change_the_bytes(saved: Path, tmp_path: Path) -> None:
    before = (saved / "encoder.safetensors").read_bytes()
    card, encoder, projector = make_model()
    save_model(tmp_path, card, encoder.to(memory_format=torch.channels_last), projector)
    assert (tmp_path / "encoder.safetensors").read_bytes() == before


def damage_weights(folder: Path, change: str) -> None:
    path = folder / "encoder.safetensors"
    state = load_file(path)
    if change == "missing":
        del state["bn1.weight"]
    elif change == "extra":
        state["fc.weight"] = torch.zeros(2)
    elif change == "shape":
        state["bn1.weight"] = torch.zeros(5)
        state["bn1.bias"] = torch.zeros(5)
    else:
        state["bn1.weight"] = state["bn1.weight"].half()
    save_file(state, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "bn1.weight is missing;"),
        ("extra", "fc.weight is not of this model;"),
        ("shape", r"bn1.bias is float32 \[5\] and should be float32 \[4\], and 1 more;"),
        ("type", r"bn1.weight is float16 \[4\] and should be float32 \[4\];"),
    ],
)
def test_weights_that_do_not_fit_are_refused(saved: Path, change: str, message: str) -> None:
    damage_weights(saved, change)
    with pytest.raises(DamagedModel, match=message) as caught:
        load_encoder(saved)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", 2, "format: "),
        ("embedding_size", 64, "embedding_size 64, and its architecture gives 32"),
        ("note", "new", "note: "),
        ("architecture", {"backbone": "x", "width": 4, "small_stem_up_to": 64, "pretrained": False}, "no backbone 'x'"),
    ],
)
def test_a_card_that_is_wrong_is_refused(saved: Path, key: str, value: object, message: str) -> None:
    path = saved / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(DamagedModel, match=message) as caught:
        load_encoder(saved)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("name", ["model.json", "encoder.safetensors"])
def test_files_that_are_missing_or_cut_are_refused(saved: Path, name: str) -> None:
    path = saved / name
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DamagedModel, match=name):
        load_encoder(saved)
    path.unlink()
    with pytest.raises(DamagedModel, match=name):
        load_encoder(saved)
