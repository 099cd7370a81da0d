"""Features of every image: rows, bytes, and what each kind of encoder makes of a picture."""

import io
import json
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from conftest import RunStage
from PIL import Image

from stages.evaluation import FeatureFile, read_features
from stages.images import open_shards, read_summary
from stages.models import UnusableBackbone, build_encoder, load_encoder
from stages.views import evaluation_view, squares

TINY: dict[str, Any] = {"architecture": {"backbone": "resnet10", "width": 4}, "image_size": 8, "device": "cpu"}


@pytest.fixture
def shards(run_stage: RunStage, tmp_path: Path) -> Path:
    """Images of several sizes in three classes, train and test."""
    random = np.random.default_rng(0)
    for split, count in (("train", 21), ("test", 9)):
        for number in range(count):
            path = tmp_path / "images" / split / f"class {number % 3}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            height, width = random.integers(8, 20, 2)
            Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return run_stage("shard", {"source": f"folder:{tmp_path / 'images'}"})


def test_one_row_a_sample_of_all_splits_in_order_of_id(run_stage: RunStage, shards: Path) -> None:
    files = run_stage("embed", {"encoder": "pixels", "image_size": 8, "batch_size": 4}, {"shards": shards})
    table = pq.read_table(files / "features.parquet")
    assert table.schema.field("features").type.list_size == 3 * 8 * 8
    assert table["id"].to_pylist() == list(range(30))
    assert table["split"].to_pylist() == ["train"] * 21 + ["test"] * 9
    parts = [open_shards(shards, split) for split in ("train", "test")]
    assert table["key"].to_pylist() == [key for part in parts for key in part.keys]
    assert table["label"].to_pylist() == [label for part in parts for label in part.labels.tolist()]
    assert table["labels"].to_pylist() == [[label] for label in table["label"].to_pylist()]
    assert table["group"].null_count == 30
    card = json.loads((files / "features.json").read_text())
    encoder = {"kind": "pixels", "name": "pixels", "stage": None, "architecture": None, "image_size": 8}
    assert card == {
        "format": 1,
        "encoder": encoder | {"labels_seen": []},
        "dimension": 192,
        "classes": ["class 0", "class 1", "class 2"],
        "splits": {"train": 21, "test": 9},
    }


def test_read_back_as_written(run_stage: RunStage, shards: Path) -> None:
    files = run_stage("embed", {"encoder": "pixels", "image_size": 8, "batch_size": 4}, {"shards": shards})
    features = read_features(files)
    table = pq.read_table(files / "features.parquet")
    assert features.features.tolist() == table["features"].to_pylist()
    assert features.labels.tolist() == table["label"].to_pylist()
    assert features.keys.tolist() == table["key"].to_pylist()
    assert not features.has_groups
    assert len(set(features.groups.tolist())) == 30
    test = features.select(np.flatnonzero(features.splits == "test"))
    assert len(test) == 9
    assert test.features.data_ptr() == features.features[21:].data_ptr(), "consecutive rows are not copied"
    some = features.select(np.array([3, 1, 25]))
    assert some.ids.tolist() == [3, 1, 25]
    assert torch.equal(some.features, features.features[[3, 1, 25]])


def test_groups_and_several_labels_go_along(run_stage: RunStage, shards: Path) -> None:
    index = pq.read_table(shards / "index.parquet")
    groups = ["patient 1", None, "patient 1", None, "patient 2"] * 6
    lists = [[0, 2], [], [1]] * 10
    columns = {
        "group": groups,
        "labels": lists,
        "label": [one[0] if len(one) == 1 else -1 for one in lists],
    }
    for name, values in columns.items():
        place = index.schema.get_field_index(name)
        index = index.set_column(place, index.schema.field(name), pa.array(values, index.schema.field(name).type))
    pq.write_table(index, shards / "index.parquet")
    files = run_stage("embed", {"encoder": "pixels", "image_size": 8, "batch_size": 4}, {"shards": shards})
    table = pq.read_table(files / "features.parquet")
    assert (table["group"].to_pylist(), table["labels"].to_pylist()) == (groups, lists)
    features = read_features(files)
    assert features.has_groups
    assert features.label_counts.tolist() == [2, 0, 1] * 10
    assert features.labels.tolist() == [-1, -1, 1] * 10
    numbers = features.groups.tolist()
    assert numbers[:5] == [0, numbers[1], 0, numbers[3], 1]
    assert len(set(numbers)) == 2 + 12


def test_attributes_go_along(run_stage: RunStage, shards: Path, tmp_path: Path) -> None:
    """In parts that are smaller than a split, and only where there are any."""
    keys = [key for split in ("train", "test") for key in open_shards(shards, split).keys]
    hands = [None if number % 5 == 0 else f"hand {number % 3}" for number in range(30)]
    rows = [f"images/{key},{key.split('/')[0]},{hand or ''}" for key, hand in zip(keys, hands, strict=True)]
    (tmp_path / "table.csv").write_text("\n".join(["path,split,drawn_by", *rows]) + "\n")
    columns = {"attributes": ["drawn_by", "split"]}
    drawn = run_stage("shard", {"source": f"csv:{tmp_path / 'table.csv'}", "columns": columns})
    settings = {"encoder": "pixels", "image_size": 8, "batch_size": 4}
    with_them, without = (run_stage("embed", settings, {"shards": one}) for one in (drawn, shards))
    table = pq.read_table(with_them / "features.parquet")
    assert [f"images/{key}" for key in keys] == table["key"].to_pylist()
    assert table["attribute.drawn_by"].to_pylist() == hands
    file = FeatureFile(with_them)
    assert file.attribute("drawn_by") == hands
    assert file.attribute("split") == table["split"].to_pylist()
    message = f"{file.path} has no attribute 'kind'; it has drawn_by, split: name it in columns.attributes of the stage"
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        file.attribute("kind")
    assert getattr(caught.value, "exit_code", None) == 2
    plain = pq.read_table(without / "features.parquet")
    assert table.drop_columns(["attribute.drawn_by", "attribute.split"]).column_names == plain.column_names
    assert table["features"].equals(plain["features"])
    with pytest.raises(ValueError, match="it has none: name it"):
        FeatureFile(without).attribute("drawn_by")


def test_features_of_an_older_version_are_refused(run_stage: RunStage, shards: Path) -> None:
    files = run_stage("embed", {"encoder": "pixels", "image_size": 8}, {"shards": shards})
    pq.write_table(pq.read_table(files / "features.parquet").drop_columns("group"), files / "features.parquet")
    with pytest.raises(ValueError, match="no column 'group': an older version") as caught:
        read_features(files)
    assert getattr(caught.value, "exit_code", None) == 4


def test_pixels_are_the_evaluation_view_from_0_to_1(run_stage: RunStage, shards: Path) -> None:
    files = run_stage("embed", {"encoder": "pixels", "image_size": 8}, {"shards": shards})
    features = read_features(files).features
    sample = open_shards(shards, "train")[5]
    view = evaluation_view(
        sample.image[None], torch.tensor([sample.image.shape[1:]]), 8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    )
    torch.testing.assert_close(features[5], view.flatten())
    assert 0 <= features.min() < 0.2 < 0.8 < features.max() <= 1


@pytest.mark.parametrize(("crops", "mirror"), [(1, True), (5, False), (5, True)])
def test_features_are_means_over_what_is_looked_at(
    run_stage: RunStage, shards: Path, crops: Literal[1, 5], mirror: bool
) -> None:
    settings = TINY | {"encoder": "random", "crops": crops, "mirror": mirror}
    features = read_features(run_stage("embed", settings, {"shards": shards})).features
    plain = read_features(run_stage("embed", TINY | {"encoder": "random"}, {"shards": shards})).features
    assert (features - plain).abs().max() > 1e-3
    torch.manual_seed(0)
    encoder = build_encoder("resnet10", 4, 64, False, 8).eval()
    sample, statistics = open_shards(shards, "train")[5], read_summary(shards)["statistics"]
    mean, std = tuple(statistics["mean"]), tuple(statistics["std"])
    looks = [
        evaluation_view(sample.image[None], None, 8, mean, std, square=square) for square in squares(crops, mirror)
    ]
    assert len(looks) == crops * (2 if mirror else 1)
    with torch.no_grad():
        wanted = torch.stack([encoder(look)[0] for look in looks]).mean(dim=0)
    torch.testing.assert_close(features[5], wanted, rtol=1e-4, atol=1e-5)


def test_random_is_what_pretraining_starts_from(run_stage: RunStage, shards: Path) -> None:
    """A pretraining that moves nothing (its rate is next to zero) has the features of `random`, of the same seed."""
    views = run_stage("augment", {"image_size": 8, "contact_sheet_images": 1}, {"shards": shards})
    settings = {
        "architecture": TINY["architecture"],
        "projector": {"layers": 1, "dimension": 4},
        "optimiser": {"name": "sgd", "learning_rate": 1e-30, "weight_decay": 0},
        "epochs": 1,
        "batch_size": 8,
        "max_steps": 1,
        "device": "cpu",
    }
    model = run_stage("pretrain", settings, {"shards": shards, "views": views}, seed=3)
    encoder, _ = load_encoder(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        fresh = build_encoder("resnet10", 4, 64, False, 8)
    for name, parameter in fresh.named_parameters():
        torch.testing.assert_close(dict(encoder.named_parameters())[name], parameter, rtol=0, atol=1e-20)

    files = run_stage("embed", TINY | {"encoder": "random"}, {"shards": shards}, seed=3)
    statistics = json.loads((shards / "shards.json").read_text())["statistics"]
    batch = open_shards(shards, "train").batch(range(21))
    images = evaluation_view(batch.images, batch.sizes, 8, tuple(statistics["mean"]), tuple(statistics["std"]))
    with torch.no_grad():
        expected = fresh.eval()(images)
    torch.testing.assert_close(read_features(files).features[:21], expected, rtol=1e-4, atol=1e-5)
    assert read_features(files).card["encoder"]["architecture"]["backbone"] == "resnet10"


def test_pretrained_features_are_those_of_the_encoder_in_evaluation_mode(run_stage: RunStage, shards: Path) -> None:
    views = run_stage("augment", {"image_size": 8, "contact_sheet_images": 1}, {"shards": shards})
    settings = {"architecture": TINY["architecture"], "epochs": 1, "batch_size": 8, "device": "cpu"}
    model = run_stage("pretrain", settings, {"shards": shards, "views": views})
    # The stage's own image_size and architecture are not asked: the encoder brings them.
    files = run_stage("embed", {"device": "cpu", "image_size": 30}, {"shards": shards, "encoder": model})
    encoder, card = load_encoder(model)
    batch = open_shards(shards, "test").batch(range(9))
    images = evaluation_view(batch.images, batch.sizes, 8, card.mean, card.std, card.interpolation, card.antialias)
    with torch.no_grad():
        expected = encoder(images)
    features = read_features(files)
    torch.testing.assert_close(features.features[21:], expected, rtol=1e-4, atol=1e-5)
    assert features.card["encoder"] | {"architecture": None} == {
        "kind": "pretrained", "name": "resnet10", "stage": "pretrain", "architecture": None, "image_size": 8,
        "labels_seen": [],
    }  # fmt: skip


def test_same_bytes_whatever_the_workers_and_what_was_drawn_before(run_stage: RunStage, shards: Path) -> None:
    settings = TINY | {"encoder": "random"}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = run_stage("embed", settings | {"workers": 1}, {"shards": shards})
    assert torch.equal(torch.get_rng_state(), state), "the process's own generator is left as it was"
    torch.manual_seed(2)
    second = run_stage("embed", settings | {"workers": 3}, {"shards": shards})
    other = run_stage("embed", settings, {"shards": shards}, seed=1)
    for name in ("features.parquet", "features.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert (first / "features.parquet").read_bytes() != (other / "features.parquet").read_bytes()


def test_images_without_labels(run_stage: RunStage, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        content = io.BytesIO()
        Image.new("RGB", (9, 12), (number, 0, 255)).save(content, "PNG")
        (folder / f"{number}.png").write_bytes(content.getvalue())
    source = {"source": f"folder:{folder}", "labels": "none", "test_fraction": 0}
    files = run_stage("embed", TINY | {"encoder": "random"}, {"shards": run_stage("shard", source)})
    features = read_features(files)
    assert features.labels.tolist() == [-1] * 6
    assert features.classes == []


def test_timm_brings_its_own_size_resize_and_normalisation(
    run_stage: RunStage, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the published weights were these: what they are does not matter here, how images reach them does."""
    create = timm.create_model

    def create_untrained(name: str, pretrained: bool, **options: Any) -> torch.nn.Module:
        assert pretrained
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", create_untrained)
    files = run_stage("embed", {"encoder": "timm:test_resnet", "device": "cpu"}, {"shards": shards})
    published = timm.get_pretrained_cfg("test_resnet")
    assert published is not None
    batch = open_shards(shards, "test").batch(range(9))
    assert published.mean == published.std == (0.5, 0.5, 0.5)
    half = (0.5, 0.5, 0.5)
    images = evaluation_view(batch.images, batch.sizes, 160, half, half, "bilinear", True)
    with torch.no_grad():
        expected = create_untrained("test_resnet", pretrained=True, num_classes=0).eval()(images)
    features = read_features(files)
    torch.testing.assert_close(features.features[21:], expected, rtol=1e-4, atol=1e-5)
    assert features.card["encoder"] == {
        "kind": "timm", "name": "timm:test_resnet", "stage": None, "architecture": None, "image_size": 160,
        "labels_seen": [],
    }  # fmt: skip


def test_weights_of_timm_that_cannot_be_had_are_one_clear_error(
    run_stage: RunStage, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("cannot reach the hub\nand more lines")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(UnusableBackbone, match=r"test_resnet.*cannot be had.*hub") as caught:
        run_stage("embed", {"encoder": "timm:test_resnet"}, {"shards": shards})
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_unknown_model_of_timm_names_the_nearest(run_stage: RunStage, shards: Path) -> None:
    with pytest.raises(UnusableBackbone, match=r"timm:resnet18"):
        run_stage("embed", {"encoder": "timm:resnet81"}, {"shards": shards})
