"""An encoder that ends with a batch norm: what each loss sees, what is saved, and where it goes on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunStage, stage_runner
from safetensors.torch import load_file
from test_pooling import POLICY, PUBLISHED, make_encoder
from torch import Tensor, nn

from pipeline.errors import UsageError
from stages.encoders.export import Unexportable, export
from stages.encoders.ready import STORED, ReadyEncoder, load_folder
from stages.evaluation import read_features
from stages.finetune import Objective
from stages.images import open_shards
from stages.images.batch_plan import label_samples
from stages.losses import Loss, Task
from stages.losses.combined import Combined, Part
from stages.losses.registry import build_loss
from stages.models import (
    BottleneckedEncoder,
    build_bottleneck,
    build_encoder,
    convert_batch_norm,
    count_parameters,
    load_card,
    load_encoder,
    load_head,
    make_card,
    save_model,
)
from stages.settings.finetune import Finetune
from stages.settings.losses import CrossEntropy, Triplet
from stages.views import evaluation_view

LABELS = torch.arange(12) % 3
TINY: dict[str, Any] = {
    "architecture": {"backbone": "resnet10", "width": 4},
    "image_size": 8,
    "encoder": "random",
    "max_steps": 4,
    "classes_per_batch": 5,
    "images_per_class": 4,
    "record_every_steps": 1,
    "label_fraction": 0.2,
    "device": "cpu",
    "loss": [{"name": "triplet"}, {"name": "cross_entropy", "weight": 0.5}],
    "neck": "bn",
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


def make_parts() -> list[Part]:
    torch.manual_seed(3)
    task = Task(6, (4, 4, 4))
    options = Triplet(name="triplet").options, CrossEntropy(name="cross_entropy").options
    return [
        Part("triplet", build_loss("triplet", options[0], task).double(), 1.0, False),
        Part("cross_entropy", build_loss("cross_entropy", options[1], task).double(), 0.5, True),
    ]


def normalise(rows: Tensor, scale: Tensor) -> Tensor:
    """Ioffe and Szegedy 2015, algorithm 1, without the shift; by loops."""
    columns = []
    for column, factor in zip(rows.T, scale, strict=True):
        mean = sum(column) / len(column)
        variance = sum((value - mean) ** 2 for value in column) / len(column)
        columns.append(factor * (column - mean) / (variance + 1e-5) ** 0.5)
    return torch.stack(columns, dim=1)


def test_losses_that_compare_see_what_comes_in_and_others_what_comes_out() -> None:
    bottleneck = build_bottleneck(6).double()
    assert [name for name, _ in bottleneck.named_parameters()] == ["weight"], "no shift"
    nn.init.uniform_(bottleneck.get_parameter("weight"), 0.5, 2)
    rows = torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    parts = make_parts()
    loss, figures = Combined(parts, bottleneck)(rows, LABELS, 1.0)
    behind = normalise(rows, bottleneck.get_parameter("weight"))
    in_front, classified = parts[0].loss(rows, LABELS, 1.0)[0], parts[1].loss(behind, LABELS, 1.0)[0]
    torch.testing.assert_close(loss, in_front + 0.5 * classified)
    assert (figures["triplet_loss"].item(), figures["cross_entropy_loss"].item()) == pytest.approx(
        (in_front.item(), classified.item())
    )
    plain, _ = Combined(parts, None)(rows, LABELS, 1.0)
    torch.testing.assert_close(plain, in_front + 0.5 * parts[1].loss(rows, LABELS, 1.0)[0])


def test_the_value_at_a_point_counts_as_the_loss_does() -> None:
    triplet, cross_entropy = make_parts()
    assert Combined([triplet._replace(weight=2.0)], None).value_at_a_point == pytest.approx(0.6)
    assert Combined([cross_entropy], None).value_at_a_point is None
    assert Combined([triplet, cross_entropy], None).value_at_a_point is None


class _Idle(Loss):
    def __init__(self, idle: float):
        super().__init__()
        self.idle = idle

    def measure(self, embeddings: Tensor, labels: Tensor, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        return embeddings.sum(), {"idle": torch.tensor(self.idle)}


@pytest.mark.parametrize(("one", "other"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.0, 0.0)])
def test_idle_is_of_any_of_several(one: float, other: float) -> None:
    parts = [Part("one", _Idle(one), 1.0, False), Part("other", _Idle(other), 1.0, False)]
    _, figures = Combined(parts, None)(torch.ones(2, 2), torch.zeros(2), 1.0)
    assert figures["idle"].item() == max(one, other)


def test_it_stands_in_one_place() -> None:
    """Registered twice it would become two batch norms, whose statistics part on another device."""
    settings = Finetune.model_validate_json(json.dumps({"shards": "shards"} | TINY))
    samples = label_samples(torch.arange(12).numpy(), LABELS.numpy(), ("a", "b", "c"), (), False)
    objective = Objective(settings, build_encoder("resnet10", 4, 64, False, 8), samples)
    convert_batch_norm(objective)
    objective.double()  # like a move to a device: new buffers
    objective(torch.randn(12, 32, dtype=torch.float64) + 5, LABELS, 1.0)
    assert objective.bottleneck is not None
    assert (objective.bottleneck.get_buffer("running_mean") > 0.1).all(), "what is saved has seen the batch"
    assert sum(name.endswith("running_mean") for name in objective.state_dict()) == 1


# Through the stage


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    run = stage_runner(tmp_path_factory.mktemp("made"))
    shards = run("shard", {"source": "sklearn:digits"})
    views = run("augment", {"preset": "text", "image_size": 8, "contact_sheet_images": 1}, {"shards": shards})
    start = run("pretrain", START, {"shards": shards, "views": views})
    tuned = run("finetune", TINY, {"shards": shards})
    return {"shards": shards, "views": views, "start": start, "tuned": tuned}


def going_on(changes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in (TINY | changes).items() if name not in ("encoder", "architecture")}


def test_the_encoder_gives_what_comes_out(made: dict[str, Path]) -> None:
    files = made["tuned"]
    encoder, card = load_encoder(files)
    assert isinstance(encoder, BottleneckedEncoder)
    assert card.bottleneck
    assert card.parameters == count_parameters(encoder) == count_parameters(encoder.inner) + 32
    state = load_file(files / "bottleneck.safetensors")
    assert set(state) == {"weight", "running_mean", "running_var", "num_batches_tracked"}
    assert state["num_batches_tracked"].item() == 4
    assert not torch.equal(state["weight"], torch.ones(32)), "it was trained"
    images = torch.rand(5, 3, 8, 8)
    with torch.no_grad():
        inner, found = encoder.inner(images), encoder(images)
    wanted = state["weight"] * (inner - state["running_mean"]) / (state["running_var"] + 1e-5).sqrt()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_saved_head_knows_what_comes_out(run_stage: RunStage, made: dict[str, Path]) -> None:
    settings = TINY | {"max_steps": 60, "epochs": 60, "classes_per_batch": 10, "label_fraction": 1.0}
    files = run_stage("finetune", settings | {"optimiser": {"learning_rate": 0.5}}, {"shards": made["shards"]})
    encoder, card = load_encoder(files)
    batch = open_shards(made["shards"], "test").batch(range(200))
    images = evaluation_view(batch.images, batch.sizes, 8, card.mean, card.std)
    assert isinstance(encoder, BottleneckedEncoder)
    with torch.no_grad():
        head = load_head(files, card)
        right, from_inside = (
            (head(embed(images)).argmax(1) == batch.labels).float().mean() for embed in (encoder, encoder.inner)
        )
    assert right > 0.35, "a tenth is chance"
    assert right > from_inside


def test_without_it_neither_file_nor_field_is_written(run_stage: RunStage, made: dict[str, Path]) -> None:
    files = run_stage("finetune", TINY | {"neck": "none", "max_steps": 1}, {"shards": made["shards"]})
    assert not (files / "bottleneck.safetensors").exists()
    assert "bottleneck" not in (files / "model.json").read_text()
    assert not load_card(files).bottleneck


def test_it_goes_on_through_embed_finetune_and_pretrain(run_stage: RunStage, made: dict[str, Path]) -> None:
    shards, tuned = made["shards"], made["tuned"]
    features = read_features(run_stage("embed", {"device": "cpu"}, {"shards": shards, "encoder": tuned})).features
    assert features.shape == (1797, 32)
    assert (features < 0).any(), "a pooled ReLU has none below nought"
    again = run_stage("finetune", going_on({"neck": "none"}), {"shards": shards, "encoder": tuned})
    inputs = {"shards": shards, "views": made["views"], "encoder": again}
    pretrained = run_stage("pretrain", START, inputs)
    for before, after in ((tuned, again), (again, pretrained)):
        encoder, card = load_encoder(after)
        assert isinstance(encoder, BottleneckedEncoder)
        assert (card.bottleneck, card.embedding_size) == (True, 32)
        one, other = (load_file(folder / "bottleneck.safetensors") for folder in (before, after))
        assert not torch.equal(one["weight"], other["weight"]), "trained on"
        assert not torch.equal(one["running_mean"], other["running_mean"])


def test_it_may_stand_on_layers_of_a_projector(run_stage: RunStage, made: dict[str, Path]) -> None:
    inputs = {"shards": made["shards"], "encoder": made["start"]}
    files = run_stage("finetune", going_on({"projector_layers": 1, "layer_decay": 0.5}), inputs)
    encoder, card = load_encoder(files)
    assert isinstance(encoder, BottleneckedEncoder)
    assert card.neck is not None
    assert (card.bottleneck, card.embedding_size) == (True, 16)
    assert encoder(torch.rand(2, 3, 8, 8)).shape == (2, 16)
    assert {"neck.safetensors", "bottleneck.safetensors", "head.safetensors"} <= {one.name for one in files.iterdir()}


def test_an_encoder_that_is_frozen_may_get_one(run_stage: RunStage, made: dict[str, Path]) -> None:
    settings = going_on({"freeze": "encoder", "loss": {"name": "cross_entropy"}})
    files = run_stage("finetune", settings, {"shards": made["shards"], "encoder": made["start"]})
    one, other = (load_file(folder / "encoder.safetensors") for folder in (made["start"], files))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert load_file(files / "bottleneck.safetensors")["num_batches_tracked"].item() == 4
    assert [seen.loss for seen in load_card(files).labels_seen] == ["cross_entropy"], "its scale has seen labels"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"finetune\.neck: the encoder ends with a batch norm already; leave it out"),
        ({"neck": "none", "projector_layers": 1}, r"finetune\.projector_layers: "),
    ],
)
def test_a_second_one_is_refused(
    run_stage: RunStage, made: dict[str, Path], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        run_stage("finetune", going_on(changes), {"shards": made["shards"], "encoder": made["tuned"]})
    assert "\n" not in str(caught.value)


def test_projector_layers_below_a_batch_norm_are_refused(run_stage: RunStage, made: dict[str, Path]) -> None:
    inputs = {"shards": made["shards"], "views": made["views"], "encoder": made["tuned"]}
    pretrained = run_stage("pretrain", START | {"max_steps": 1}, inputs)
    settings = going_on({"neck": "none", "projector_layers": 1, "loss": {"name": "bce"}})
    with pytest.raises(UsageError, match="projector_layers: the encoder ends with a batch norm; leave it out"):
        run_stage("finetune", settings, {"shards": made["shards"], "encoder": pretrained})


def test_no_library_has_it_and_safetensors_works(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = make_encoder("average", PUBLISHED)
    bottlenecked = BottleneckedEncoder(encoder, build_bottleneck(encoder.embedding_size)).train()
    bottlenecked(torch.rand(4, 3, 32, 32))
    card = make_card("finetune", bottlenecked.eval(), PUBLISHED, POLICY)
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", card, bottlenecked, None)
    ready = ReadyEncoder(bottlenecked, card, STORED, "toy/tuned@v1")
    for library in ("torchvision", "timm"):
        with pytest.raises(Unexportable) as caught:
            export(ready, tmp_path / library, library)
        assert str(caught.value) == (
            f"toy/tuned@v1 cannot be a model of {library}: it ends with a batch norm; --format safetensors works"
        )
    names = export(ready, tmp_path / "out", "safetensors")
    assert "bottleneck.safetensors" in names
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load_folder(tmp_path / "out")(images), bottlenecked(images))
    export(ready, tmp_path / "out", "safetensors")  # over an earlier export
