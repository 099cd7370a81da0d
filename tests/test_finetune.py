"""Supervised training on digits: every loss, shares of the labels, frozen parts, necks, and what is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import RunStage, stage_runner
from PIL import Image
from resumed import assert_resumed_equals_whole
from safetensors.torch import load_file

from pipeline.errors import BadData, UsageError
from stages.evaluation import label_subset, labels_digest, read_features
from stages.images import open_shards
from stages.images.loader import BatchLoader
from stages.models import UnusableBackbone, build_encoder, load_card, load_encoder, load_head, load_weights
from stages.models.projector import build_projector
from stages.settings.finetune import Finetune
from stages.views import Views, evaluation_view

LOSSES: list[dict[str, Any]] = [{"name": "cross_entropy"}, {"name": "triplet"}, {"name": "arcface"}]
TINY: dict[str, Any] = {
    "architecture": {"backbone": "resnet10", "width": 4},
    "image_size": 8,
    "encoder": "random",
    "epochs": 2,
    "batch_size": 64,
    "classes_per_batch": 8,
    "images_per_class": 4,
    "record_every_steps": 4,
    "label_fraction": 0.2,
    "device": "cpu",
}
START = {
    "architecture": TINY["architecture"],
    "projector": {"layers": 2, "hidden": 16, "dimension": 8},
    "optimiser": {"name": "sgd", "learning_rate": 0.1},
    "epochs": 1,
    "max_steps": 2,
    "batch_size": 64,
    "temperature": 0.2,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Shards of digits, views of them, and an encoder that was pretrained a little."""
    run = stage_runner(tmp_path_factory.mktemp("made"))
    shards = run("shard", {"source": "sklearn:digits"})
    views = run("augment", {"preset": "text", "image_size": 8, "contact_sheet_images": 1}, {"shards": shards})
    start = run("pretrain", START, {"shards": shards, "views": views})
    return {"shards": shards, "views": views, "start": start}


@pytest.fixture
def shards(made: dict[str, Path]) -> Path:
    return made["shards"]


@pytest.fixture
def views(made: dict[str, Path]) -> Path:
    return made["views"]


@pytest.fixture
def start(made: dict[str, Path]) -> Path:
    return made["start"]


def from_encoder(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in (TINY | dict(settings)).items() if name not in ("encoder", "architecture")}


def lines(files: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (files / "metrics.jsonl").read_text().splitlines()]


def make_images(folder: Path, counts: Mapping[str, int], split: str = "train") -> str:
    random = np.random.default_rng(0)
    for name, count in counts.items():
        for number in range(count):
            path = folder / split / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(path)
    return f"folder:{folder}"


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss["name"])
def test_each_loss_learns_and_says_how(run_stage: RunStage, shards: Path, loss: dict[str, Any]) -> None:
    gentle = {"crop_area": [0.7, 1.0], "colour_jitter": 0.0, "grey": 0.0, "contact_sheet_images": 1}
    views = run_stage("augment", {"preset": "text", "image_size": 8} | gentle, {"shards": shards})
    batches = {"batch_size": 128, "classes_per_batch": 10, "images_per_class": 8, "max_steps": 120}
    settings = TINY | batches | {"loss": loss, "label_fraction": 1.0, "epochs": 20, "optimiser": {"learning_rate": 0.3}}
    files = run_stage("finetune", settings, {"shards": shards, "views": views})
    rows = lines(files)
    assert {"loss", "learning_rate", "gradient_norm", "epoch"} <= rows[0].keys()
    if loss["name"] == "triplet":
        gap = [row["negative_distance"] / row["positive_distance"] for row in (rows[0], rows[-1])]
        assert gap[1] > gap[0] + 0.3
    else:
        assert rows[-1]["accuracy"] > 0.5 > rows[0]["accuracy"]
    encoder, card = load_encoder(files)
    assert not encoder.training
    assert (card.kind, card.image_size, card.embedding_size, card.neck) == ("finetune", 8, 32, None)
    train = open_shards(shards, "train")
    digest = labels_digest(train.keys, (train.classes[label] for label in train.labels))
    seen = {"loss": loss["name"], "fraction": 1.0, "subset": 0, "seed": 0, "samples": 1438, "digest": digest}
    assert [one.model_dump() for one in card.labels_seen] == [seen]
    if card.head is None:
        assert loss["name"] == "triplet"
        assert not (files / "head.safetensors").exists()
        return
    # The head that was saved knows the digits of images that it has not seen.
    batch = open_shards(shards, "test").batch(range(200))
    images = evaluation_view(batch.images, batch.sizes, 8, card.mean, card.std)
    with torch.no_grad():
        scores = load_head(files, card)(encoder(images))
    assert scores.shape == (200, 10)
    assert (scores.argmax(1) == batch.labels).float().mean() > 0.5


def test_the_labels_are_the_subset_that_the_probe_measures(
    run_stage: RunStage, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()
    load = BatchLoader.load

    def watched(self: BatchLoader, step: int) -> Any:
        batch = load(self, step)
        seen.update(batch.sample_ids.tolist())
        return batch

    monkeypatch.setattr(BatchLoader, "load", watched)
    train = open_shards(shards, "train")
    labels, ids = train.labels.numpy(), train.sample_ids.numpy()
    for fraction, subset, seed, loss in ((0.03, 2, 3, LOSSES[0]), (0.01, 0, 1, LOSSES[2]), (0.02, 1, 0, LOSSES[1])):
        seen.clear()
        wanted = ids[label_subset(labels, ids, fraction, seed, subset)]
        settings = TINY | {"label_fraction": fraction, "label_subset": subset, "loss": loss, "batch_size": 9}
        files = run_stage("finetune", settings | {"epochs": 6}, {"shards": shards}, seed=seed)
        assert seen == set(wanted.tolist())
        (entry,) = load_card(files).labels_seen
        assert (entry.fraction, entry.subset, entry.seed, entry.samples) == (fraction, subset, seed, len(wanted))


def test_a_random_start_has_the_weights_of_random_in_embed(run_stage: RunStage, shards: Path) -> None:
    frozen = TINY | {"freeze": "encoder", "max_steps": 1}
    files = run_stage("finetune", frozen, {"shards": shards}, seed=3)
    embedded = {name: TINY[name] for name in ("architecture", "image_size", "device")}
    ours = run_stage("embed", embedded, {"shards": shards, "encoder": files})
    random = run_stage("embed", embedded | {"encoder": "random"}, {"shards": shards}, seed=3)
    assert torch.equal(read_features(ours).features, read_features(random).features)


@pytest.mark.parametrize("loss", [LOSSES[0], LOSSES[1]], ids=lambda loss: loss["name"])
def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    run_stage: RunStage, shards: Path, loss: dict[str, Any]
) -> None:
    settings = TINY | {"max_steps": 3, "loss": loss}
    cadence = {"workers": 1, "log_every_seconds": 0.0, "checkpoint_every_steps": 2}
    first, second = (run_stage("finetune", settings | more, {"shards": shards}) for more in ({}, cadence))
    other = run_stage("finetune", settings, {"shards": shards}, seed=1)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()
    assert (first / "encoder.safetensors").read_bytes() != (other / "encoder.safetensors").read_bytes()


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss["name"])
def test_resumed_it_ends_with_the_bytes_of_an_uninterrupted_run(
    shards: Path, tmp_path: Path, loss: dict[str, Any]
) -> None:
    wanted = {"encoder.safetensors", "model.json", "metrics.jsonl"}
    settings = TINY | {"loss": loss, "max_steps": 9}
    assert_resumed_equals_whole(tmp_path, settings, shards, (2, 3), wanted)  # after steps 2 and 5


# The start


def test_it_starts_from_the_encoder_with_its_normalisation_and_carries_on_what_it_saw(
    run_stage: RunStage, shards: Path, start: Path, views: Path
) -> None:
    slow = {"optimiser": {"learning_rate": 1e-12, "weight_decay": 0.0}, "max_steps": 1}
    inputs = {"shards": shards, "encoder": start}
    files = run_stage("finetune", from_encoder(slow), inputs)
    encoder, card = load_encoder(files)
    before, before_card = load_encoder(start)
    assert (card.mean, card.std, card.image_size) == (before_card.mean, before_card.std, 8)
    assert card.projector is None
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(parameter, dict(before.named_parameters())[name], rtol=0, atol=1e-9)
    again = run_stage("finetune", from_encoder(slow | {"loss": LOSSES[2]}), inputs | {"encoder": files})
    assert [one.loss for one in load_card(again).labels_seen] == ["cross_entropy", "arcface"]
    pretrained = run_stage("pretrain", START, {"shards": shards, "views": views, "encoder": again})
    assert load_card(pretrained).labels_seen == load_card(again).labels_seen


@pytest.mark.parametrize(("layers", "size"), [(1, 16), (2, 8)])
def test_a_neck_is_the_first_layers_of_the_projector(
    run_stage: RunStage, shards: Path, start: Path, layers: int, size: int
) -> None:
    settings = from_encoder({"projector_layers": layers, "freeze": "encoder", "max_steps": 1})
    files = run_stage("finetune", settings, {"shards": shards, "encoder": start})
    encoder, card = load_encoder(files)
    assert encoder.embedding_size == card.embedding_size == size
    backbone, before = load_encoder(start)
    assert card.parameters == before.parameters + sum(value.numel() for value in _trained(files / "neck.safetensors"))
    projector = build_projector(32, 2, 16, 8)
    load_weights(projector, start / "projector.safetensors")
    images = torch.rand(6, 3, 8, 8)
    with torch.no_grad():
        # SimCLRv2's layer ends with its activation; the whole projector with its last norm.
        wanted = projector.eval()[: 3 * layers](backbone(images))
        torch.testing.assert_close(encoder(images), wanted)
    if layers == 1:
        assert (wanted >= 0).all()
    features = run_stage("embed", {"device": "cpu"}, {"shards": shards, "encoder": files})
    assert read_features(features).features.shape == (1797, size)


def _trained(path: Path) -> list[torch.Tensor]:
    return [value for name, value in load_file(path).items() if name.split(".")[1] in ("weight", "bias")]


def test_a_neck_is_trained_and_goes_on(run_stage: RunStage, shards: Path, start: Path, views: Path) -> None:
    inputs = {"shards": shards, "encoder": start}
    first = run_stage("finetune", from_encoder({"projector_layers": 1, "max_steps": 2}), inputs)
    projector = load_file(start / "projector.safetensors")
    neck = load_file(first / "neck.safetensors")
    assert set(neck) < set(projector)
    assert not torch.equal(neck["linear1.weight"], projector["linear1.weight"])
    second = run_stage("finetune", from_encoder({"max_steps": 1}), inputs | {"encoder": first})
    third = run_stage("pretrain", START, {"shards": shards, "views": views, "encoder": second})
    for files in (second, third):
        encoder, card = load_encoder(files)
        assert card.neck is not None
        assert card.neck.model_dump() == {"layers": 2, "hidden": 16, "dimension": 8, "kept": 1}
        assert encoder(torch.rand(2, 3, 8, 8)).shape == (2, 16)


def test_timm_brings_its_own_size_and_normalisation(
    run_stage: RunStage, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = timm.create_model

    def create_untrained(name: str, pretrained: bool, **options: Any) -> torch.nn.Module:
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", create_untrained)
    settings = TINY | {"encoder": "timm:test_resnet", "max_steps": 1, "label_fraction": 0.01}
    card = load_card(run_stage("finetune", settings, {"shards": shards}))
    assert card.architecture.model_dump() == {
        "backbone": "timm:test_resnet", "width": 64, "small_stem_up_to": 0, "pretrained": True,
    }  # fmt: skip
    assert (card.image_size, card.mean, card.std) == (160, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert card.weights.source.startswith("timm test_resnet")


def test_images_of_another_size_keep_the_stem(run_stage: RunStage, shards: Path, start: Path) -> None:
    large = {"preset": "text", "image_size": 72, "contact_sheet_images": 1}  # beyond what a small stem is for
    views = run_stage("augment", large, {"shards": shards})
    # Not channels last: oneDNN 3.12 crashes in the backward pass of 1x1 convolutions of 4 channels on maps this large.
    settings = from_encoder({"max_steps": 1, "label_fraction": 0.01, "channels_last": False})
    files = run_stage("finetune", settings, {"shards": shards, "encoder": start, "views": views})
    encoder, card = load_encoder(files)
    assert (card.image_size, card.architecture.small_stem_up_to) == (72, 72)
    assert encoder.get_parameter("conv1.weight").shape[-1] == 3


# Frozen parts


@pytest.mark.parametrize(
    ("part", "moved", "kept"),
    [
        ("none", ["conv1", "bn1", "layer1", "layer4"], []),
        ("conv1", ["bn1", "layer1", "layer4"], ["conv1"]),
        ("layer2", ["layer3", "layer4"], ["conv1", "bn1", "layer1", "layer2"]),
        ("layer4", [], ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]),
        ("encoder", [], ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]),
    ],
)
def test_what_is_frozen_keeps_weights_and_statistics(
    run_stage: RunStage, shards: Path, start: Path, part: str, moved: list[str], kept: list[str]
) -> None:
    settings = from_encoder({"freeze": part, "max_steps": 2, "loss": LOSSES[2]})
    files = run_stage("finetune", settings, {"shards": shards, "encoder": start})
    before, after = load_file(start / "encoder.safetensors"), load_file(files / "encoder.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        top = name.split(".")[0]
        if top in kept:
            assert torch.equal(before[name], after[name]), name
        else:
            assert top in moved or top.startswith("layer")
            assert not torch.equal(before[name], after[name]), name
    assert load_file(files / "head.safetensors")["weight"].isfinite().all()
    card = load_card(files)
    assert card.head is not None
    assert card.head.learned_from is not None
    assert len(card.labels_seen) == (1 if moved else 0), "labels leave no trace in weights that they did not train"
    assert card.head.learned_from.samples == 288


def test_the_head_has_a_rate_of_its_own(run_stage: RunStage, shards: Path) -> None:
    settings = TINY | {"max_steps": 1, "optimiser": {"learning_rate": 1e-3, "weight_decay": 0.0}}
    start = run_stage("finetune", settings | {"optimiser": {"learning_rate": 1e-12}}, {"shards": shards})
    moves = []
    for multiple in (1.0, 10.0):
        files = run_stage("finetune", settings | {"head_learning_rate": multiple}, {"shards": shards})
        moves.append(
            [
                load_file(files / name)[weight] - load_file(start / name)[weight]
                for name, weight in (("head.safetensors", "bias"), ("encoder.safetensors", "conv1.weight"))
            ]
        )
    torch.testing.assert_close(moves[1][0], 10 * moves[0][0], rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(moves[1][1], moves[0][1])


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": {"name": "triplet", "margin": "soft"}, "optimiser": {"name": "lars", "learning_rate": 0.5}},
        {"loss": {"name": "arcface", "scale": 8.0}, "optimiser": {"name": "adamw", "learning_rate": 1e-3}},
        {"loss": {"name": "cross_entropy", "label_smoothing": 0.1}, "gradient_clip": 0.5, "channels_last": False},
        {"loss": {"name": "triplet"}, "precision": "bf16"},
        {"loss": {"name": "arcface"}, "precision": "bf16"},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)
def test_other_settings_run_and_stay_finite(run_stage: RunStage, shards: Path, changes: dict[str, Any]) -> None:
    files = run_stage("finetune", TINY | {"max_steps": 3} | changes, {"shards": shards})
    assert all(torch.isfinite(value).all() for value in load_file(files / "encoder.safetensors").values())
    assert all(np.isfinite(value) for row in lines(files) for value in row.values())


def test_an_image_that_comes_twice_comes_in_two_views(
    run_stage: RunStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_images(tmp_path / "images", {"one": 1, "two": 2, "many": 9})
    shards = run_stage("shard", {"source": source})
    drawn: list[tuple[list[int], torch.Tensor]] = []
    visit = Views.__call__

    def watched(self: Views, images: torch.Tensor, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        found = visit(self, images, ids, *rest)
        assert found.shape[0] == 1
        drawn.append((ids.tolist(), found[0]))
        return found

    monkeypatch.setattr(Views, "__call__", watched)
    settings = TINY | {"classes_per_batch": 3, "loss": {"name": "triplet"}, "label_fraction": 1.0, "epochs": 4}
    run_stage("finetune", settings, {"shards": shards})
    assert len(drawn) == 4
    images = [(one, view) for ids, batch in drawn for one, view in zip(ids, batch, strict=True)]
    for number, (one, view) in enumerate(images):
        assert not any(one == other and torch.equal(view, seen) for other, seen in images[:number])
    assert len({tuple(ids) for ids, _ in drawn}) > 1
    said = capsys.readouterr().err
    assert "2 of 3 classes have fewer than images_per_class = 4 images" in said
    assert "1 of 3 classes have a single image ('one'), whose only positives are other views of it" in said


# What is refused, and what is said


def test_a_batch_is_never_larger_than_the_labelled_images(
    run_stage: RunStage, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = run_stage("finetune", TINY | {"label_fraction": 0.01, "epochs": 3}, {"shards": shards})
    assert "batches of 14: there are no more than 14 labelled images" in capsys.readouterr().err
    assert lines(files)[-1]["step"] == 3


@pytest.mark.parametrize(
    ("counts", "labels", "settings", "error", "message"),
    [
        ({"a": 4, "b": 4}, "none", {}, BadData, "no training image has a label"),
        ({"a": 8}, "folder", {}, BadData, "all 8 labelled training images are 'a'; two classes are needed"),
        (
            {"a": 4, "b": 4}, "folder", {"freeze": "layer9"}, UsageError,
            r"finetune\.freeze: no part 'layer9'; in order: conv1, bn1, layer1, layer2, layer3, layer4",
        ),
        (
            {"a": 4, "b": 4}, "folder", {"freeze": "layer4", "loss": {"name": "triplet"}}, UsageError,
            "freeze: layer4 leaves nothing to train: triplet has no head",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_from_is_one_line(
    run_stage: RunStage, tmp_path: Path, counts: dict[str, int], labels: str, settings: dict[str, Any],
    error: type[Exception], message: str,
) -> None:  # fmt: skip
    source = make_images(tmp_path / "images", counts)
    shards = run_stage("shard", {"source": source, "labels": labels})
    with pytest.raises(error, match=message) as caught:
        run_stage("finetune", TINY | {"label_fraction": 1.0} | settings, {"shards": shards})
    assert "\n" not in str(caught.value)
    assert getattr(caught.value, "exit_code", None) == (6 if error is BadData else 2)


def test_a_batch_has_no_more_classes_than_there_are(
    run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = run_stage("shard", {"source": make_images(tmp_path / "images", {"a": 9, "b": 9})})
    settings = {"label_fraction": 1.0, "loss": {"name": "triplet"}, "images_per_class": 3, "max_steps": 1}
    run_stage("finetune", TINY | settings, {"shards": shards})
    said = capsys.readouterr().err
    assert "batches of 2 classes with 3 images each: there are no more than 2 classes" in said
    assert "1 steps of 6" in said


def test_a_head_alone_cannot_be_trained_where_there_is_none() -> None:
    with pytest.raises(ValueError, match="freeze: encoder leaves nothing to train: triplet has no head"):
        Finetune.model_validate(
            {"shards": "shards", "encoder": "simclr", "loss": {"name": "triplet"}, "freeze": "encoder"}
        )


def test_a_second_neck_is_refused(run_stage: RunStage, shards: Path, start: Path, views: Path) -> None:
    """The encoder would be more than what is saved of it."""
    settings = from_encoder({"projector_layers": 1, "max_steps": 1})
    necked = run_stage("finetune", settings, {"shards": shards, "encoder": start})
    again = run_stage("pretrain", START | {"max_steps": 1}, {"shards": shards, "views": views, "encoder": necked})
    with pytest.raises(UsageError, match="projector_layers: the encoder ends with layers of an earlier projector"):
        run_stage("finetune", settings, {"shards": shards, "encoder": again})


def test_more_layers_than_the_projector_has(run_stage: RunStage, shards: Path, start: Path) -> None:
    with pytest.raises(UsageError, match=r"projector_layers: 3 is more than the 2 that the encoder has"):
        run_stage("finetune", from_encoder({"projector_layers": 3}), {"shards": shards, "encoder": start})
    with pytest.raises(ValueError, match="projector_layers: only a pretrained encoder has a projector, random"):
        run_stage("finetune", TINY | {"projector_layers": 1}, {"shards": shards})


def test_a_vision_transformer_takes_no_other_size(run_stage: RunStage, shards: Path, tmp_path: Path) -> None:
    architecture = {"backbone": "timm:test_vit"}
    views = run_stage("augment", {"image_size": 32, "contact_sheet_images": 1}, {"shards": shards})
    start = run_stage(
        "pretrain", START | {"architecture": architecture, "max_steps": 1}, {"shards": shards, "views": views}
    )
    other = run_stage("augment", {"image_size": 48, "contact_sheet_images": 1}, {"shards": shards})
    settings = from_encoder({"max_steps": 1, "freeze": "blocks.0", "label_fraction": 0.01})
    with pytest.raises(UnusableBackbone, match=r"a timm:test_vit .* images of 32 pixels takes none of 48"):
        run_stage("finetune", settings, {"shards": shards, "encoder": start, "views": other})
    files = run_stage("finetune", settings, {"shards": shards, "encoder": start, "views": views})
    before, after = load_file(start / "encoder.safetensors"), load_file(files / "encoder.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in moved} == {"blocks", "norm"}
    assert not any(name.startswith("blocks.0.") for name in moved)


def test_settings_without_effect_are_left_out_of_the_key() -> None:
    plain = Finetune.model_validate({"shards": "shards", "encoder": "simclr"})
    assert plain.without_effect() == {
        "architecture", "image_size", "classes_per_batch", "images_per_class", "label_subset", "classes_of_one",
        "parents_per_batch", "positive_share", "sampler", "label_relation",
    }  # fmt: skip
    given = {"shards": "shards", "encoder": "random", "loss": {"name": "triplet"}, "label_fraction": 0.1}
    assert Finetune.model_validate(given).without_effect() == {
        "batch_size", "parents_per_batch", "positive_share", "sampler", "label_relation",
    }  # fmt: skip


def test_an_encoder_of_one_width_is_not_loaded_as_another(run_stage: RunStage, shards: Path, start: Path) -> None:
    """The architecture of the settings is not asked where the encoder brings its own."""
    settings = from_encoder({"max_steps": 1}) | {"architecture": {"backbone": "resnet18", "width": 8}}
    card = load_card(run_stage("finetune", settings, {"shards": shards, "encoder": start}))
    assert card.architecture.backbone == "resnet10"
    assert card.parameters == sum(p.numel() for p in build_encoder("resnet10", 4, 64, False, 8).parameters())
